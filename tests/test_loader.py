"What is chosen before it is read is what would have been chosen in the batch, and nothing else is read."
import ctypes
import gc
import pickle
import sys
from operator import itemgetter

import fastai.callback.data
import numpy as np
import PIL.Image
import pytest
import torch
from fastai.callback.all import FetchPredsCallback, GradientAccumulation, MixUp, SaveModelCallback
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import SchedCos
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from torch import nn

from spectral_curation.train.rules import BatchRule, Epoch, FiedlerRule, RandomRule
from spectral_curation.train.plan import plan_batches
from spectral_curation.train.by_index import GSTDS, IndexSelector, RandomSubset, SALN
from spectral_curation.train.by_loss import SelectiveBackprop, TopLoss
from spectral_curation.train.by_reference import JEST, RHO
from spectral_curation.train.selector import BatchSelector, Selector
from spectral_curation.train.checkpoint import Checkpoint
from spectral_curation.lab.data import cifar10_dls, digits_dls
from spectral_curation.train.by_epoch import DynamicPruning, EpochSelector, InfoBatch, StandardShort, StaticPruning
from spectral_curation.train.cached import cache_on_device

x = torch.randn(103, 6, generator=torch.Generator().manual_seed(0))
# each sample says which it is
tagged = [(torch.cat([a, torch.tensor([float(i)])]), int(a[0] > 0)) for i, a in enumerate(x)]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(.1), nn.Linear(8, 2))
    def forward(self, x): return self.layers(x[:, :6])


def selector(learn): return next(cb for cb in learn.cbs if isinstance(cb, Selector))


class Kept(Callback):
    "The samples of each step, in order, by epochs; and the accounts."
    order, run_valid = -4, False    # before MixUp
    def before_fit(self): self.epochs, self.offered = [], []
    def before_train(self): self.epochs.append([])
    def before_batch(self):
        kept = selector(self.learn).kept_idx.tolist()
        assert kept == self.x[:, -1].long().tolist()
        self.epochs[-1].append(kept)
    def after_train(self): self.offered.append(selector(self.learn).offered)


def loaders(data=tagged, bs=16, shuffle=True, **kwargs):
    return DataLoaders(DataLoader(data, bs=bs, shuffle=shuffle, **kwargs), DataLoader(data[:20], bs=bs))
def learner(cbs, dls=None, net=Net, path=None, **kwargs):
    set_seed(0)
    return Learner(dls or loaders(**kwargs), net(), CrossEntropyLossFlat(), lr=.1, opt_func=SGD, cbs=cbs, path=path)
def quiet(learn, fit='fit', *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): getattr(learn, fit)(*args, **kwargs)
    return learn
def result(learn):
    values, losses = [list(v) for v in learn.recorder.values], [float(v) for v in learn.recorder.losses]
    weights = torch.cat([p.detach().flatten() for p in learn.model.parameters()]).tolist()
    return learn.kept.epochs, learn.kept.offered, values, losses, weights
def run(cb, n=3, **kwargs): return result(quiet(learner([cb, Kept()], **kwargs), 'fit', n))
def state(dl):
    return dl.n, dl.bs, dl.drop_last, len(dl), {name for name in vars(dl) if name in ('get_idxs', 'do_item',
                                                                                      'create_batches', 'before_iter')}


by_index = dict(random=lambda **kw: RandomSubset(.6, **kw), extremes=lambda **kw: SALN(.6, features=x, **kw),
                balanced=lambda **kw: SALN(.6, features=x, which='balanced', **kw),
                stratified=lambda **kw: SALN(.6, features=x, which='stratified', **kw), knn=lambda **kw: SALN(.6,
                        features=x, graph='knn', n_neighbors=4, **kw),
                half=lambda **kw: SALN(.6, features=x.abs().half(), laplacian='symmetric',
                                       **kw), gstds=lambda **kw: GSTDS(SchedCos(.9, .3), features=x, **kw),
                from_whole=lambda **kw: GSTDS(lambda pct: .5*(pct > .4), features=x, which='stratified', **kw))
by_epoch = dict(pruned=lambda **kw: DynamicPruning('random', .6, **kw),
                every_other=lambda **kw: DynamicPruning('random', .6, every=2, **kw),
                epsilon_greedy=lambda **kw: DynamicPruning('epsilon_greedy', .6, **kw),
                ucb=lambda **kw: DynamicPruning('ucb', .6, **kw), margin=lambda **kw: DynamicPruning('ucb', .6,
                        score='margin', **kw), infobatch=lambda **kw: InfoBatch(.6, **kw),
                static=lambda **kw: StaticPruning(None, .6, **kw), scores=lambda **kw: StaticPruning(x[:, 1], .6, **kw))
by_loss = dict(top_loss=lambda **kw: TopLoss(.6, **kw), backprop=lambda **kw: SelectiveBackprop(.6, **kw),
               interrupted=lambda **kw: SelectiveBackprop(.6, interrupt=3, **kw),
               rho=lambda **kw: RHO(.6, torch.rand(103, generator=torch.Generator().manual_seed(1)),
                                    **kw), jest=lambda **kw: JEST(.6, method='hard', n_chunks=2, **kw))

def in_batch(name):
    return by_index[name](before_decode=False) if name in by_index else by_epoch[name](before_decode=False)
def before_decode(name): return by_index[name]() if name in by_index else by_epoch[name](super_batch=False)

# The same choices

@pytest.mark.parametrize('drop_last', [True, False])
@pytest.mark.parametrize('name', [*by_index, *by_epoch])
def test_both_forms_keep_the_same(name, drop_last):
    "Same samples, same order, same accounts, same losses, same weights; with workers and without."
    kept, offered, *_ = expect = run(in_batch(name), drop_last=drop_last)
    for num_workers in (0, 2): assert run(before_decode(name), drop_last=drop_last, num_workers=num_workers) == expect
    assert offered == [96 if drop_last else 103]*3
    assert len({str(e) for e in kept}) == 3         # the order is another in each epoch
    if name in by_index: assert [len(e) for e in kept] == [6 if drop_last else 7]*3


@pytest.mark.parametrize('name', by_index)
def test_both_forms_keep_the_same_of_super_batches(name):
    for drop_last in (True, False):
        assert run(by_index[name](super_batch=True, before_decode=False), bs=8,
                   drop_last=drop_last) == run(by_index[name](super_batch=True), bs=8, drop_last=drop_last,
                   num_workers=2)


def equal_rows(**kw): return SALN(.6, features=x.repeat(2, 1)[::2][:103].round(), **kw)
def few_values(**kw): return SALN(.6, features=torch.ones(103, 4), which='stratified', **kw)

@pytest.mark.parametrize('make', [equal_rows, few_values])
def test_both_forms_keep_the_same_of_ties(make): assert run(make(before_decode=False)) == run(make())


@pytest.mark.parametrize('name', ['random', 'stratified', 'gstds', 'ucb', 'infobatch', 'every_other', 'scores'])
def test_resumed_in_one_form_as_left_alone_in_the_other(name, tmp_path):
    class Interrupt(Callback):
        run_valid = False
        def before_batch(self):
            if self.epoch == 3 and self.iter == 2: raise KeyboardInterrupt
    expect = result(quiet(learner([in_batch(name), Kept()]), 'fit_one_cycle', 5, .1))
    with pytest.raises(KeyboardInterrupt):
        quiet(learner([before_decode(name), Interrupt()]), 'fit_one_cycle', 5, .1, cbs=Checkpoint(tmp_path/'run.pt'))
    rest = result(quiet(learner([before_decode(name), Kept()]), 'fit_one_cycle', 5, .1,
                        cbs=Checkpoint(tmp_path/'run.pt')))
    assert len(rest[0]) == 2 and rest[0] == expect[0][-2:] and rest[2:] == expect[2:]


@pytest.mark.parametrize('name', ['random', 'extremes', 'gstds', 'ucb', 'infobatch', 'static'])
def test_both_forms_with_the_rest_of_fastai(name, tmp_path):
    "MixUp, accumulated gradients, predictions for the training set between epochs, `fine_tune`, the best model."
    runs = []
    for cb in (in_batch(name), before_decode(name)):
        cb.filter_ratio, cb.schedule = .3, SchedCos(.5, .2)     # fastai's MixUp can't mix a single sample
        learn = learner([cb, Kept(), MixUp(), GradientAccumulation(12), FetchPredsCallback(ds_idx=0),
                         SaveModelCallback()], path=tmp_path)
        quiet(learn, 'fine_tune', 2)
        learn.remove_cbs([learn.fetch_preds, learn.save_model])     # fastai's own, which work in `fit` alone
        with learn.no_bar(): losses = learn.validate(), learn.get_preds(ds_idx=0)[0].tolist()
        runs.append((*result(learn), losses, state(learn.dls.train)))
    assert runs[0] == runs[1]


class Oversampling(DataLoader):
    def get_idxs(self): return self.rng.choices([*range(90), *[*range(90, 100)]*10], k=self.n)

def datasets():
    return Datasets([dict(x=a, y=b) for a, b in tagged], [[itemgetter('x')], [itemgetter('y')]],
                    splits=(range(103), range(20)))
def weighted(): return datasets().weighted_dataloaders(np.arange(103.)**2, bs=16, num_workers=0, device='cpu')
def partial_epochs(): return datasets().partial_dataloaders(70, bs=16, num_workers=0, device='cpu')
def oversampled(): return DataLoaders(Oversampling(tagged, bs=16), DataLoader(tagged, bs=16))
def own_order():
    return DataLoaders(DataLoader(tagged, bs=16, get_idxs=lambda: np.array([5]*40 + [*range(63)])),
                       DataLoader(tagged, bs=16))

@pytest.mark.parametrize('dls', [weighted, partial_epochs, oversampled, own_order])
@pytest.mark.parametrize('name', ['random', 'gstds', 'ucb'])
def test_both_forms_with_loaders_that_repeat_samples(dls, name):
    class End(Callback):
        def after_train(self): self.pct = self.pct_train
    runs = []
    for cb in (in_batch(name), before_decode(name)):
        set_seed(0)
        learn = quiet(learner([cb, Kept(), End()], dls()), 'fit', 3)
        runs.append(result(learn))
        if name != 'ucb': assert learn.end.pct == pytest.approx(1)
    if dls is partial_epochs: assert runs[0][1] == [64 if learn.dls.train.drop_last else 70]*3
    assert runs[0] == runs[1]


@pytest.mark.parametrize('make',
                         [lambda **kw: GSTDS(SchedCos(.9, .3), cache=False, **kw),
                         lambda **kw: DynamicPruning('ucb', .5, **kw or dict(super_batch=False))])
def test_both_forms_with_held_data(make):
    class Indices(Callback):
        order, run_valid = 5, False
        def before_fit(self): self.all = []
        def before_batch(self): self.all.append(selector(self.learn).kept_idx.tolist())
    runs = []
    for kw in (dict(before_decode=False), {}):
        for hold in (False, True):
            set_seed(0)
            dls = digits_dls(bs=16, size=8, n_train=90, n_valid=20, augment=False, device='cpu')
            if hold: dls = cache_on_device(dls, progress=False)
            indices = Indices()
            learn = quiet(learner([make(**kw), indices], dls, lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 10))),
                          'fit', 3)
            runs.append((indices.all, [list(v) for v in learn.recorder.values],
                         [p.tolist() for p in learn.model.parameters()]))
    assert runs[0] == runs[1] == runs[2] == runs[3]

# Super-batches

@pytest.mark.parametrize('drop_last', [True, False])
@pytest.mark.parametrize('name', [*by_index, *by_loss])
def test_super_batches_keep_the_batch_size(name, drop_last):
    make = (by_index | by_loss)[name]
    kept, offered, *_ = run(make(super_batch=True), bs=4, drop_last=drop_last)
    for e, n in zip(kept, offered):
        assert {len(b) for b in e[:-1]} == {4} and len(e) > 1
        assert len(e[-1]) == 4 if drop_last else 1 <= len(e[-1]) <= 4
        seen = sum(e, [])
        assert len(set(seen)) == len(seen) and (n <= 103 if drop_last else n == 103)
    if name == 'gstds': assert len(kept[0]) < len(kept[2])       # from 0.9 to 0.3


@pytest.mark.parametrize('name', ['random', 'top_loss'])
def test_super_batch_larger_than_the_training_set(name):
    cb = (by_index | by_loss)[name](super_batch=True)
    with pytest.raises(ValueError,
                       match='super-batch holds 160 candidates for 64 samples kept, but there are only 103'):
        run(cb, bs=64, drop_last=True)
    kept, *_ = run(cb, 1, bs=64)        # one batch, as large as may be
    assert [[len(b) for b in e] for e in kept] == [[41]]


def test_extreme_sizes():
    for make in (RandomSubset, lambda r, **kw: SALN(r, features=x, **kw), TopLoss):
        # one of five
        assert [len(b) for b in run(make(.8, super_batch=True), 1, bs=1, drop_last=True)[0][0]] == [1]*20
        assert [len(b) for b in run(make(.99), 1)[0][0]] == [2]*7        # batch normalization and MixUp need two
        assert [len(b) for b in run(make(.8), 1, bs=1)[0][0]] == [1]*103        # nothing to remove from one
    for name in by_epoch:
        assert sum(map(len, run(before_decode(name), 1, bs=1)[0][0])) == (103 if name == 'infobatch' else 41)
    a, b = (run(DynamicPruning('ucb', .9, **kw), 4, bs=1) for kw in (dict(before_decode=False),
                                                                     dict(super_batch=False)))
    # no step where nothing of a batch is chosen
    assert a[1:] == b[1:] and [[s for s in e if s] for e in a[0]] == b[0]
    assert sum(map(len, run(DynamicPruning('random', .99), 1)[0][0])) == 2         # never one


@pytest.mark.parametrize('make',
                         [RandomSubset, lambda r, **kw: SALN(r, features=x, **kw), TopLoss, DynamicPruning, lambda r,
                         **kw: StaticPruning(None, r, **kw), lambda r, **kw: GSTDS(0., features=x, **kw)])
def test_filter_ratio_zero_is_standard_training(make):
    expect = run(BatchSelector(0.))[0], run(BatchSelector(0.))[4]
    for kw in ({}, dict(super_batch=True)) if make is not DynamicPruning else ({},):
        got = run(make(*(['random'] if make is DynamicPruning else []), 0., **kw))
        assert (got[0], got[4]) == expect

# The plan without a callback

@pytest.mark.parametrize('super_batch', [False, True])
@pytest.mark.parametrize('rule, make, ratio', [
    (RandomRule(), lambda **kw: RandomSubset(.6, **kw), .6),
    (FiedlerRule(x), lambda **kw: SALN(.6, features=x, **kw), .6),
    (FiedlerRule(x, 'stratified'), lambda **kw: SALN(.6, features=x, which='stratified', **kw), .6),
    (FiedlerRule(x), lambda **kw: GSTDS(SchedCos(.8, .3), features=x, **kw),
     lambda share, batch: SchedCos(.8, .3)(share))])
def test_the_functions_give_what_the_callback_reads(rule, make, ratio, super_batch):
    "From the loader's order alone: what a sampler for plain PyTorch would yield."
    orders = [sum(epoch, []) for epoch in run(BatchSelector(0.), 2)[0]]
    for number, (order, kept) in enumerate(zip(orders, run(make(super_batch=super_batch), 2)[0])):
        epoch = Epoch(number, share_done=number/2, n_epochs=2)
        assert plan_batches(order, rule, 16, ratio, epoch, super_batch).to_read() == kept


# Files

@pytest.fixture
def images(tmp_path):
    "120 small images in the layout of CIFAR-10."
    for i in range(130):
        f = tmp_path/'images'/('train' if i < 120 else 'test')/f'{i % 3}'/f'{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(f)
    return tmp_path/'images'

every_method = {**{f'{n} {kw}': (lambda n=n, kw=kw: (by_index | by_epoch)[n](**kw)) for n in [*by_index,
        *by_epoch] for kw in ({}, dict(super_batch=True), dict(super_batch=False))}, 'short': lambda: StandardShort(.6)}

@pytest.mark.parametrize('num_workers', [0, 2])
def test_dropped_images_are_never_opened(images, tmp_path, monkeypatch, num_workers):
    log, read = tmp_path/'opened', PIL.Image.open
    def opened(fp, *args, **kwargs):        # in whatever process
        with open(log, 'a') as f: f.write(f'{fp}\n')
        return read(fp, *args, **kwargs)
    monkeypatch.setattr(PIL.Image, 'open', opened)

    class Opened(Callback):
        order, run_valid = 5, False
        def before_train(self): log.write_text(''); self.kept = []
        def before_batch(self): self.kept += [str(self.dls.train_ds.items[i]) for i in selector(self.learn).kept_idx]
        def after_train(self):
            files = log.read_text().split()
            assert len(set(files)) == len(files) and files
            if not self.whole: assert sorted(files) == sorted(self.kept)
            # in the batch everything but the last batch, which the loader drops
            else: assert len(files) == 96 and set(self.kept) < set(files)
    dls = cifar10_dls(images, bs=16, size=16, augment=False, num_workers=num_workers, device='cpu')
    assert len(dls.train_ds) == 108 and dls.train.drop_last
    net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
    for name, make in list(every_method.items())[::5 if num_workers else 1]:
        if name == "gstds {'super_batch': True}": continue      # needs 160 images
        cb, watch = make(), Opened()
        if 'scores' in name: cb.scores = torch.arange(108)
        if 'infobatch' in name: cb.rule.delta = 1.      # or its last epoch is whole
        if hasattr(cb, 'features'): cb.features = cb.features.repeat(2, 1)[:108]
        watch.whole = False
        quiet(learner([cb, watch], dls, net), 'fit', 2)
        assert len(watch.kept) < 96, name
    for name in ('random', 'ucb'):
        cb, watch = in_batch(name), Opened()
        watch.whole = True
        quiet(learner([cb, watch], dls, net), 'fit', 1)

# Interruptions

plans = dict(random=lambda: RandomSubset(.8), gstds=lambda: GSTDS(features=x),
             super_batch=lambda: TopLoss(.5, super_batch=True), ucb=lambda: DynamicPruning('ucb', .5),
             static=lambda: StaticPruning(None, .5, super_batch=False), short=lambda: StandardShort(.5))

class Stop(Callback):
    "Ends the training in the middle of its second epoch."
    order, run_valid = 70, False
    def __init__(self, error): self.error = error
    def after_batch(self):
        if self.epoch == 1 and self.iter == 1: raise self.error

@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('name', plans)
def test_interrupted(name, num_workers):
    "After ctrl-c the loader is as it was for whoever reads it next: this learner, or another."
    for error in (KeyboardInterrupt(), CancelFitException()):
        for then in ('same', 'none', 'other'):
            dls = loaders(num_workers=num_workers, drop_last=True)
            before, learn = state(dls.train), learner(plans[name](), dls)
            try: quiet(learn, 'fit', 2, cbs=Stop(error))
            except KeyboardInterrupt: pass
            else: assert state(dls.train) == before
            if then == 'same': quiet(learn, 'fit', 1)
            elif then == 'none':
                quiet(learner([], dls), 'fit', 1); assert len({int(i) for a, _ in dls.train for i in a[:, -1]}) == 96
            else: assert quiet(learner([RandomSubset(.5), Kept()], dls), 'fit', 1).kept.offered == [96]
            assert state(dls.train) == before
            if num_workers: break


def plain(o):
    return {k: plain(v) for k, v in o.items()} if isinstance(o,
            dict) else o.tolist() if torch.is_tensor(o) else list(o) if isinstance(o, list) else o

@pytest.mark.parametrize('name', plans)
def test_a_search_for_the_learning_rate_leaves_no_trace(name, tmp_path):
    "And covers all its learning rates, in epochs that are shorter than it reckons with."
    cb = plans[name]()
    learn = quiet(learner([cb, Kept()], path=tmp_path), 'fit', 1)
    before, loader = plain(cb.state_dict()), state(learn.dls.train)
    weights = [p.tolist() for p in learn.model.parameters()]
    with learn.no_bar(): learn.lr_find(num_it=40, show_plot=False, stop_div=False)
    assert len(learn.recorder.lrs) == 40
    assert (plain(cb.state_dict()), state(learn.dls.train), [p.tolist() for p in learn.model.parameters()]) == (before,
            loader, weights)
    assert [m.name for m in learn.metrics] == []


@pytest.mark.parametrize('name', ['random', 'stratified', 'gstds'])
def test_both_forms_keep_the_same_after_a_search(name, tmp_path):
    runs = []
    for cb in (in_batch(name), before_decode(name)):
        learn = learner([cb, Kept()], path=tmp_path)
        if name == 'gstds': cb.schedule = SchedCos(.9, .3)
        with learn.no_bar(): learn.lr_find(num_it=20, show_plot=False, stop_div=False)
        runs.append(result(quiet(learn, 'fit', 2)))
    assert runs[0] == runs[1]


@pytest.mark.parametrize('name', [*plans, 'stratified'])
def test_pickled_in_the_middle_and_exported(name, tmp_path):
    big = torch.randn(103, 4000)
    cb = plans[name]() if name in plans else SALN(.5, features=big, which='stratified')
    if name == 'gstds': cb.features = big
    copies = []
    class Pickles(Callback):
        order, run_valid = 6, False
        def before_batch(self):
            if self.iter == 1: learn.remove_cb(self); copies.append(pickle.dumps(cb))
    learn = learner([cb], path=tmp_path)
    quiet(learn.add_cb(Pickles()), 'fit', 2)
    learn.dls = datasets().dataloaders(bs=16, device='cpu')
    learn.export('learner.pkl')
    assert len(copies[0]) < 100_000 and (tmp_path/'learner.pkl').stat().st_size < 60_000
    exported = load_learner(tmp_path/'learner.pkl')
    exported.dls = loaders()
    for again in (pickle.loads(copies.pop()), selector(exported)):
        if hasattr(again, 'features'): again.features = x
        learn = exported if again is selector(exported) else learner([again])
        quiet(learn, 'fit', 1)
        assert 0 < again.trained < 103 and state(learn.dls.train)[4] == set()

# Two trainings, two data sets

@pytest.mark.parametrize('name', ['random', 'stratified', 'gstds', 'ucb', 'every_other', 'infobatch', 'static'])
def test_one_selector_for_two_data_sets(name):
    runs = []
    for cb in (in_batch(name), before_decode(name)):
        learn = learner([cb, Kept()])
        got = [result(quiet(learn, 'fit', n)) for n in (2, 1)]
        learn.dls = loaders(tagged[:62], bs=10)
        if hasattr(cb, 'features'): cb.features = x[:62]
        got += [result(quiet(learn, 'fit', n)) for n in (1, 2)]
        runs.append(got)
    assert runs[0] == runs[1]
    assert runs[0][2][1] == [62] and str(runs[0][0][0]) != str(runs[0][1][0])

# Selectors of one's own

class Multiples(IndexSelector):
    "The smallest indices of a batch."
    def select(self, idx, k): return idx.argsort()[:k]

class Last(SALN):
    "SALN's vector, another rule."
    def select(self, idx, k): super().select(idx, k); return self.vector.argsort()[-k:]

class Rising(IndexSelector):
    def ratio_at(self, pct, batch=0): return .2 + .6*pct
    def select(self, idx, k): return torch.randperm(len(idx), generator=self.generator)[:k]

class Odd(EpochSelector):
    def choose(self, n): return torch.arange(1, n, 2)

@pytest.mark.parametrize('make',
                         [lambda **kw: Multiples(.7, **kw), lambda **kw: Last(.7, features=x, **kw),
                         lambda **kw: Rising(.5, **kw), lambda **kw: Odd(.5, **kw or dict(super_batch=False))])
def test_selectors_of_ones_own(make):
    seen = []
    class Vector(Callback):
        order, run_valid = 6, False
        def before_batch(self):
            seen[-1].append(selector(self.learn).vector.tolist() if isinstance(selector(self.learn), SALN) else 0)
    runs = []
    for kw in (dict(before_decode=False), {}):
        seen.append([])
        runs.append(result(quiet(learner([make(**kw), Kept(), Vector()]), 'fit', 2)))
    assert runs[0] == runs[1] and seen[0] == seen[1]
    if isinstance(make(), Multiples): assert all(b == sorted(b) for e in runs[0][0] for b in e)


def test_what_is_refused():
    class Looks(IndexSelector):
        def select(self, idx, k): return self.x[:, 0].topk(k).indices
    with pytest.raises(TypeError, match='NoneType'): run(Looks(.5))
    assert run(Looks(.5, before_decode=False))
    class Old(RandomSubset):
        def ratio(self): return .5
    with pytest.raises(TypeError, match=r'override ratio_at\(self, pct, batch=0\)'): Old()
    class TooMany(IndexSelector):
        def select(self, idx, k): return torch.arange(k+1)
    with pytest.raises(ValueError, match='must return 8 positions'): run(TooMany(.5))
    class TooFew(BatchRule):
        def positions(self, indices, k, generators): return torch.zeros(1, k, dtype=torch.int64)
    with pytest.raises(ValueError, match=r'TooFew.positions must return \[6, 8\]'):
        run(IndexSelector(.5, rule=TooFew()))
    for cb in (RandomSubset(.5), DynamicPruning('random', .5)):
        for dl, why in ((torch.utils.data.DataLoader(tagged, 16), 'wrap its data set'),
                        (DataLoader(tagged, bs=None), 'length and an index')):
            with pytest.raises(TypeError, match=why):
                quiet(learner([cb], DataLoaders(dl, DataLoader(tagged, bs=16))), 'fit', 1)
    assert RandomSubset(.5, 3).seed == 3      # as it always was: seed comes second


spawned = """
import json, multiprocessing, torch
from fastai.basics import *
from spectral_curation.train.by_index import GSTDS, RandomSubset

if __name__ == '__main__':
    multiprocessing.set_start_method({method!r})
    dl = DataLoader([(torch.full((2,), float(i)), i % 2) for i in range(40)], bs=10, shuffle=True, num_workers=2)
    learn = Learner(DataLoaders(dl, DataLoader(dl.dataset, bs=40)), nn.Linear(2, 2), nn.CrossEntropyLoss(), lr=1e-6)
    class Same(Callback):
        order, run_valid = 5, False
        def before_fit(self): self.sizes = []
        def before_batch(self):
            kept = next(cb for cb in self.learn.cbs if hasattr(cb, 'kept_idx')).kept_idx.tolist()
            assert kept == self.x[:, 0].long().tolist()
            self.sizes.append(len(kept))
    same, sizes = Same(), []
    for cb in (RandomSubset(.5), GSTDS(features=torch.rand(40, 2))):
        with learn.no_bar(), learn.no_logging(), learn.added_cbs([cb]): learn.fit(1, cbs=same)
        sizes.append(same.sizes)
    print(json.dumps(sizes))
"""

@pytest.mark.parametrize('method', ['spawn', 'forkserver'])
def test_worker_processes_that_start_afresh(fresh, method):
    "They know the plan too, whether its batches are of one size or not."
    even, uneven = fresh(spawned.replace('{method!r}', repr(method)))
    assert even == [5]*4 and len(set(uneven)) > 1


class Many:
    def __len__(self): return 100_000
    def __getitem__(self, i): return torch.zeros(2), 0

def held_memory():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)        # what is freed goes back to the system
    return 1024*int(next(line for line in open('/proc/self/status') if line.startswith('RssAnon')).split()[1])

@pytest.mark.skipif(not sys.platform.startswith('linux') or not hasattr(ctypes.CDLL(None), 'malloc_trim'),
                    reason='needs /proc and glibc')
def test_the_plan_of_a_large_epoch_is_small(tmp_path):
    np.save(tmp_path/'features.npy',
            np.random.default_rng(0).standard_normal((100_000, 64), dtype=np.float32).astype(np.float16))
    for cb in (RandomSubset(.8), SALN(.8, features=np.load(tmp_path/'features.npy', mmap_mode='r'))):
        learn = learner([cb], DataLoaders(*[DataLoader(Many(), bs=128, shuffle=True)]*2))
        learn.dl, learn.pct_train, learn.n_epoch = learn.dls.train, 0., 3
        cb.prepare()
        before = held_memory()
        watch = cb.watch_loader()
        order = learn.dl.get_idxs()
        # bytes a sample, of them 36 for the loader's own order
        assert (held_memory()-before)/100_000 < 120, cb.name
        assert len(order) > 19_000 and len(watch.batches) == 782
