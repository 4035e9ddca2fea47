"Two real processes that exchange gradients on CPUs (gloo): equal steps, no sample twice, equal weights, one choice."
import hashlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, TimeoutError
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

from spectral_curation.select.agreement import label_agreement
from spectral_curation.train.by_index import GSTDS, RandomSubset, SALN
from spectral_curation.train.by_loss import SelectiveBackprop, TopLoss
from spectral_curation.train.by_reference import JEST
from spectral_curation.train.selector import BatchSelector, Selector
from spectral_curation.train.checkpoint import Checkpoint
from spectral_curation.train.diagnostics import SelectionLog
from spectral_curation.lab.data import digits_dls
from spectral_curation.train.by_agreement import Agreement
from spectral_curation.train.by_epoch import DynamicPruning, InfoBatch, StandardShort, StaticPruning

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
    agreement=lambda **kw: Agreement(features=digits[:n], labels=classes[:n], refresh=(.3,), **kw),
    agreement_super=lambda: Agreement(features=digits[:n], labels=classes[:n], scope='batch', super_batch=True),
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
    def before_batch(self):
        self.steps[-1].append(next(cb for cb in self.learn.cbs if isinstance(cb, Selector)).kept_idx.tolist())

def loaders(bs=bs, num_workers=0, drop_last=False, n=n):
    train = [(x, y) for x, y in zip(digits[:n], classes[:n])]
    valid = [(x, y) for x, y in zip(digits[-51:], classes[-51:])]
    return DataLoaders(DataLoader(train, bs=bs, shuffle=True, num_workers=num_workers, drop_last=drop_last),
                       DataLoader(valid, bs=20))

def learner(selector, seed=0, **kw):
    set_seed(seed)
    dls = loaders(**kw)
    return Learner(dls, nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), CrossEntropyLossFlat(), lr=.1,
                   cbs=selector)

def fit(learn, *cbs, epochs=epochs):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=list(cbs))

def weights(learn):
    all_of_them = torch.cat([p.detach().flatten() for p in learn.model.state_dict().values()])
    return hashlib.sha256(all_of_them.numpy().tobytes()).hexdigest()

def train(rank, name, args={}, **kw):
    "What one rank kept, step by step, and where it ended; each rank has another seed."
    learn, kept = learner(selectors[name](**args), rank, **kw), Kept()
    dl, before = learn.dls.train, {k: v for k, v in vars(learn.dls.train).items() if k != 'rng'}
    with learn.distrib_ctx(sync_bn=False, cpu=True): fit(learn, kept)
    assert learn.dls.train is dl and {k: v for k,
                                      v in vars(dl).items() if k != 'rng'} == before, 'the loader is not as it was'
    history = next((cb.rule.history.mean.tolist() for cb in learn.cbs if getattr(vars(cb).get('rule'), 'history',
                                                                                 None)), None)
    return dict(kept=kept.steps, weights=weights(learn), history=history,
                parameters=[p.detach() for p in learn.model.parameters()])

def join(rank, folder):
    torch.set_num_threads(1)
    # a forked copy of a process that uses gloo may hang, says PyTorch, and some did
    multiprocessing.set_start_method('forkserver', force=True)
    multiprocessing.set_forkserver_preload(['fastai.basics', 'spectral_curation.train.by_epoch'])
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', OMP_NUM_THREADS='1',
                      FASTAI_HOME=str(folder))
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2,
                            timeout=timedelta(seconds=40))

@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    "Run a function in two processes that form a group; what it returned or raised on each. New ones after a hang."
    pools = []
    def start():
        folder = tmp_path_factory.mktemp('ranks')
        pools[:] = [ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), join,
                                        (rank, folder)) for rank in range(2)]
    def run(f, *args, **kw):
        if not pools: start()
        futures = [pool.submit(f, rank, *args, **kw) for rank, pool in enumerate(pools)]
        try: return [o.exception(120) or o.result() for o in futures]
        except TimeoutError:
            for p in chain(*(pool._processes.values() for pool in pools)): p.kill()
            pools.clear()
            ended = [o.done() for o in futures]
            raise AssertionError(f'{f.__name__}{args} still ran after 120 s: {ended} had ended') from None
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


@pytest.mark.parametrize('name',
                         ['random', 'saln', 'agreement', 'jest', 'gstds_super', 'ucb', 'ucb_by_batch',
                          'infobatch_by_batch', 'short'])
def test_worker_processes_change_nothing(pair, name):
    got, workers = pair(train, name), pair(train, name, num_workers=1)
    check(workers, twice=name == 'short')
    assert [o['kept'] for o in got] == [o['kept'] for o in workers]


@pytest.mark.parametrize('name',
                         ['standard', 'random', 'saln_super', 'gstds', 'ucb', 'ucb_by_batch', 'infobatch', 'short'])
def test_short_last_batch_dropped(pair, name): check(pair(train, name, drop_last=True), twice=name == 'short')


def test_random_choices_differ_between_ranks(pair):
    "One seed, but not the same positions on both."
    kept, read = pair(train, 'random_in_batch', n=64), pair(train, 'standard', n=64)
    places = [[batch.index(i) for i in step] for one, all_ in zip(kept, read) for step,
              batch in zip(one['kept'][0], all_['kept'][0])]
    assert len({tuple(p) for p in places}) == len(places) == 4


@pytest.mark.parametrize('name', ['standard', 'ucb', 'static', 'short'])
def test_two_ranks_together_do_what_one_process_does_with_batches_twice_as_large(pair, name):
    "The same samples in each step, the same weights but for rounding; 320 samples leave no remainder."
    learn, kept = learner(selectors[name](), 0, bs=2*bs, n=320), Kept()
    fit(learn, kept)
    both = pair(train, name, n=320)
    for alone, *ranks in zip(kept.steps, *(o['kept'] for o in both)):
        assert [sorted(b) for b in alone] == [sorted(chain(*shares)) for shares in zip(*ranks)]
    for p, q in zip(learn.model.parameters(), both[0]['parameters']):
        torch.testing.assert_close(p.detach(), q, rtol=1e-4, atol=1e-5)


def shared_features(rank, folder):
    dls = digits_dls(bs=16, n_train=200)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 10)), CrossEntropyLossFlat(), lr=.01,
                    cbs=SALN(.8, cache=folder))
    with learn.distrib_ctx(sync_bn=False, cpu=True): fit(learn, epochs=1)
    return weights(learn), torch.tensor(learn.saln._features)
def test_features_are_extracted_together(pair, tmp_path):
    (one, a), (other, b) = pair(shared_features, tmp_path)
    assert one == other and torch.equal(a, b) and len([*tmp_path.glob('*.npy')]) == 1


def agreed(rank):
    learn = learner(Agreement(features=digits[:n], labels=classes[:n], refresh=(.3,)), rank)
    with learn.distrib_ctx(sync_bn=False, cpu=True): fit(learn)
    cb = learn.agreement
    return cb.rule.scores.tolist(), cb.issues().tolist(), cb._refreshed
def test_agreement_is_the_same_on_both_ranks(pair):
    "Also computed anew, from the learner's features of the whole training set."
    one, other = pair(agreed)
    assert one == other and one[2] == 1
    assert one[0] != label_agreement(digits[:n], classes[:n]).tolist()


def validated(rank):
    learn = learner(RandomSubset(.5), rank)
    with learn.distrib_ctx(sync_bn=False, cpu=True):
        fit(learn)
        with learn.no_bar(): (preds, targets), (loss, *_) = learn.get_preds(), learn.validate()
    logits = learn.model(digits[-51:])
    expect_loss = float(nn.functional.cross_entropy(logits, classes[-51:]))
    return preds.tolist(), logits.softmax(1).tolist(), targets.tolist(), loss, expect_loss
def test_validation_is_complete(pair):
    # fastai's order is that of the batches of all ranks, and its loss counts the repeated sample
    for preds, expect, targets, loss, expect_loss in pair(validated):
        torch.testing.assert_close(torch.tensor(sorted(preds)), torch.tensor(sorted(expect)), rtol=1e-4, atol=1e-6)
        assert sorted(targets) == sorted(classes[-51:].tolist()) and loss == pytest.approx(expect_loss, rel=.05)


def refused(rank, make, *args):
    learn = learner(globals()[make](rank, *args), rank)
    with learn.distrib_ctx(sync_bn=False, cpu=True): fit(learn)
def other_ratio(rank): return DynamicPruning('ucb', .5 + .2*rank)
def other_seed(rank): return InfoBatch(.5, seed=rank)
class Fails(StaticPruning):
    def choose(self, n): raise OSError('no scores on this machine')
def fails_on(rank, bad): return Fails(None, .5) if rank == bad else type('Fails', (StaticPruning,), {})(None, .5)

@pytest.mark.parametrize('make, what',
                         [('other_ratio', 'filter_ratio is 0.5 on rank 0 and 0.7 on rank 1'),
                         ('other_seed', 'seed is 0 on rank 0 and 1 on rank 1')])
def test_ranks_that_would_choose_differently(pair, make, what):
    for e in pair(refused, make): assert isinstance(e, ValueError) and what in str(e)

@pytest.mark.parametrize('bad', [0, 1])
def test_error_on_one_rank_is_an_error_on_all(pair, bad):
    got = pair(refused, 'fails_on', bad)
    assert 'no scores on this machine' in str(got[bad])
    assert f'rank {bad} failed with OSError: no scores on this machine' in str(got[1-bad])


class Stop(Callback):
    order = 70
    def before_epoch(self):
        if self.epoch == 2: raise KeyboardInterrupt
class Noise(Callback):
    def before_batch(self):
        if self.training: self.learn.xb = (self.x + .1*torch.randn_like(self.x),)

def saved(rank, name, path, how):
    learn, kept = learner(selectors[name](), rank + 10*(how == 'go on')), Kept()
    cbs = [kept, Noise()] + [Checkpoint(path)]*(how != 'whole') + [Stop()]*(how == 'stop')
    with learn.distrib_ctx(sync_bn=False, cpu=True):
        try: fit(learn, *cbs, epochs=4)
        except KeyboardInterrupt: return
    return kept.steps, weights(learn)

@pytest.mark.parametrize('name', ['saln', 'agreement', 'jest', 'ucb', 'short'])
def test_stopped_and_continued(pair, tmp_path, name):
    whole = pair(saved, name, tmp_path/'run.pt', 'whole')
    assert pair(saved, name, tmp_path/'run.pt', 'stop') == [None, None]
    for (kept, end), (then, continued) in zip(whole, pair(saved, name, tmp_path/'run.pt', 'go on')):
        assert continued == end and then == kept[2:]
    learn = learner(selectors[name]())
    with pytest.raises(ValueError, match='number of processes is 2, here it is 1'):
        fit(learn, Checkpoint(tmp_path/'run.pt'), epochs=4)


def logged(rank, name):
    learn, kept, log = learner(selectors[name](), rank), Kept(), SelectionLog()
    with learn.distrib_ctx(sync_bn=False, cpu=True): fit(learn, kept, log)
    return kept.steps, log.offered.tolist(), log.kept.tolist(), log.gap, log.summary()

@pytest.mark.parametrize('name', ['random', 'saln_super', 'ucb', 'static'])
def test_the_log_counts_what_all_ranks_selected(pair, name):
    "Each rank sees half of the samples of an epoch; a sample that the other one trained on was not left out."
    for o in (got := pair(logged, name)):
        if isinstance(o, Exception): raise o
    (steps, *one), (other_steps, *other) = got
    assert one == other
    by_epoch = [{*chain(*a, *b)} for a, b in zip(steps, other_steps)]
    offered, counted, gap, summary = one
    assert counted == [sum(i in kept for kept in by_epoch) for i in range(n)]
    assert all(k <= o for k, o in zip(counted, offered)) and len(gap) == (epochs if 'saln' in name else 0)
    assert summary['never'] == pytest.approx(sum(k == 0 for k in counted)/n, abs=1e-6) if name in ('static',
            'ucb') else summary['never'] < 1


def test_without_accelerate(fresh):
    "It is no requirement: all else works without."
    assert fresh('''
import sys; sys.modules['accelerate'] = None
from fastai.basics import *
from spectral_curation.all import *
dls = DataLoaders.from_dsets([(torch.randn(3), 0)]*20, [(torch.randn(3), 0)]*4, bs=4)
learn = Learner(dls, nn.Linear(3, 2), CrossEntropyLossFlat(), lr=.1, cbs=StaticPruning(None, .5))
with learn.no_bar(), learn.no_logging(): learn.fit(1)
print(learn.static_pruning.trained)''') == 10
