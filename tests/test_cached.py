"Cached data on real image files: how often each is opened, the same training, and errors that come out of a worker."
import numpy as np
import pytest
import torch
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.torch_core import set_seed
from fastai.vision.augment import FlipItem
from PIL import Image
from torch import nn

from spectral_curation.train.by_index import SALN
from spectral_curation.lab.data import cifar10_dls
from spectral_curation.train.cached import cache_on_device
from spectral_curation.features.reference import reference_features


def write(path, size, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.uint8(np.random.default_rng(seed).random((*size, 3))*255)).save(path)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "PNG and JPEG files, wide and high, in CIFAR-10's layout; enough for worker processes to be used."
    root = tmp_path_factory.mktemp('cifar')
    for c, kind in (('cat', 'png'), ('dog', 'jpg')):
        for i in range(330): write(root/f'train/{c}/{i:04d}.{kind}', (12, 16) if i % 2 else (14, 10), i)
        for i in range(20): write(root/f'test/{c}/{i:04d}.{kind}', (12, 16), 1000+i)
    return root


@pytest.fixture
def opened(tmp_path, monkeypatch):
    "Names of the files that were opened since the last call, by this process and its workers."
    log, image_open = tmp_path/'opened', Image.open
    def open_and_tell(f, *args, **kwargs):
        with open(log, 'a') as out: out.write(f'{f}\n')
        return image_open(f, *args, **kwargs)
    monkeypatch.setattr(Image, 'open', open_and_tell)
    def names():
        seen = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return seen
    return names


def make(root, workers=0, **kwargs):
    set_seed(0)
    return cifar10_dls(root, size=8, **(dict(bs=32, num_workers=workers, device='cpu') | kwargs))


def trained(dls, tmp_path, n=3, cbs=None):
    set_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat(), metrics=accuracy, cbs=cbs, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(n, .01)
    return learn


@pytest.mark.parametrize('workers', [0, 2])
def test_each_file_is_opened_once(root, opened, workers, tmp_path):
    dls = make(root, workers)
    files = [str(f) for dl in dls.loaders for f in dl.dataset.items]
    opened()
    cached = cache_on_device(dls, progress=False)
    assert sorted(opened()) == sorted(files)
    learn = trained(cached, tmp_path)
    learn.validate(ds_idx=2)
    learn.get_preds()
    assert not opened()
    learn.get_preds(dl=cached.test_dl(dls.valid_ds.items[:3], num_workers=0))
    assert len(opened()) >= 3                      # other items are read


@pytest.mark.parametrize('workers', [0, 2])
def test_same_training_and_features(root, workers, tmp_path):
    plain, cached = make(root, workers), cache_on_device(make(root, workers), progress=False)
    for size in (None, 16):
        features = [reference_features(dls, 'pixels', size, cache=False, progress=False) for dls in (plain, cached)]
        assert np.array_equal(*features)
    squeezed = [dl.rows[0] for dl in (cached.train, cache_on_device(make(root), progress=False).train)]
    assert torch.equal(*squeezed)                   # whoever reads them
    for cbs in (lambda: None, lambda: SALN(.5, 'pixels', cache=False)):
        a, b = trained(plain, tmp_path, cbs=cbs()), trained(cached, tmp_path, cbs=cbs())
        for t, t2 in zip(a.model.state_dict().values(), b.model.state_dict().values()): assert torch.equal(t, t2)
        assert a.recorder.values[-1][:3] == b.recorder.values[-1][:3]


def test_features_of_one_serve_the_other(root, tmp_path):
    plain = make(root)
    first = reference_features(plain, 'pixels', cache=tmp_path, progress=False)
    file, = tmp_path.glob('*.npy')
    written = file.stat().st_mtime_ns
    cached = cache_on_device(plain, progress=False)
    assert np.array_equal(reference_features(cached, 'pixels', cache=tmp_path, progress=False), first)
    assert file.stat().st_mtime_ns == written and len(list(tmp_path.glob('*.npy'))) == 1


@pytest.mark.parametrize('workers', [0, 2])
def test_errors_come_out_of_workers(root, workers):
    def refused(dls, words):
        with pytest.raises(ValueError) as e: cache_on_device(dls, progress=False)
        assert words in str(e.value) and 'Traceback' not in str(e.value)
    dls = make(root, workers, n_valid=20)
    dls.train.after_item.fs = dls.train.after_item.fs.filter(lambda t: type(t).__name__ != 'PaperResize')
    refused(dls, 'items must have one size')
    dls = make(root, workers, n_valid=20)
    dls.add_tfms([FlipItem()], 'after_item', 0)
    refused(dls, 'draws random numbers for each item (FlipItem)')


def test_worker_processes_ask_nothing_of_cuda(root, monkeypatch):
    "A forked worker can't initialize CUDA, so the check for random numbers reads the CPU's generators alone."
    def states():
        if torch.utils.data.get_worker_info(): raise RuntimeError('Cannot re-initialize CUDA in forked subprocess')
        return []
    monkeypatch.setattr(torch.cuda, 'get_rng_state_all', states)
    assert cache_on_device(make(root, 2), progress=False).train.uses_cache


def test_a_broken_file_is_the_loaders_own_error(root, tmp_path):
    import shutil
    shutil.copytree(root, tmp_path/'copy')
    dls = make(tmp_path/'copy')
    dls.train_ds.items[3].write_bytes(b'no image')
    with pytest.raises(Exception, match='cannot identify image file'): cache_on_device(dls, progress=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_on_a_gpu(root):
    plain, cached = make(root, augment=False), cache_on_device(make(root, augment=False), 'cuda', progress=False)
    assert plain.device.type == 'cpu' and cached.device.type == 'cuda'
    assert all(t.is_cuda for dl in cached.loaders for t in dl.rows)
    for (x, y), (x2, y2) in zip(plain.train, cached.train):
        assert x2.is_cuda and y2.is_cuda and type(x2) is type(x)
        torch.testing.assert_close(x.cpu(), x2.cpu())
        assert torch.equal(y, y2.cpu())
    assert not cached.cpu().train.rows[0].is_cuda
    with pytest.raises(MemoryError, match='decoded'): cache_on_device(plain, 'cuda', max_bytes=1000, progress=False)
