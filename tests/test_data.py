"The real CIFAR-10 and Flowers-102 in their true layout, and downloads up to the network."
import tarfile
import urllib.request
from urllib.error import URLError

import pytest
import torchvision

from spectral_curation.lab.data import cifar10_dls, flowers_dls, pets_dls


@pytest.fixture(scope='module')
def unpacked(data_dir, tmp_path_factory):
    "A part of CIFAR-10 (it has 60,000 files) and the whole of Flowers."
    root = tmp_path_factory.mktemp('data')
    with tarfile.open(data_dir/'cifar10.tgz') as tar:
        for member in tar:
            number = member.name.rsplit('/', 1)[-1].split('.')[0]
            if not number.isdigit() or int(number) <= 20: tar.extract(member, root, filter='data')
    with tarfile.open(data_dir/'flowers-102.tgz') as tar: tar.extractall(root, filter='data')
    return root


def test_cifar10(unpacked):
    dls = cifar10_dls(unpacked, bs=16, num_workers=0, device='cpu')
    assert list(dls.vocab) == 'airplane automobile bird cat deer dog frog horse ship truck'.split()
    sets = [set(dl.dataset.items) for dl in dls.loaders]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert len(sets[1]) == (len(sets[0]) + len(sets[1]))//10
    assert all('train' in p.parts for p in sets[0] | sets[1]) and all('test' in p.parts for p in sets[2])
    x, y = dls.valid.one_batch()
    assert x.shape[1:] == (3, 32, 32) and x.abs().max() < 3
    assert [dls.vocab[i] for i in y] == [p.parent.name for p in dls.valid_ds.items[:len(y)]]


def test_flowers(unpacked):
    dls = flowers_dls(unpacked, bs=8, size=64, num_workers=0, device='cpu')
    assert [len(dl.dataset) for dl in dls.loaders] == [1020, 1020, 6149]
    for split, dl in zip(('train', 'val', 'test'), dls.loaders):    # torchvision's own reading of the labels
        theirs = torchvision.datasets.Flowers102(unpacked, split=split)
        assert [o['label']-1 for o in dl.dataset.items] == theirs._labels
        assert [o['path'].name for o in dl.dataset.items] == [p.name for p in theirs._image_files]
    assert dls.train.one_batch()[0].shape == (8, 3, 64, 64)
    assert flowers_dls(unpacked/'flowers-102', num_workers=0).train_ds.items == flowers_dls(unpacked, num_workers=0).train_ds.items


@pytest.mark.parametrize('make, words', [(cifar10_dls, 'train/<class>'), (flowers_dls, 'setid.mat'), (pets_dls, 'trainval,test')])
def test_download_without_network(make, words, monkeypatch, tmp_path):
    "The real download is tried; where it fails, the error says which files to put where."
    asked = []
    def no_network(url, *args, **kwargs): asked.append(getattr(url, 'full_url', url)); raise URLError('no network')
    monkeypatch.setenv('FASTAI_HOME', str(tmp_path))
    monkeypatch.setattr(urllib.request, 'urlopen', no_network)
    monkeypatch.setattr('fastdownload.core.urlsave', no_network, raising=False)
    with pytest.raises(FileNotFoundError, match='could not be downloaded') as e: make()
    assert words in str(e.value) and 'root' in str(e.value)
    assert asked
