"Methods by epochs where processes and loaders differ, and training that is killed for good."
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.callback.training import GradientAccumulation
from torch import nn

from spectral_curation.train.by_index import RandomSubset
from spectral_curation.train.selector import Selector
from spectral_curation.train.by_epoch import DynamicPruning, InfoBatch, StandardShort, StaticPruning

setup = '''
import hashlib, json, random, sys, time, torch
from fastai.basics import *
from spectral_curation.all import *

class Kept(Callback):
    order, run_valid = 5, False
    def before_fit(self): self.idxs = []
    def after_pred(self):
        self.idxs.append(next(cb for cb in self.learn.cbs if isinstance(cb, Selector)).kept_idx.tolist())

selectors = dict(ucb=lambda: DynamicPruning('ucb', .6), epsilon_greedy=lambda: DynamicPruning('epsilon_greedy', .6),
                 infobatch=lambda: InfoBatch(.6), short=lambda: StandardShort(.6),
                 static=lambda: StaticPruning(None, .6), top_loss=lambda: TopLoss(.6),
                 jest=lambda: JEST(.6, torch.arange(90.)/90), selective_backprop=lambda: SelectiveBackprop(.6))

def make(name, num_workers=0):
    set_seed(0)
    x = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
    ds = [(a, (a[0] > 0).long()) for a in x]
    dls = DataLoaders(DataLoader(ds, bs=16, shuffle=True, num_workers=num_workers), DataLoader(ds[:16], bs=16))
    return Learner(dls, nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(.1), nn.Linear(8, 2)),
                   nn.CrossEntropyLoss(), lr=.1, cbs=selectors[name]())

def weights(learn):
    all_of_them = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    return hashlib.sha256(all_of_them.numpy().tobytes()).hexdigest()
def fit(learn, *cbs):
    kept = Kept()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(5, .1, cbs=[kept, *cbs])
    return weights(learn), kept.idxs
torch.set_num_threads(1)
'''


def test_same_seed_same_run_in_every_process(fresh):
    code = setup + 'print(json.dumps({name: [fit(make(name, w)) for w in (0, 2)] for name in selectors}))'
    one, other = fresh(code), fresh(code)
    assert one == other
    for name, (alone, with_workers) in one.items(): assert alone == with_workers, name
    assert len({str(runs) for runs in one.values()}) == len(one)


slow = setup + '''
class Slow(Callback):
    def after_batch(self): time.sleep(.02)
fit(make(sys.argv[1]), Slow(), Checkpoint(sys.argv[2]))
'''
rest = setup + 'print(json.dumps([fit(make(sys.argv[1])), fit(make(sys.argv[1]), Checkpoint(sys.argv[2]))]))'


@pytest.mark.parametrize('name', ['ucb', 'jest'])
def test_killed_for_good_and_continued(fresh, tmp_path, name):
    "`kill -9` while batches are trained; another process continues and ends with the weights of one left alone."
    f = tmp_path/'run.pt'
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', slow, name, str(f)], cwd=tmp_path)
    while not f.exists():
        assert p.poll() is None
        time.sleep(.01)
    time.sleep(.05)
    p.send_signal(signal.SIGKILL); p.wait()
    assert torch.load(f, weights_only=True)['done'] < 5
    whole, continued = fresh(rest, name, f)
    assert continued[0] == whole[0] and whole[1][-len(continued[1]):] == continued[1]
    assert len(continued[1]) < len(whole[1])


# Loaders that do not read each sample once

class Oversampling(DataLoader):
    "Reads the last ten samples ten times as often as they are there."
    def get_idxs(self): return self.rng.choices([*range(90), *[*range(90, 100)]*10], k=self.n)


tagged = [(torch.full((3,), float(i)), i % 10) for i in range(100)]     # each sample says which it is


class Seen(Callback):
    order, run_valid = 5, False
    def before_fit(self): self.given, self.claimed = [], []
    def before_batch(self):
        self.given.append(self.x[:, 0].long().tolist())
        self.claimed.append(next(cb for cb in self.learn.cbs if isinstance(cb, Selector)).idx.tolist())


@pytest.mark.parametrize('make',
                         [lambda: DynamicPruning('ucb', .7), lambda: DynamicPruning('random', .7),
                         lambda: InfoBatch(.7), lambda: StaticPruning(None, .7), lambda: StandardShort(.7)])
@pytest.mark.parametrize('loader',
                         [lambda: Oversampling(tagged, bs=16, num_workers=0),
                         lambda: DataLoader(tagged, bs=16, shuffle=True, drop_last=True),
                         lambda: DataLoader(tagged, bs=1, shuffle=True),
                                    lambda: DataLoader(tagged, bs=16, num_workers=0,
                                                       get_idxs=lambda: [5]*40 + [*range(60)])])
def test_indices_are_those_of_the_samples(make, loader):
    dl, seen, cb = loader(), Seen(), make()
    before = (dl.n, dl.bs, dl.drop_last, vars(dl).get('get_idxs'))
    with Learner(DataLoaders(dl, DataLoader(tagged, bs=16)), nn.Linear(3, 10), nn.CrossEntropyLoss(), lr=1e-6,
                 cbs=[cb, seen]).no_bar() as learn, learn.no_logging():
        learn.fit(4)
    assert seen.given == seen.claimed and seen.given
    assert (dl.n, dl.bs, dl.drop_last, vars(dl).get('get_idxs')) == before
    if isinstance(cb, DynamicPruning): assert len(cb.rule.kept) == 30


@pytest.mark.parametrize('n, bs, r',
                         [(n, bs, r) for n in (2, 5, 16, 33, 100) for bs in (2, 7, 16) for r in (0, .3, .8, .99)])
def test_short_training_costs_what_a_random_subset_costs(n, bs, r):
    "Same steps, same sizes, whatever the data set, batch size and ratio; no sample comes back before all were read."
    if n < bs: pytest.skip('no whole batch')
    runs = []
    for cb in (RandomSubset(r), StandardShort(r)):
        sizes = []
        class Sizes(Callback):
            order, run_valid = 5, False
            def before_batch(self): sizes.append(self.learn.xb[0][:, 0].long().tolist())
        with Learner(DataLoaders(DataLoader(tagged[:n], bs=bs, shuffle=True, drop_last=True),
                                 DataLoader(tagged, bs=16)), nn.Linear(3, 10), nn.CrossEntropyLoss(), lr=1e-6,
                                 cbs=[cb, Sizes()]).no_bar() as learn, learn.no_logging():
            learn.fit(3)
        runs.append(sizes)
    assert list(map(len, runs[0])) == list(map(len, runs[1]))
    if r: # at ratio 0 both are standard training, which drops the rest of an epoch
        read = sum(runs[1], [])
        for start in range(0, len(read), n): assert len(set(read[start:start+n])) == len(read[start:start+n])


# Another training set

def quiet_fit(learn, n):
    with learn.no_bar(), learn.no_logging(): learn.fit(n)


@pytest.mark.parametrize('make',
                         [lambda: StandardShort(.8), lambda: DynamicPruning('ucb', .5),
                         lambda: DynamicPruning('random', .5, every=9),
                                  lambda: InfoBatch(.8, delta=1), lambda: StaticPruning(None,
                                                                                        .5), lambda: RandomSubset(.5)])
@pytest.mark.parametrize('other', [tagged[:40], tagged[50:], tagged[::-1]])
def test_nothing_is_left_of_another_data_set(make, other):
    "A selector that has trained on one data set chooses from another, smaller or as large, as a new one would."
    class Read(Callback):
        order, run_valid = 5, False
        def before_fit(self): self.idx = []
        def before_batch(self):
            self.idx.append(next(cb for cb in self.learn.cbs if isinstance(cb, Selector)).kept_idx.tolist())
    read = []
    for cb, first in ((make(), tagged), (make(), None)):
        if first:
            quiet_fit(Learner(DataLoaders(DataLoader(first, bs=16, shuffle=True), DataLoader(first, bs=16)),
                              nn.Linear(3, 10), nn.CrossEntropyLoss(), lr=1e-6, cbs=cb), 2)
            cb.epochs_begun = 0     # the seeds of a new one
        torch.manual_seed(0)
        dl = DataLoader(other, bs=16, shuffle=True)
        dl.rng = random.Random(0)
        learn = Learner(DataLoaders(dl, DataLoader(other, bs=16)), nn.Linear(3, 10), nn.CrossEntropyLoss(), lr=1e-6,
                        cbs=[cb, Read()])
        quiet_fit(learn, 2)
        read.append(learn.read.idx)
    assert read[0] == read[1]


def test_a_data_set_that_shrinks():
    "The same object with fewer samples: no index of what has gone."
    data = list(tagged)
    for cb in (StandardShort(.8), DynamicPruning('ucb', .5), InfoBatch(.5)):
        learn = Learner(DataLoaders(DataLoader(data, bs=16, shuffle=True), DataLoader(data, bs=16)), nn.Linear(3, 10),
                        nn.CrossEntropyLoss(), lr=1e-6, cbs=cb)
        quiet_fit(learn, 1)
        del data[30:]
        learn.dls = DataLoaders(DataLoader(data, bs=16, shuffle=True), DataLoader(data, bs=16))
        quiet_fit(learn, 2)
        data += tagged[30:]


# InfoBatch's expected gradient

class Sum(Callback):
    "The gradients of each epoch's steps, added up."
    order, run_valid = 55, False
    def before_fit(self): self.epochs = []
    def before_train(self): self.epochs.append(torch.zeros(33))
    def after_backward(self): self.epochs[-1] += torch.cat([p.grad.flatten() for p in self.model.parameters()])


@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('n, epochs', [(600, 60), (113, 400)])       # with a few batches, the ragged last one tells
@pytest.mark.parametrize('form', [dict(), dict(super_batch=False), dict(before_decode=False)])
def test_infobatch_expects_the_full_gradient(form, n, epochs, reduction):
    "Rate 0: the weights stay, and the mean over many epochs of the summed gradient is that of all samples."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 10, generator=g)
    y = (x[:, 0] + .5*torch.randn(n, generator=g) > 0).long() + (x[:, 1] > 1).long()
    torch.manual_seed(0)
    model, loss = nn.Linear(10, 3), nn.CrossEntropyLoss(reduction=reduction)
    nn.functional.cross_entropy(model(x), y, reduction='sum').backward()
    full = torch.cat([p.grad.flatten() for p in model.parameters()]) / (20 if reduction == 'mean' else 1)
    data = list(zip(x, y))
    dls = DataLoaders(DataLoader(data, bs=20, shuffle=True), DataLoader(data[:20], bs=20))
    summed = Sum()
    quiet_fit(Learner(dls, model, loss, lr=0., cbs=[InfoBatch(.8, delta=1, **form), summed], opt_func=SGD), epochs)
    share = torch.stack(summed.epochs[1:]) @ full / (full @ full)
    assert abs(share.mean() - 1) < 4*share.std()/len(share)**.5 + .002 and share.std()/len(share)**.5 < .02


@pytest.mark.parametrize('form', [dict(), dict(super_batch=False), dict(before_decode=False)])
def test_infobatch_and_accumulated_gradients(form):
    "`GradientAccumulation` weighs by the samples of a step: an epoch's steps together are the weighted mean."
    data = [(torch.randn(10, generator=torch.Generator().manual_seed(i)), i % 3) for i in range(200)]
    x, y = torch.stack([a for a, _ in data]), torch.tensor([b for _, b in data])
    torch.manual_seed(0)
    cb, weighted = InfoBatch(.8, delta=1, **form), []
    class Weighted(Callback):
        order, run_valid = 54, False
        def before_train(self): self.sum = 0.
        def after_backward(self):
            idx, w = cb.kept_idx, cb.rule.weights(cb.kept_idx)
            self.sum = self.sum + (w*nn.functional.cross_entropy(self.model(x[idx]), y[idx], reduction='none')).sum()
            if self.iter < self.n_iter-1: return
            ours = torch.cat([p.grad.flatten().clone() for p in self.model.parameters()])
            expect = torch.cat([g.flatten() for g in torch.autograd.grad(self.sum,
                                                                         list(self.model.parameters()))])/10_000
            weighted.append((ours, expect))
    learn = Learner(DataLoaders(DataLoader(data, bs=20, shuffle=True), DataLoader(data[:20], bs=20)), nn.Linear(10, 3),
                    nn.CrossEntropyLoss(), lr=0.,
                    cbs=[cb, GradientAccumulation(10_000), Weighted()], opt_func=SGD)
    for _ in range(3):
        quiet_fit(learn, 1)
        learn.zero_grad()
    for ours, expect in weighted: torch.testing.assert_close(ours, expect, rtol=1e-4, atol=1e-6)
    assert len(weighted) == 3


# InfoBatch's epochs

@pytest.mark.parametrize('drop_last', [True, False])
@pytest.mark.parametrize('form', [dict(), dict(super_batch=False), dict(before_decode=False)])
def test_infobatch_ends_with_a_whole_epoch_and_counts_what_it_trains(form, drop_last):
    kept = []
    class Kept(Callback):
        order, run_valid = 5, False
        def after_train(self): kept.append((cb.offered, cb.trained, cb.kept))
    cb = InfoBatch(.8, **form)
    dls = DataLoaders(DataLoader(tagged, bs=16, shuffle=True, drop_last=drop_last), DataLoader(tagged, bs=16))
    quiet_fit(Learner(dls, nn.Linear(3, 10), nn.CrossEntropyLoss(), lr=1e-3, cbs=[cb, Kept()]), 5)
    assert all(trained <= offered and share <= 1 for offered, trained, share in kept)
    assert kept[-1][1] == (96 if drop_last else 100) and all(trained < 90 for _, trained, _ in kept[1:-1])


def test_fewer_steps_of_a_given_size_cost_what_the_ratio_says():
    "The rule of two is for steps of what is kept of a batch; steps of a given size save the share asked for."
    for step, trained in ((None, 6*2), (32, 6)):
        cb = StandardShort(.95, step=step)
        dls = DataLoaders(DataLoader(tagged, bs=16, shuffle=True, drop_last=True), DataLoader(tagged, bs=16))
        quiet_fit(Learner(dls, nn.Linear(3, 10), nn.CrossEntropyLoss(), lr=1e-6, cbs=cb), 1)
        assert cb.trained == trained


@pytest.mark.parametrize('make', [lambda **kw: StaticPruning(**kw), lambda **kw: DynamicPruning('random', **kw)])
@pytest.mark.parametrize('bs', [2, 4, 8])
@pytest.mark.parametrize('before_decode', [True, False])
def test_no_chosen_sample_is_lost_in_small_batches(make, bs, before_decode):
    "What is chosen of each batch of the loader is trained on, also where it is one sample of a batch."
    cb = make(filter_ratio=.8, before_decode=before_decode, super_batch=False)
    dl = DataLoader([(torch.rand(4), i % 2) for i in range(160)], bs=bs, shuffle=True)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    learn = Learner(DataLoaders(dl, dl), net, nn.CrossEntropyLoss(), lr=.01, cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert cb.trained == 32


@pytest.mark.parametrize('before_decode', [True, False])
def test_two_samples_at_least_of_a_training_set(before_decode):
    dl = DataLoader([(torch.rand(4), i % 2) for i in range(72)], bs=16, shuffle=True)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    cb = StaticPruning(filter_ratio=.999, before_decode=before_decode)
    learn = Learner(DataLoaders(dl, dl), net, nn.CrossEntropyLoss(), lr=.01, cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    assert cb.trained == 2


def test_a_rule_that_would_learn_nothing_is_refused():
    from spectral_curation.train.by_epoch import EpochSelector, HistorySelector
    from spectral_curation.train.epoch_rules import DynamicRule
    from spectral_curation.train.rules import RandomRule
    for cls in (EpochSelector, HistorySelector):
        with pytest.raises(ValueError, match='learns from the losses'): cls(.5, rule=DynamicRule('ucb'))
        with pytest.raises(TypeError, match='needs an EpochRule, got a RandomRule'): cls(.5, rule=RandomRule())
