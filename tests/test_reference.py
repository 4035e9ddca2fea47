"Weights files, cached features and frozen models where things go wrong: damage, malice, crashes, races, no network."
import contextlib, io, json, multiprocessing, os, shutil, signal, struct, tempfile, urllib.error, urllib.request
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np, pytest, torch, torchvision, torch.distributed as dist
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from sklearn.datasets import load_digits
from torch import nn

from spectral_curation.features.weights import load_weights, pretrained, read_weights
from spectral_curation.features.fingerprint import dataset_fingerprint
from spectral_curation.features import store
from spectral_curation.features.store import save_features
from spectral_curation.features.shards import evenly_spread
from spectral_curation.features.model import Reference
from spectral_curation.features.extract import feature_batches, frozen_loader
from spectral_curation.features.reference import reference_features

n, bs = 160, 16

class Counted(list):
    "A data set that knows which samples were read in this process."
    def __init__(self, items): super().__init__(items); self.read = []
    def __getitem__(self, i): self.read.append(i); return super().__getitem__(i)

def digits_dls(num_workers=0, scale=16, change=lambda images: images):
    images = change(torch.tensor(load_digits().images[:n]/scale).float()[:, None].expand(-1, 3, -1, -1))
    items = Counted((x, 0) for x in images)
    train, valid = DataLoader(items, bs=bs, shuffle=True, num_workers=num_workers), DataLoader(list(items)[:bs], bs=bs)
    return DataLoaders(train, valid)

class Net(nn.Module):
    "A small model with all that evaluation mode changes; `hook` is called before each batch."
    def __init__(self, hook=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(.5))
        self.hook = hook
    def forward(self, x):
        if self.hook: self.hook()
        return self.layers(x)

def features_of(cache, hook=None, shard=1024, bs=bs, dtype='float32', **kwargs):
    options, dls = dict(bs=bs, dtype=dtype, progress=False, shard=shard), digits_dls(**kwargs)
    return reference_features(dls, Net(hook), cache=cache, **options)

def features_and_reads(cache, hook=None, **kwargs):
    "Features in shards of two batches, and which samples were read; those that are looked at again come first."
    dls = digits_dls(**kwargs)
    features = reference_features(dls, Net(hook), cache=cache, bs=bs, progress=False, shard=2*bs)
    return features, dls.train.dataset.read

def files(folder):
    "What lies in a cache, but for locks, which stay behind."
    return sorted(f for f in folder.iterdir() if f.suffix != '.lock')

@pytest.fixture(scope='module')
def expect(): return features_of(False)

class Bomb:
    "Unpickling this creates a file."
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')

# Weights files

def test_safetensors_file_of_every_type(tmp_path):
    safetensors = pytest.importorskip('safetensors.torch')
    floats = {str(t): torch.randn(3, 4).to(t) for t in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
    ints = {str(t): torch.arange(-3, 7).to(t) for t in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)}
    odd = dict(bool=torch.tensor([[True, False]]), scalar=torch.tensor(2.5), empty=torch.empty(0, 3),
               none=torch.empty(2, 0, dtype=torch.int8))
    safetensors.save_file(floats | ints | odd, path := tmp_path/'all.safetensors', metadata=dict(format='pt'))
    ours, theirs = read_weights(path), safetensors.load_file(path)
    assert ours.keys() == theirs.keys()
    for k, t in theirs.items():
        assert ours[k].dtype == t.dtype and ours[k].shape == t.shape and torch.equal(ours[k], t), k

def safetensors_file(path, body=bytes(16), **entries):
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack('<Q', len(header)) + header + body)
    return path

def test_safetensors_entries_that_share_bytes_are_refused(tmp_path):
    w = dict(dtype='F32', shape=[4], data_offsets=[0, 16])
    path = safetensors_file(tmp_path/'a.safetensors', a=w, b=dict(dtype='F32', shape=[2], data_offsets=[4, 12]))
    with pytest.raises(ValueError, match='not a complete safetensors file.*copy or download it'): read_weights(path)

@pytest.mark.parametrize('dtype', ['F13', 'F6_E2M3'])     # unknown to safetensors, unknown to PyTorch
def test_safetensors_data_type_that_can_not_be_read(tmp_path, dtype):
    shape, stop = ([4], 16) if dtype == 'F13' else ([16], 12)
    w = dict(dtype=dtype, shape=shape, data_offsets=[0, stop])
    path = safetensors_file(tmp_path/'a.safetensors', bytes(stop), w=w)
    with pytest.raises(ValueError, match='holds a data type that can not be read'): read_weights(path)

def test_weights_that_were_read_do_not_follow_the_file(tmp_path):
    "The library maps the file."
    w = dict(dtype='F32', shape=[4], data_offsets=[0, 16])
    path = safetensors_file(tmp_path/'a.safetensors', struct.pack('<4f', 1, 2, 3, 4), w=w)
    w = read_weights(path)['w']
    with open(path, 'r+b') as f: f.truncate(len(path.read_bytes())-16); f.seek(0, 2); f.write(bytes(16))
    assert w.tolist() == [1, 2, 3, 4] and read_weights(path)['w'].tolist() == [0]*4

@pytest.mark.parametrize('entry', [
    dict(data_offsets=[0, 20], shape=[5]),              # past the end
    dict(data_offsets=[16, 32]), dict(data_offsets=[2**62, 2**62+16]),
    dict(data_offsets=[-16, 0]), dict(data_offsets=[-32, -16]), dict(data_offsets=[16, 0]),
    dict(shape=[3]), dict(shape=[2, 3]), dict(shape=[2**40]), dict(shape=[-4]), dict(shape=[]),
    dict(shape=[-2, -2]), dict(shape=[-1, -4]),
    dict(shape=[-1, 0], data_offsets=[0, 0]), dict(shape=[2**70, 0], data_offsets=[0, 0]),
    dict(shape=4), dict(shape=['4']), dict(shape=[4.]), dict(dtype=None), dict(dtype=['F32']),
    dict(data_offsets=[0]), dict(data_offsets=[0, 8, 16]), dict(data_offsets='0:16'), dict(data_offsets=[0., 16.]),
    dict(data_offsets=None),
], ids=lambda e: ','.join(f'{k}={v}' for k, v in e.items()))
def test_safetensors_header_that_lies(tmp_path, entry):
    path = safetensors_file(tmp_path/'lies.safetensors', w=dict(dtype='F32', shape=[4], data_offsets=[0, 16]) | entry)
    with pytest.raises(ValueError, match='not a complete safetensors file'): read_weights(path)

@pytest.mark.parametrize('data', [
    b'', b'\1', struct.pack('<Q', 2**63) + b'{}',
    struct.pack('<Q', 2) + b'[]', struct.pack('<Q', 4) + b'null', struct.pack('<Q', 7) + b'{"w":1}',
    struct.pack('<Q', 2) + b'\xff\xfe',
])
def test_file_that_is_no_safetensors(tmp_path, data):
    (path := tmp_path/'no.safetensors').write_bytes(data)
    with pytest.raises(ValueError, match='not a complete safetensors file'): read_weights(path)

@pytest.mark.parametrize('state', [lambda bomb: bomb, lambda bomb: {'w': torch.ones(2), 'bomb': bomb}])
def test_pickled_code_is_refused_and_not_run(tmp_path, state):
    torch.save(state(Bomb(tmp_path/'boom')), path := tmp_path/'evil.pth')
    with pytest.raises(ValueError, match='save one with torch.save'): read_weights(path)
    assert not (tmp_path/'boom').exists()
    torch.load(path, weights_only=False)    # it would have run
    assert (tmp_path/'boom').exists()

# The cache, when a process dies or is not alone

def killed(cache, when):
    "Runs in another process, which ends itself in the middle of its work."
    def die(): os.kill(os.getpid(), signal.SIGKILL)
    calls = iter(range(99))
    if when == 'reading': features_and_reads(cache, lambda: next(calls) == 5 and die())
    replace, fatal = os.replace, ['shard npy', 'shard json', 'npy', 'json'].index(when)
    store.os.replace = lambda *args: die() if next(calls) == fatal else replace(*args)
    features_of(cache)

@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='needs SIGKILL')
@pytest.mark.parametrize('when', ['reading', 'shard npy', 'shard json', 'npy', 'json'])
def test_cache_survives_a_kill(tmp_path, expect, capsys, when):
    p = multiprocessing.get_context('spawn').Process(target=killed, args=(tmp_path, when))
    p.start(); p.join()
    assert p.exitcode == -signal.SIGKILL
    assert any(tmp_path.rglob('*.tmp'))     # it was at work, and held the lock
    assert any(tmp_path.glob('*.lock'))
    assert not any(tmp_path.glob('*.json')) and len([*tmp_path.glob('*.npy')]) == (when == 'json')
    assert len([*tmp_path.rglob('*.shards/*.json')]) == {'reading': 2, 'npy': 1, 'json': 1}.get(when, 0)
    if when == 'reading':
        features, read = features_and_reads(tmp_path)
        looked_at = evenly_spread(4*bs)
        assert read == looked_at + [*range(4*bs, n)]    # 16 of the finished shards' samples
        assert 'resumed, 2 of 5 shards are done' in capsys.readouterr().out
        np.testing.assert_array_equal(features, expect)
    for _ in range(2): np.testing.assert_array_equal(features_of(tmp_path), expect)
    assert 'waits for' not in capsys.readouterr().out
    assert len([*tmp_path.glob('*.npy')]) == len([*tmp_path.glob('*.json')]) == 1 and not any(tmp_path.glob('*.shards'))

def share(*given): global started, go; started, go = given

def first(cache):
    "Runs in a process: stops in the first batch until the other waits."
    def stop(): started.set(); go.wait(60)
    features, read = features_and_reads(cache, stop)
    return os.getpid(), np.array(features), read

def second(cache):
    "Runs in another process, which wants the same."
    class Out(io.StringIO):
        def write(self, text):
            if 'waits for' in text: go.set()
            return super().write(text)
    assert started.wait(60)
    with contextlib.redirect_stdout(Out()) as out: features, read = features_and_reads(cache)
    return out.getvalue(), np.array(features), read

def test_second_process_waits_and_takes_what_the_first_has_made(tmp_path, expect):
    ctx = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(2, ctx, share, (ctx.Event(), ctx.Event())) as pool:
        futures = [pool.submit(f, tmp_path) for f in (first, second)]
        (pid, of_first, read_by_first), (text, of_second, read_by_second) = [f.result(120) for f in futures]
    for features in (of_first, of_second): np.testing.assert_array_equal(features, expect)
    assert read_by_first == [*range(n)] and read_by_second == evenly_spread(n)
    npy = next(tmp_path.glob('*.npy'))
    assert f'waits for {npy.name}: process {pid} on ' in text and text.count('\n') == 1
    assert len(files(tmp_path)) == 2

def as_nobody(folder):
    "Runs in a process that may not write; a user's right, if it is not root already."
    if os.geteuid() == 0: os.setuid(65534)
    return np.array(features_of(folder))

def others_may_read(*places):
    "May other users read these folders and those around them?"
    folders = [p for place in map(Path, places) for p in (place, *place.parents)]
    return all(p.stat().st_mode & 0o005 == 0o005 for p in folders)

@pytest.mark.skipif(not hasattr(os, 'setuid'), reason='needs users')
@pytest.mark.skipif(not others_may_read(Path(__file__).resolve().parent, Path(np.__file__).parent),
                    reason='another user can not read the code here')
def test_read_only_folder(expect):
    ctx = multiprocessing.get_context('spawn')
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, ctx) as pool:
        (cache := Path(folder)/'cache').mkdir()
        os.chmod(folder, 0o755); cache.chmod(0o555)
        with pytest.raises(PermissionError, match='is read-only; give another folder'):
            pool.submit(as_nobody, cache).result(60)
        cache.chmod(0o755)
        features_of(cache)
        cache.chmod(0o555)
        np.testing.assert_array_equal(pool.submit(as_nobody, cache).result(60), expect)
        cache.chmod(0o755)

def test_another_writer_with_other_rounding_comes_between(tmp_path, monkeypatch):
    # another batch size or thread count changes the last bits; the other's file takes the place of ours before our
    # description is written: someone who does not ask for the lock
    x, replace = np.random.default_rng(0).random((8, 2), dtype='float32'), os.replace
    def replace_then_other(*args):
        replace(*args); monkeypatch.setattr(store.os, 'replace', replace)
        save_features(tmp_path/'f.npy', iter([np.nextafter(x, 2)]), 8, {})
    monkeypatch.setattr(store.os, 'replace', replace_then_other)
    np.testing.assert_allclose(save_features(tmp_path/'f.npy', iter([x]), 8, {}), x, rtol=1e-6)

# Shards, when they are not what they were

def stopped(cache, **kwargs):
    "Two shards and a half, and then an error; the folder of shards."
    calls = iter(range(99))
    def fail():
        if next(calls) == 5: raise RuntimeError('stop')
    with pytest.raises(RuntimeError, match='stop'): features_and_reads(cache, fail, **kwargs)
    return next(cache.glob('*.shards'))

def test_missing_file_of_the_data_set_is_no_race(tmp_path):
    def fail(): raise FileNotFoundError('image.png')
    with pytest.raises(FileNotFoundError, match='image.png'): features_of(tmp_path, fail)

def test_shards_of_other_images_are_not_used(tmp_path, capsys):
    folder = stopped(tmp_path)
    (folder/'0000000-0000032.npy.1-ab.tmp').write_bytes(b'half')
    features, read = features_and_reads(tmp_path, scale=32)
    assert read == evenly_spread(4*bs) + [*range(n)]
    assert '2 of 5 shards are extracted again: the model gives other features' in capsys.readouterr().out
    np.testing.assert_array_equal(features, features_and_reads(False, scale=32)[0])
    assert not folder.exists()

def test_shard_size_may_change_between_runs(tmp_path, expect):
    stopped(tmp_path)
    np.testing.assert_array_equal(features_of(tmp_path, shard=3), expect)
    assert len(files(tmp_path)) == 2

def test_shards_hold_whole_batches(tmp_path, expect):
    sizes = []
    model = Net(); model.register_forward_pre_hook(lambda m, x: sizes.append(len(x[0])))
    features = reference_features(digits_dls(), model, cache=tmp_path, bs=48, progress=False, shard=50)
    assert sizes == [48, 48, 48, 16]
    np.testing.assert_allclose(features, expect, atol=1e-6)

def test_nan_is_named_by_its_place_in_the_data_set():
    images = digits_dls(); images.train.dataset[70][0][0, 0, 0] = float('nan')
    with pytest.raises(ValueError, match='sample 70 of the training set'):
        list(feature_batches(images, Reference(Net()), bs, idxs=[*range(64, n)], progress=False))

# The cache, when its files are not what they were

def cut(npy, js): npy.write_bytes(npy.read_bytes()[:-7])
def empty(npy, js): npy.write_bytes(b'')
def flip(npy, js): data = bytearray(npy.read_bytes()); data[-9] ^= 1; npy.write_bytes(data)
def gone(npy, js): js.unlink()
def no_shape(npy, js): js.write_text(json.dumps({k: v for k, v in json.loads(js.read_text()).items() if k != 'shape'}))
def no_object(npy, js): js.write_text('[1]')
def null_checksum(npy, js): js.write_text(json.dumps(json.loads(js.read_text()) | dict(checksum=None)))

@pytest.mark.parametrize('damage', [cut, empty, flip, gone, no_object, null_checksum, no_shape])
def test_damage_is_repaired_and_named(tmp_path, expect, capsys, damage):
    features_of(tmp_path)
    damage(npy := next(tmp_path.glob('*.npy')), npy.with_suffix('.json'))
    np.testing.assert_array_equal(features_of(tmp_path), expect)
    assert f'{npy.name} is rebuilt: ' in capsys.readouterr().out
    features_of(tmp_path)
    assert not capsys.readouterr().out

@pytest.mark.parametrize('damage', [cut, empty, flip, gone, no_object, null_checksum, no_shape])
def test_damaged_shard_is_made_again(tmp_path, expect, capsys, damage):
    npy = stopped(tmp_path)/'0000032-0000064.npy'
    damage(npy, npy.with_suffix('.json'))
    features, read = features_and_reads(tmp_path)
    assert read == evenly_spread(2*bs) + [*range(2*bs, n)]
    assert '1 of 5 shards are extracted again: ' in capsys.readouterr().out
    np.testing.assert_array_equal(features, expect)

def test_description_of_another_file(tmp_path, expect, capsys):
    features_of(tmp_path); npy = next(tmp_path.glob('Net-*.npy'))
    reference_features(digits_dls(), 'pixels', cache=tmp_path, progress=False)
    other = next(tmp_path.glob('pixels-*.npy'))
    shutil.copy(other.with_suffix('.json'), npy.with_suffix('.json'))
    np.testing.assert_array_equal(features_of(tmp_path), expect)
    for end in ('.npy', '.json'): shutil.copy(other.with_suffix(end), npy.with_suffix(end))     # a pair that fits
    np.testing.assert_array_equal(features_of(tmp_path), expect)
    assert capsys.readouterr().out.count("is rebuilt: made for reference 'pixels', wanted 'Net'") == 2

def test_read_only_files_are_read_and_replaced(tmp_path, expect):
    features_of(tmp_path)
    for f in tmp_path.iterdir(): f.chmod(0o444)
    features = features_of(tmp_path)
    np.testing.assert_array_equal(features, expect)
    with pytest.raises(ValueError, match='read-only'): features[0] = 0
    (js := next(tmp_path.glob('*.json'))).chmod(0o644); js.write_text('{}')
    np.testing.assert_array_equal(features_of(tmp_path), expect)

def pickled_in_place(folder):
    "A pickled object array in place of the features, with a description that vouches for it."
    features_of(folder); npy = next(folder.glob('*.npy'))
    np.save(npy, np.array([[Bomb(folder/'boom')]], dtype=object), allow_pickle=True)
    side = json.loads(npy.with_suffix('.json').read_text())
    npy.with_suffix('.json').write_text(json.dumps(side | dict(checksum=store.sha256(npy), shape=[1, 1])))
    return npy

def test_pickle_in_the_cache_is_never_run(tmp_path):
    shutil.copy(pickled_in_place(tmp_path), given := tmp_path/'given.npy')
    with suppress(ValueError): features_of(tmp_path)    # refused; the next test asks for more
    with pytest.raises(ValueError): reference_features(digits_dls(), given)
    assert not (tmp_path/'boom').exists()
    np.load(given, allow_pickle=True)   # it would have run
    assert (tmp_path/'boom').exists()

def test_pickle_in_the_cache_is_replaced(tmp_path, expect):
    pickled_in_place(tmp_path)
    np.testing.assert_array_equal(features_of(tmp_path), expect)

def test_loader_that_gives_too_little_or_too_much(tmp_path):
    for rows in (3, 5):
        with pytest.raises(ValueError): save_features(tmp_path/'f.npy', iter([np.ones((rows, 2))]), 4, {})
        assert not any(tmp_path.iterdir())

# Stale features

def mirrored(images): return images.flip(-1)
def one_changed(images): images = images.clone(); images[evenly_spread(n)[5]] += .2; return images
def darker(images): return images*.97
def other_order(images): return images.flip(0)

@pytest.mark.parametrize('change', [mirrored, one_changed, darker, other_order])
def test_images_changed_in_place_are_noticed(tmp_path, expect, capsys, change):
    features_of(tmp_path)
    features = features_of(tmp_path, change=change)
    np.testing.assert_array_equal(features, features_of(False, change=change))
    assert not np.allclose(features, expect)
    assert 'is rebuilt: the model gives other features for 16 of its samples' in capsys.readouterr().out

def test_a_valid_cache_costs_one_forward_pass_over_16_samples(tmp_path):
    features_of(tmp_path)
    sizes = []
    model = Net(); model.register_forward_pre_hook(lambda m, x: sizes.append(len(x[0])))
    reference_features(digits_dls(), model, cache=tmp_path, progress=False)
    assert sizes == [16]

@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_rounding_is_not_taken_for_a_change(tmp_path, capsys, dtype):
    features_of(tmp_path, dtype=dtype)
    stamp = next(tmp_path.glob('*.npy')).stat().st_mtime_ns
    threads = torch.get_num_threads()
    try:
        for torch_threads in (1, 2):
            torch.set_num_threads(torch_threads)
            for size in (3, 64): features_of(tmp_path, dtype=dtype, bs=size)
    finally: torch.set_num_threads(threads)
    assert not capsys.readouterr().out and next(tmp_path.glob('*.npy')).stat().st_mtime_ns == stamp

class Signed(nn.Module):
    "By what it computes, not by repr or weights, two of these differ."
    def forward(self, x): return x.flatten(1)

def test_modules_of_equal_repr_and_weights_do_not_share_a_cache(tmp_path):
    other = type('Signed', (Signed,), dict(forward=lambda self, x: -x.flatten(1)))
    assert repr(other()) == repr(Signed())
    plain, negative = (reference_features(digits_dls(), m, cache=tmp_path, progress=False) for m in (Signed(), other()))
    np.testing.assert_array_equal(negative, -plain)
    assert len([*tmp_path.glob('*.npy')]) == 2
    np.testing.assert_array_equal(reference_features(digits_dls(), Signed(), cache=tmp_path, progress=False), plain)

def test_a_module_that_computes_otherwise_by_what_no_hash_sees(tmp_path, capsys):
    module = Signed(); module.forward = lambda x: x.flatten(1)*sign
    sign = 1; plain = np.array(reference_features(digits_dls(), module, cache=tmp_path, progress=False))
    sign = -1; negative = reference_features(digits_dls(), module, cache=tmp_path, progress=False)
    np.testing.assert_array_equal(negative, -plain)
    assert 'the images or the model have changed' in capsys.readouterr().out

# What can be given

def learner(cb):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    learn = Learner(digits_dls(), net, loss_func=CrossEntropyLossFlat(), cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn

def test_lists_as_features():
    from spectral_curation.train.by_index import SALN
    given = torch.rand(n, 4).tolist()
    assert reference_features(digits_dls(), given).tolist() == given
    assert learner(SALN(.5, features=given)).recorder.values
    with pytest.raises(ValueError, match='rows of equal length'): reference_features(digits_dls(), [[1.], [1., 2.]])

class Stream(torch.utils.data.IterableDataset):
    def __iter__(self): return iter((x, 0) for x in torch.rand(20, 3, 8, 8))

@pytest.mark.parametrize('use', [
    lambda dls: reference_features(dls, 'pixels'), lambda dls: reference_features(dls, np.ones((20, 2))),
    lambda dls: frozen_loader(dls).__enter__(), lambda dls: list(feature_batches(dls, Reference('pixels'))),
    lambda dls: dataset_fingerprint(dls.train.dataset),
], ids=['reference_features', 'given features', 'frozen_loader', 'feature_batches', 'dataset_fingerprint'])
def test_iterable_data_set(use):
    dls = DataLoaders(DataLoader(Stream(), bs=4), DataLoader(Stream(), bs=4))
    words = r'Stream can only be iterated: it needs __len__ and __getitem__.*list\(dataset\)'
    with pytest.raises(TypeError, match=words): use(dls)

def test_empty_training_set():
    dls = DataLoaders(DataLoader([], bs=4), DataLoader([], bs=4))
    with pytest.raises(ValueError, match='at least 1; got 0'): reference_features(dls, 'pixels')

# Several ranks

@pytest.fixture(scope='module')
def pair():
    "Run a function in two processes that form a group; what it returned or raised on each."
    with ProcessPoolExecutor(2, multiprocessing.get_context('spawn')) as pool:
        def run(f, folder, *args):
            futures = [pool.submit(in_group, rank, f, folder, *args) for rank in range(2)]
            return [o.exception(120) or o.result() for o in futures]
        yield run

def in_group(rank, f, folder, *args):
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    try: return f(rank, folder, *args)
    finally: dist.destroy_process_group()

def shared_out(rank, folder, who_fails=None):
    calls = iter(range(99))
    def fail():
        if rank == who_fails and next(calls) == 3: raise RuntimeError('out of memory')
    features, read = features_and_reads(folder/'cache', fail)
    return isinstance(features, np.memmap), np.array(features), read

def test_ranks_share_the_work(tmp_path, pair, expect):
    got = pair(shared_out, tmp_path)
    for mapped, features, _ in got:
        assert mapped
        np.testing.assert_array_equal(features, expect)
    reads = [read for *_, read in got]
    assert reads[1] == [*range(2*bs, 4*bs), *range(6*bs, 8*bs)] and sorted(sum(reads, [])) == [*range(n)]
    assert len(files(tmp_path/'cache')) == 2

@pytest.mark.parametrize('bad', [0, 1])
def test_error_on_one_rank_is_an_error_on_all(tmp_path, pair, expect, bad):
    got = pair(shared_out, tmp_path, bad)
    assert str(got[bad]) == 'out of memory' and f'rank {bad} failed with RuntimeError: out of memory' in str(got[1-bad])
    (tmp_path/'again').mkdir(); shutil.move(tmp_path/'cache', tmp_path/'again'/'cache')
    got = pair(shared_out, tmp_path/'again')    # the failed rank had finished one shard
    for _, features, _ in got: np.testing.assert_array_equal(features, expect)
    done = {0: 3, 1: 4}[bad]     # of five: the other rank's, and one
    assert len(sum((read for *_, read in got), [])) == 16 + n - 2*bs*done       # rank 0 looks at 16 again

def apart(rank, folder): return features_and_reads(folder/f'{rank}')
def test_ranks_without_a_common_folder(tmp_path, pair):
    for e in pair(apart, tmp_path):
        assert isinstance(e, (FileNotFoundError, RuntimeError)) and 'the ranks must share the folder' in str(e)

def own_data(rank, folder):
    dls = digits_dls()
    if rank: dls.train.dataset.append(dls.train.dataset[0]); dls.train.n += 1
    return len(reference_features(dls, Net(), cache=folder/'cache', bs=bs, progress=False))
def test_ranks_with_data_of_their_own_work_alone(tmp_path, pair): assert pair(own_data, tmp_path) == [n, n+1]

def test_distributed_loader_is_read_whole(expect):
    pytest.importorskip('accelerate', reason='fastai.distributed needs accelerate')
    from fastai.distributed import DistributedDL
    dls = digits_dls()
    dls.loaders[0] = DistributedDL(TfmdDL(dls.train.dataset, bs=bs, shuffle=True, num_workers=0), rank=1, world_size=2)
    np.testing.assert_array_equal(reference_features(dls, Net(), cache=False, bs=bs, progress=False), expect)

def in_memory(rank, folder): return np.array(features_and_reads(False)[0])
def test_ranks_without_a_cache_each_do_all(tmp_path, pair, expect):
    for features in pair(in_memory, tmp_path): np.testing.assert_array_equal(features, expect)

# Any model

def test_model_is_evaluated_and_left_as_it_was(expect):
    model = Net(lambda: modes.append([m.training for m in model.modules()]))
    model.layers[1].eval()      # a user's frozen BatchNorm in a model that trains
    modes, flags = [], [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    features = reference_features(digits_dls(), model, cache=False, bs=bs, progress=False)
    np.testing.assert_array_equal(features, expect)
    assert len(modes) == n//bs and not np.any(modes)
    assert [m.training for m in model.modules()] == flags and len(set(flags)) == 2
    for k, v in model.state_dict().items(): assert torch.equal(v, state[k]), k
    # evaluation of that very model, by hand
    x = torch.stack([x for x, _ in digits_dls().train.dataset])
    with torch.no_grad(): np.testing.assert_allclose(features, model.eval().layers(x).mean((2, 3)), atol=1e-6)

def test_flags_are_restored_after_an_error():
    def fail(): raise RuntimeError('in the model')
    model = Net(fail)
    with pytest.raises(RuntimeError, match='in the model'):
        reference_features(digits_dls(), model, cache=False, progress=False)
    assert all(m.training for m in model.modules())

def test_worker_processes_change_nothing(expect):
    np.testing.assert_array_equal(features_of(False, num_workers=2), expect)

# Real weights

def weights_file(data_dir, name):
    if not (path := data_dir/name).exists(): pytest.skip(f'{name} is not among the data')
    return path

def test_densenet_features(data_dir):
    ref = Reference(weights_file(data_dir, 'densenet169_features_fp16.safetensors'), size=32)
    images, digit = torch.stack([x for x, _ in digits_dls().train.dataset]), load_digits().target[:n]
    with ref.frozen(torch.device('cpu')): f = ref(images)
    assert ref.name == 'densenet169' and f.shape == (n, 1664) and f.isfinite().all() and (f >= 0).all()
    # the nearest other digit is mostly the same digit (by chance: one in ten)
    f = nn.functional.normalize(f - f.mean(0))
    assert (digit[(f @ f.T).fill_diagonal_(-1).argmax(1)] == digit).mean() > .7

def test_resnet_body_for_ten_classes(data_dir):
    path = weights_file(data_dir, 'resnet18_mixed_fp16.safetensors')
    model = torchvision.models.resnet18(num_classes=10)
    head = model.fc.weight.clone()
    state, loaded = read_weights(path), load_weights(model, path).state_dict()
    assert state.keys() | {'fc.weight', 'fc.bias'} == loaded.keys()
    for k, v in state.items(): assert torch.equal(loaded[k], v.to(loaded[k].dtype)), k
    assert torch.equal(model.fc.weight, head)

def test_weights_of_another_architecture(data_dir):
    path = weights_file(data_dir, 'resnet18_mixed_fp16.safetensors')
    model = torchvision.models.densenet121()
    before = model.features.conv0.weight.clone()
    with pytest.raises(ValueError, match='another architecture'): load_weights(model, path)
    assert torch.equal(model.features.conv0.weight, before)

# Without a network

@pytest.fixture
def offline(tmp_path, monkeypatch):
    "No network, and torch's own folder empty."
    def refuse(*args, **kwargs): raise urllib.error.URLError('no network')
    monkeypatch.setattr(urllib.request.OpenerDirector, 'open', refuse)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    return tmp_path/'hub'/'checkpoints'/'resnet18-f37072fd.pth'

def test_offline_error_names_the_file_and_its_place(offline):
    with pytest.raises(FileNotFoundError) as e: pretrained('resnet18')
    assert f'put that file at {offline}' in str(e.value) and 'no network' in str(e.value)

def test_offline_with_the_file_in_its_place(offline):
    offline.parent.mkdir(parents=True)
    torch.save(state := torchvision.models.resnet18().state_dict(), offline)
    for k, v in pretrained('resnet18').state_dict().items(): assert torch.equal(v, state[k]), k
