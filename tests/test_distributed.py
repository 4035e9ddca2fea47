"Training in two real processes that exchange gradients on CPUs (gloo): equal steps, no sample twice, equal weights, the same choices."
import hashlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from itertools import chain

import pytest
import torch
import torch.distributed as dist
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from sklearn.datasets import load_digits
from torch import nn

pytest.importorskip('accelerate', reason='training in several processes needs accelerate: pip install accelerate')
import fastai.distributed  # learn.distrib_ctx

from spectral_curation.callback import GSTDS, JEST, SALN, BatchSelector, RandomSubset, SelectiveBackprop, Selector, TopLoss
from spectral_curation.checkpoint import Checkpoint
from spectral_curation.data import digits_dls
from spectral_curation.epoch import DynamicPruning, InfoBatch, StandardShort, StaticPruning

n, bs, epochs = 301, 16, 3
digits, classes = (torch.tensor(a) for a in load_digits(return_X_y=True))
digits = digits.float()/16

selectors = dict(
    standard=lambda: BatchSelector(0.),
    random=lambda **kw: RandomSubset(.6, **kw),
    random_in_batch=lambda: RandomSubset(.6, before_decode=False),
    saln=lambda **kw: SALN(.8, features=digits[:n], **kw),
    saln_in_batch=lambda: SALN(.8, features=digits[:n], before_decode=False),
    saln_super=lambda: SALN(.8, features=digits[:n], super_batch=True),
    gstds=lambda: GSTDS(features=digits[:n]),
    gstds_super=lambda: GSTDS(features=digits[:n], super_batch=True),
    jest=lambda: JEST(.6, method='hard'),
    top_loss_super=lambda: TopLoss(.6, super_batch=True),
    selective_backprop=lambda: SelectiveBackprop(.6, interrupt=4),
    ucb=lambda **kw: DynamicPruning('ucb', .6, **kw),
    ucb_by_batch=lambda: DynamicPruning('ucb', .6, super_batch=False),
    ucb_in_batch=lambda: DynamicPruning('ucb', .6, before_decode=False),
    epsilon_greedy=lambda: DynamicPruning('epsilon_greedy', .6, every=2),
    infobatch=lambda **kw: InfoBatch(.6, **kw),
    infobatch_by_batch=lambda: InfoBatch(.6, super_batch=False),
    static=lambda: StaticPruning(None, .6),
    short=lambda: StandardShort(.6))

class Kept(Callback):
    order, run_valid = 5, False
    def before_fit(self): self.steps = []
    def before_train(self): self.steps.append([])
    def before_batch(self): self.steps[-1].append(next(cb for cb in self.learn.cbs if isinstance(cb, Selector)).kept_idx.tolist())

def loaders(bs=bs, num_workers=0, drop_last=False, n=n):
    train = [(x, y) for x, y in zip(digits[:n], classes[:n])]
    valid = [(x, y) for x, y in zip(digits[-51:], classes[-51:])]
    return DataLoaders(DataLoader(train, bs=bs, shuffle=True, num_workers=num_workers, drop_last=drop_last), DataLoader(valid, bs=20))

def learner(selector, seed=0, **kw):
    set_seed(seed)
    dls = loaders(**kw)
    return Learner(dls, nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), CrossEntropyLossFlat(), lr=.1, cbs=selector)

def fit(learn, *cbs, epochs=epochs):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=list(cbs))

def weights(learn): return hashlib.sha256(torch.cat([p.detach().flatten() for p in learn.model.state_dict().values()]).numpy().tobytes()).hexdigest()

def train(rank, name, args={}, **kw):
    "What one rank kept, step by step, and where it ended; each rank has another seed."
    learn, kept = learner(selectors[name](**args), rank, **kw), Kept()
    dl, before = learn.dls.train, {k: v for k, v in vars(learn.dls.train).items() if k != 'rng'}
    with learn.distrib_ctx(sync_bn=False, cpu=True): fit(learn, kept)
    assert learn.dls.train is dl and {k: v for k, v in vars(dl).items() if k != 'rng'} == before, 'the loader is not as it was'
    history = next((cb.history.mean.tolist() for cb in learn.cbs if hasattr(type(cb), 'remember') and getattr(cb, 'history', None)), None)
    return dict(kept=kept.steps, weights=weights(learn), history=history, parameters=[p.detach() for p in learn.model.parameters()])

def join(rank, folder):
    torch.set_num_threads(1)
    multiprocessing.set_start_method('fork', force=True)     # worker processes as in a script; a spawned process would spawn them
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', OMP_NUM_THREADS='1', FASTAI_HOME=str(folder))
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2, timeout=timedelta(seconds=40))

@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    "Run a function in two processes that form a group; what it returned or raised on each."
    folder = tmp_path_factory.mktemp('ranks')
    pools = [ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), join, (rank, folder)) for rank in range(2)]
    def run(f, *args, **kw):
        futures = [pool.submit(f, rank, *args, **kw) for rank, pool in enumerate(pools)]
        return [o.exception(120) or o.result() for o in futures]
    yield run
    for pool in pools: pool.shutdown()

def check(got, twice=False):
    for o in got:
        if isinstance(o, Exception): raise o
    first, second = got
    assert first['weights'] == second['weights'] and first['history'] == second['history']
    assert len(first['kept']) == len(second['kept']) == epochs
    for one, other in zip(first['kept'], second['kept']):
        assert one and [len(b) for b in one] == [len(b) for b in other]
        kept = [*chain(*one, *other)]
        assert set(kept) <= {*range(n)} and (twice or len(set(kept)) == len(kept))


@pytest.mark.parametrize('name', selectors)
def test_equal_steps_no_sample_twice_equal_weights(pair, name): check(pair(train, name), twice=name == 'short')


@pytest.mark.parametrize('name', ['random', 'saln', 'jest', 'gstds_super', 'ucb', 'ucb_by_batch', 'infobatch_by_batch', 'short'])
def test_worker_processes_change_nothing(pair, name):
    got, workers = pair(train, name), pair(train, name, num_workers=1)
    check(workers, twice=name == 'short')
    assert [o['kept'] for o in got] == [o['kept'] for o in workers]


@pytest.mark.parametrize('name', ['standard', 'random', 'saln_super', 'gstds', 'ucb', 'ucb_by_batch', 'infobatch', 'short'])
def test_short_last_batch_dropped(pair, name): check(pair(train, name, drop_last=True), twice=name == 'short')
