"Weights files, cached features and frozen models where things go wrong: damage, malice, crashes, races, no network."
import json, multiprocessing, os, shutil, signal, struct, urllib.error, urllib.request
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import timedelta

import numpy as np, pytest, torch, torchvision, torch.distributed as dist
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.load import DataLoader
from sklearn.datasets import load_digits
from torch import nn

from spectral_curation.features.reference import Reference, feature_batches, reference_features
from spectral_curation.features.store import save_features
from spectral_curation.features.weights import load_weights, pretrained, read_weights
from spectral_curation.features import store

n, bs = 160, 16

class Counted(list):
    "A data set that knows which samples were read in this process."
    def __init__(self, items): super().__init__(items); self.read = []
    def __getitem__(self, i): self.read.append(i); return super().__getitem__(i)

def digits_dls(num_workers=0, scale=16):
    images = torch.tensor(load_digits().images[:n]/scale).float()[:, None].expand(-1, 3, -1, -1)
    items = Counted((x, 0) for x in images)
    return DataLoaders(DataLoader(items, bs=bs, shuffle=True, num_workers=num_workers), DataLoader(list(items)[:bs], bs=bs))

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

def features_of(cache, hook=None, shard=1024, **kwargs): return reference_features(digits_dls(**kwargs), Net(hook), cache=cache, bs=bs, progress=False, shard=shard)

def features_and_reads(cache, hook=None, **kwargs):
    "Features in shards of two batches, and which samples were read for them; the probe's come first."
    features = reference_features(dls := digits_dls(**kwargs), Net(hook), cache=cache, bs=bs, progress=False, shard=2*bs)
    return features, dls.train.dataset.read[16:]

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
    odd = dict(bool=torch.tensor([[True, False]]), scalar=torch.tensor(2.5), empty=torch.empty(0, 3), none=torch.empty(2, 0, dtype=torch.int8))
    safetensors.save_file(floats | ints | odd, path := tmp_path/'all.safetensors', metadata=dict(format='pt'))
    ours, theirs = read_weights(path), safetensors.load_file(path)
    assert ours.keys() == theirs.keys()
    for k in theirs: assert ours[k].dtype == theirs[k].dtype and ours[k].shape == theirs[k].shape and torch.equal(ours[k], theirs[k]), k

def safetensors_file(path, body=bytes(16), **entries):
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack('<Q', len(header)) + header + body)
    return path

def test_safetensors_entries_may_share_bytes(tmp_path):
    path = safetensors_file(tmp_path/'a.safetensors', struct.pack('<4f', 1, 2, 3, 4), a=dict(dtype='F32', shape=[4], data_offsets=[0, 16]), b=dict(dtype='F32', shape=[2], data_offsets=[4, 12]))
    state = read_weights(path)
    assert state['a'].tolist() == [1, 2, 3, 4] and state['b'].tolist() == [2, 3]
    state['b'].zero_()
    assert state['a'].tolist() == [1, 2, 3, 4]  # no memory is shared

@pytest.mark.parametrize('entry', [
    dict(data_offsets=[0, 20], shape=[5]),              # past the end
    dict(data_offsets=[16, 32]), dict(data_offsets=[2**62, 2**62+16]),
    dict(data_offsets=[-16, 0]), dict(data_offsets=[-32, -16]), dict(data_offsets=[16, 0]),
    dict(shape=[3]), dict(shape=[2, 3]), dict(shape=[2**40]), dict(shape=[-4]), dict(shape=[]),
    dict(shape=[-2, -2]), dict(shape=[-1, -4]),
    dict(shape=[-1, 0], data_offsets=[0, 0]), dict(shape=[2**70, 0], data_offsets=[0, 0]),
    dict(shape=4), dict(shape=['4']), dict(shape=[4.]), dict(dtype='F13'), dict(dtype=None), dict(dtype=['F32']),
    dict(data_offsets=[0]), dict(data_offsets=[0, 8, 16]), dict(data_offsets='0:16'), dict(data_offsets=[0., 16.]), dict(data_offsets=None),
], ids=lambda e: ','.join(f'{k}={v}' for k, v in e.items()))
def test_safetensors_header_that_lies(tmp_path, entry):
    path = safetensors_file(tmp_path/'lies.safetensors', w=dict(dtype='F32', shape=[4], data_offsets=[0, 16]) | entry)
    with pytest.raises(ValueError, match='not a complete safetensors file'): read_weights(path)

@pytest.mark.parametrize('data', [
    b'', b'\1', struct.pack('<Q', 2**63) + b'{}',
    struct.pack('<Q', 2) + b'[]', struct.pack('<Q', 4) + b'null', struct.pack('<Q', 7) + b'{"w":1}', struct.pack('<Q', 2) + b'\xff\xfe',
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
    replace = os.replace
    store.os.replace = lambda *args: die() if next(calls) == ['shard npy', 'shard json', 'npy', 'json'].index(when) else replace(*args)
    features_of(cache)

@pytest.mark.skipif(not hasattr(signal, 'SIGKILL'), reason='needs SIGKILL')
@pytest.mark.parametrize('when', ['reading', 'shard npy', 'shard json', 'npy', 'json'])
def test_cache_survives_a_kill(tmp_path, expect, capsys, when):
    p = multiprocessing.get_context('spawn').Process(target=killed, args=(tmp_path, when))
    p.start(); p.join()
    assert p.exitcode == -signal.SIGKILL
    assert any(tmp_path.rglob('*.tmp'))     # it was at work
    assert not any(tmp_path.glob('*.json')) and len([*tmp_path.glob('*.npy')]) == (when == 'json')
    assert len([*tmp_path.rglob('*.parts/*.json')]) == {'reading': 2, 'npy': 1, 'json': 1}.get(when, 0)
    if when == 'reading':
        features, read = features_and_reads(tmp_path)
        assert read == [*range(4*bs, n)]    # nothing of the finished shards
        assert 'going on, 2 of 5 already there' in capsys.readouterr().out
        np.testing.assert_array_equal(features, expect)
    for _ in range(2): np.testing.assert_array_equal(features_of(tmp_path), expect)
    assert len([*tmp_path.glob('*.npy')]) == len([*tmp_path.glob('*.json')]) == 1 and not any(tmp_path.glob('*.parts'))

def share(b): global barrier; barrier = b
def at_once(cache):
    "Runs in two processes, which read the last batch and then write at the same time."
    calls = iter(range(99))
    return np.array(features_of(cache, lambda: next(calls) == n//bs-1 and barrier.wait(60)))

def test_two_processes_write_at_once(tmp_path, expect):
    ctx = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(2, ctx, share, (ctx.Barrier(2),)) as pool:
        for f in [pool.submit(at_once, tmp_path) for _ in range(2)]: np.testing.assert_array_equal(f.result(), expect)
    assert len([*tmp_path.iterdir()]) == 2
    np.testing.assert_array_equal(features_of(tmp_path), expect)

def test_another_writer_with_other_rounding_comes_between(tmp_path, monkeypatch):
    # another batch size or thread count changes the last bits; the other's file takes the place of ours before our description is written
    x, replace = np.random.default_rng(0).random((8, 2), dtype='float32'), os.replace
    def replace_then_other(*args):
        replace(*args); monkeypatch.setattr(store.os, 'replace', replace)
        save_features(tmp_path/'f.npy', iter([np.nextafter(x, 2)]), 8, {})
    monkeypatch.setattr(store.os, 'replace', replace_then_other)
    np.testing.assert_allclose(save_features(tmp_path/'f.npy', iter([x]), 8, {}), x, rtol=1e-6)

def test_another_process_is_done_first(tmp_path, expect):
    # it takes the folder of shards away while we write one
    calls = iter(range(99))
    features, _ = features_and_reads(tmp_path, lambda: next(calls) == 5 and features_and_reads(tmp_path))
    np.testing.assert_array_equal(features, expect)
    assert len([*tmp_path.iterdir()]) == 2

# Shards, when they are not what they were

def stopped(cache, **kwargs):
    "Two shards and a half, and then an error; the folder of shards."
    calls = iter(range(99))
    def fail():
        if next(calls) == 5: raise RuntimeError('stop')
    with pytest.raises(RuntimeError, match='stop'): features_and_reads(cache, fail, **kwargs)
    return next(cache.glob('*.parts'))

def test_missing_file_of_the_data_set_is_no_race(tmp_path):
    def fail(): raise FileNotFoundError('image.png')
    with pytest.raises(FileNotFoundError, match='image.png'): features_of(tmp_path, fail)

def test_shards_of_other_images_are_not_used(tmp_path, capsys):
    folder = stopped(tmp_path)
    (folder/'0000000-0000032.npy.1-ab.tmp').write_bytes(b'half')
    features, read = features_and_reads(tmp_path, scale=32)
    assert read == [*range(n)] and '2 made again: the images that the loader gives have changed' in capsys.readouterr().out
    np.testing.assert_array_equal(features, features_and_reads(False, scale=32)[0])
    assert not folder.exists()

def test_shard_size_may_change_between_runs(tmp_path, expect):
    stopped(tmp_path)
    np.testing.assert_array_equal(features_of(tmp_path, shard=3), expect)
    assert len([*tmp_path.iterdir()]) == 2

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
    assert read == [*range(2*bs, n)] and '.parts: 1 made again: ' in capsys.readouterr().out
    np.testing.assert_array_equal(features, expect)

def test_description_of_another_file(tmp_path, expect, capsys):
    features_of(tmp_path); npy = next(tmp_path.glob('Net-*.npy'))
    reference_features(digits_dls(), 'pixels', cache=tmp_path, progress=False); other = next(tmp_path.glob('pixels-*.npy'))
    shutil.copy(other.with_suffix('.json'), npy.with_suffix('.json'))
    np.testing.assert_array_equal(features_of(tmp_path), expect)
    shutil.copy(other, npy); shutil.copy(other.with_suffix('.json'), npy.with_suffix('.json'))     # a pair that fits together
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
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2, timeout=timedelta(seconds=60))
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
    assert len([*(tmp_path/'cache').iterdir()]) == 2

@pytest.mark.parametrize('bad', [0, 1])
def test_error_on_one_rank_is_an_error_on_all(tmp_path, pair, expect, bad):
    got = pair(shared_out, tmp_path, bad)
    assert str(got[bad]) == 'out of memory' and f'rank {bad} failed with RuntimeError: out of memory' in str(got[1-bad])
    (tmp_path/'again').mkdir(); shutil.move(tmp_path/'cache', tmp_path/'again'/'cache')
    got = pair(shared_out, tmp_path/'again')    # the failed rank had finished one shard
    for _, features, _ in got: np.testing.assert_array_equal(features, expect)
    done = {0: 3, 1: 4}[bad]     # of five: the other rank's, and one
    assert len(sum((read for *_, read in got), [])) == n - 2*bs*done

def apart(rank, folder): return features_and_reads(folder/f'{rank}')
def test_ranks_without_a_common_folder(tmp_path, pair):
    for e in pair(apart, tmp_path): assert isinstance(e, (FileNotFoundError, RuntimeError)) and 'the ranks must share the folder' in str(e)

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
    with pytest.raises(RuntimeError, match='in the model'): reference_features(digits_dls(), model := Net(fail), cache=False, progress=False)
    assert all(m.training for m in model.modules())

def test_worker_processes_change_nothing(expect): np.testing.assert_array_equal(features_of(False, num_workers=2), expect)

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
