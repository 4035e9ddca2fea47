"The sampler keeps what the fastai callback keeps, in any loop, across kills, ranks and worker processes."
import copy
import io
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.schedule import SchedCos
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader as FastaiLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import SGD
from torch import nn
from torch.utils.data import DataLoader

from spectral_curation.train.rules import BatchRule, Epoch, FiedlerRule, RandomRule, Rule
from spectral_curation.train.trust_rules import AgreementRule, TrustRule
from spectral_curation.train.epoch_rules import DynamicRule, EpochRule, InfoBatchRule, StaticRule
from spectral_curation.train.by_index import GSTDS, IndexSelector, RandomSubset, SALN
from spectral_curation.train.by_epoch import DynamicPruning, EpochSelector, InfoBatch, StaticPruning
from spectral_curation.train.by_agreement import Agreement, TrustedSubset
from spectral_curation.train.epochs import epoch_order, plan_rule
from spectral_curation.train.sampler import CuratedBatchSampler

n, n_epochs = 103, 4
x = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
y = (x[:, 0] > 0).long()
data = [(torch.cat([a, torch.tensor([float(i)])]), int(b)) for i, (a, b) in enumerate(zip(x, y))]     # each says which

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    def forward(self, x): return self.layers(x[:, :6])

class Smallest(BatchRule):
    "A rule of one's own."
    def positions(self, indices, k, generators): return indices.argsort(dim=1)[:, :k]

class EvenThenOdd(EpochRule):
    "An epoch rule of one's own."
    def keep(self, n, filter_ratio, epoch): return torch.arange(epoch.number % 2, n, 2)

class EvenThenOddSelector(EpochSelector):
    def choose(self, n): return torch.arange(self.epochs_begun % 2, n, 2)

cos = SchedCos(.9, .3)
def wider(share): return .3 + .6*share
noisy = torch.where(torch.rand(n, generator=torch.Generator().manual_seed(1)) < .3, 1-y, y)
# name -> the callback; the sampler's rule; its filter ratio
pairs = dict(
    random=(lambda **kw: RandomSubset(.6, **kw), RandomRule, .6),
    extremes=(lambda **kw: SALN(.6, features=x, **kw), lambda: FiedlerRule(x), .6),
    stratified=(lambda **kw: SALN(.6, features=x, which='stratified', **kw), lambda: FiedlerRule(x, 'stratified'), .6),
    knn=(lambda **kw: SALN(.6, features=x, graph='knn', n_neighbors=4, **kw),
         lambda: FiedlerRule(x, graph='knn', n_neighbors=4), .6),
    gstds=(lambda **kw: GSTDS(cos, features=x, **kw), lambda: FiedlerRule(x), cos),
    agreement=(lambda **kw: Agreement(.6, features=x, labels=noisy, **kw), lambda: AgreementRule(x, noisy), .6),
    widening=(lambda **kw: Agreement(.6, features=x, labels=noisy, trust=wider, **kw),
              lambda: AgreementRule(x, noisy, wider), .6),
    agreement_in_batch=(lambda **kw: Agreement(.6, features=x, labels=noisy, scope='batch', **kw),
                        lambda: AgreementRule(x, noisy, scope='batch'), .6),
    trusted=(lambda **kw: TrustedSubset(x[:, 1], .6, **kw), lambda: TrustRule(x[:, 1]), .6),
    smallest=(lambda **kw: IndexSelector(.6, rule=Smallest(), **kw), Smallest, .6),
    pruned=(lambda **kw: DynamicPruning('random', .6, **kw), DynamicRule, .6),
    every_other=(lambda **kw: DynamicPruning('random', .6, every=2, **kw), lambda: DynamicRule(every=2), .6),
    epsilon_greedy=(lambda **kw: DynamicPruning('epsilon_greedy', .6, **kw), lambda: DynamicRule('epsilon_greedy'), .6),
    ucb=(lambda **kw: DynamicPruning('ucb', .6, every=2, **kw), lambda: DynamicRule('ucb', every=2), .6),
    infobatch=(lambda **kw: InfoBatch(.6, **kw), InfoBatchRule, .6),
    static=(lambda **kw: StaticPruning(None, .6, **kw), StaticRule, .6),
    scores=(lambda **kw: StaticPruning(x[:, 1], .6, **kw), lambda: StaticRule(x[:, 1]), .6),
    even_then_odd=(lambda **kw: EvenThenOddSelector(.5, **kw), EvenThenOdd, .5))
by_epoch = 'pruned', 'every_other', 'epsilon_greedy', 'ucb', 'infobatch', 'static', 'scores', 'even_then_odd'

def by_callback(name, super_batch, drop_last, seed, bs=16):
    "The samples of each step, by epochs, from the fastai callback; the loader's order is the sampler's."
    drawn, kept = [], []
    def order():
        drawn.append(None)
        return epoch_order(n, Epoch(len(drawn)-1, seed)).tolist()
    class Kept(Callback):
        order, run_valid = 5, False
        def before_train(self): kept.append([])
        def before_batch(self): kept[-1].append(self.x[:, -1].long().tolist())
    dls = DataLoaders(FastaiLoader(data, bs=bs, get_idxs=order, drop_last=drop_last), FastaiLoader(data[:9], bs=9))
    cb = pairs[name][0](seed=seed, super_batch=super_batch)
    learn = Learner(dls, Net(), CrossEntropyLossFlat(), lr=.5, opt_func=SGD, cbs=[cb, Kept()])
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epochs)
    return kept

def sampler_of(name, super_batch=None, drop_last=False, seed=0, bs=16, **kw):
    _, rule, ratio = pairs[name]
    return CuratedBatchSampler(rule(), bs, ratio, super_batch, seed, drop_last=drop_last, n=n, n_epochs=n_epochs, **kw)

def trained(sampler, epochs=n_epochs, net=None, num_workers=0, **kw):
    "The same from a plain loop, with one loss per sample told to the sampler."
    net, kept = net or Net(), []
    opt = torch.optim.SGD(net.parameters(), .5)
    loader = DataLoader(data, batch_sampler=sampler, num_workers=num_workers, **kw)
    for _ in range(epochs):
        kept.append([])
        for xb, yb in loader:
            idx = xb[:, -1].long()
            assert idx.tolist() == sampler.indices(len(kept[-1])).tolist()
            losses = F.cross_entropy(net(xb), yb, reduction='none')
            scale = len(idx)/min(sampler.size, n) if isinstance(sampler.rule, InfoBatchRule) else 1
            ((losses*sampler.weights(idx)).mean()*scale).backward()
            opt.step(); opt.zero_grad()
            sampler.update(idx, losses)
            kept[-1].append(idx.tolist())
        assert len(kept[-1]) == len(loader)
    return kept

# The same kept indices

@pytest.mark.parametrize('drop_last', [True, False])
@pytest.mark.parametrize('super_batch', [True, False])
@pytest.mark.parametrize('name', pairs)
def test_keeps_what_the_callback_keeps(name, super_batch, drop_last):
    bs = 8 if super_batch else 16
    for seed in (0, 5):
        expect = by_callback(name, super_batch, drop_last, seed, bs)
        assert len({str(e) for e in expect}) == n_epochs
        assert trained(sampler_of(name, super_batch, drop_last, seed, bs)) == expect
    workers = dict(num_workers=2, persistent_workers=True)
    assert trained(sampler_of(name, super_batch, drop_last, seed, bs), **workers) == expect
    if not drop_last and name == 'extremes' and not super_batch: assert len(expect[0][-1]) == 2     # of a ragged 7


@pytest.mark.parametrize('name', ['random', 'extremes', 'ucb', 'infobatch', 'static'])
def test_the_default_super_batch_is_the_callbacks(name):
    expect = by_callback(name, None if name in by_epoch else False, False, 0)
    assert trained(sampler_of(name)) == expect


def test_the_oracle_can_differ():
    "Another seed, another ratio, another size: other samples."
    base = trained(sampler_of('random'))
    for other in (sampler_of('random', seed=1), sampler_of('random', bs=15), sampler_of('static')):
        assert trained(other) != base

# Epochs

def test_epochs_advance_by_themselves_and_are_set():
    free, told = sampler_of('random'), sampler_of('random')
    epochs = [list(free) for _ in range(3)]
    assert len({str(e) for e in epochs}) == 3
    for e in (2, 0, 0, 1):
        told.set_epoch(e)
        assert list(told) == epochs[e]
    assert list(told) == epochs[2]              # on from the last one
    broken = sampler_of('random')
    next(iter(broken))                          # an epoch that is left early is over, too
    assert list(broken) == epochs[1]
    for wrong in (-1, 1.5, None):
        with pytest.raises(ValueError, match='epoch must be a whole number of at least 0'): told.set_epoch(wrong)


def test_persistent_workers_read_each_epoch_once():
    "PyTorch's loader asks for an iterator twice before the first epoch."
    sampler, direct = sampler_of('extremes'), sampler_of('extremes')
    loader = DataLoader(data, batch_sampler=sampler, num_workers=2, persistent_workers=True)
    for _ in range(3): assert [b[:, -1].long().tolist() for b, _ in loader] == list(direct)


def test_len_is_the_number_of_steps_of_the_epoch_under_way():
    sampler = sampler_of('gstds', True, bs=8)
    sizes = []
    for e in range(n_epochs):
        sampler.set_epoch(e)
        sizes.append(len(sampler))
        assert len(list(sampler)) == sizes[-1] == len(sampler)
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    ucb = sampler_of('ucb')
    assert len(ucb) == 3                        # of 41 samples; nothing has been learned yet


def test_a_schedule_goes_on_after_its_end():
    sampler = sampler_of('gstds')
    sampler.set_epoch(n_epochs + 2)
    assert [len(b) for b in sampler][:-1] == [11]*6        # 0.3 of 16 removed

# Rules that learn

@pytest.mark.parametrize('name', ['ucb', 'epsilon_greedy', 'infobatch'])
def test_losses_that_never_come_are_missed(name):
    sampler = sampler_of(name)
    list(sampler)
    with pytest.raises(RuntimeError, match=r'got none in the last epoch: call sampler.update\(indices, losses\)'):
        list(sampler)
    sampler.update(torch.arange(n), torch.rand(n))      # now they come, and it is still the second epoch
    assert list(sampler) and sampler.place.epoch == 1
    peeked = sampler_of(name)
    next(iter(peeked))                          # a look at a batch needs none
    assert trained(peeked)
    for quiet in ('random', 'pruned', 'static'):
        sampler = sampler_of(quiet)
        for _ in range(3): assert list(sampler)


def test_what_update_refuses():
    sampler = sampler_of('ucb')
    idx = next(iter(sampler))
    with pytest.raises(ValueError, match=r"one loss per sample \(reduction='none'\)"): sampler.update(idx, 1.)
    with pytest.raises(ValueError, match='one loss per sample'): sampler.update(idx, torch.ones(3))
    for wrong, error in (([n], 'must be from 0 to 102'), ([-1], 'must be from 0 to 102')):
        sampler = sampler_of('ucb'); list(sampler)
        sampler.update(wrong, torch.ones(1))
        with pytest.raises(ValueError, match=error): list(sampler)
    sampler = sampler_of('ucb'); list(sampler)
    sampler.update([1], torch.tensor([float('nan')]))
    with pytest.raises(ValueError, match='has training diverged'): list(sampler)


def test_weights_are_infobatchs_alone():
    sampler = sampler_of('infobatch')
    trained(sampler, 1)
    next(iter(sampler))
    w = sampler.weights(torch.arange(n))
    assert set(w.tolist()) == {1., 2.5} and w.dtype == torch.float32
    assert sampler_of('random').weights([1, 2]).tolist() == [1, 1]
    sampler.set_epoch(n_epochs - 1); list(sampler)
    assert sampler.weights(torch.arange(n)).tolist() == [1]*n

# The state

def through_file(state):
    torch.save(state, f := io.BytesIO()); f.seek(0)
    return torch.load(f, weights_only=True)

@pytest.mark.parametrize('epoch, step', [(0, 1), (1, 0), (2, 2), (2, 'last'), (3, 'end'), (1, 'end')])
@pytest.mark.parametrize('name', pairs)
def test_resumes_bit_exactly(name, epoch, step):
    "Stopped in an epoch, at its last batch, and after its end; the state goes through a file, read without pickle."
    sampler, net, kept, saved = sampler_of(name), Net(), [], None
    opt = torch.optim.SGD(net.parameters(), .5)
    def loop(sampler, epochs, saving):
        nonlocal saved
        for e in epochs:
            for i, idx in enumerate(sampler):
                losses = F.cross_entropy(net(torch.stack([data[j][0] for j in idx])), y[idx], reduction='none')
                (losses*sampler.weights(idx)).mean().backward(); opt.step(); opt.zero_grad()
                sampler.update(idx, losses)
                kept.append((e, idx))
                if saving and e == epoch and (i == step or step == 'last' and i == len(sampler) - 1):
                    saved = sampler.state_dict(), copy.deepcopy(net.state_dict()), len(kept)
            if saving and e == epoch and step == 'end':
                saved = sampler.state_dict(), copy.deepcopy(net.state_dict()), len(kept)
    loop(sampler, range(n_epochs + 1), True)
    state, weights, done = saved
    expect, kept[:], end = kept[done:], [], copy.deepcopy(net.state_dict())
    net.load_state_dict(weights)
    resumed = sampler_of(name)
    list(resumed)                               # whatever it did before
    resumed.load_state_dict(through_file(state))
    loop(resumed, range(epoch + (step == 'end'), n_epochs + 1), False)
    assert kept == expect and all(torch.equal(a, b) for a, b in zip(end.values(), net.state_dict().values()))


def test_a_state_is_not_changed_by_what_follows():
    sampler = sampler_of('ucb')
    trained(sampler, 2)
    state = sampler.state_dict()
    before = copy.deepcopy(state)
    trained(sampler, 2)
    assert str(state) == str(before)
    again = sampler_of('ucb'); again.load_state_dict(state); trained(again, 2)
    assert str(state) == str(before)


def test_scores_computed_anew_between_epochs_are_chosen_by_and_saved():
    sampler, other = (CuratedBatchSampler(AgreementRule(x, noisy, .3), 16, .6) for _ in range(2))
    first = list(sampler)
    sampler.rule.set_features(x.flip(0))
    other.load_state_dict(through_file(sampler.state_dict()))
    anew = list(sampler)
    assert list(other) == anew
    sampler.set_epoch(0)
    assert list(sampler) != first


def test_workers_fetch_ahead_so_the_loop_says_how_far_it_is():
    sampler, expect = sampler_of('random'), list(sampler_of('random'))
    it = iter(DataLoader(data, batch_sampler=sampler, num_workers=2))
    for _ in range(2): next(it)
    assert sampler.state_dict()['position'] > 2
    resumed = sampler_of('random')
    resumed.load_state_dict(sampler.state_dict(batches_done=2))
    assert list(resumed) == expect[2:]
    del it


def test_states_of_other_samplers_are_refused():
    state = sampler_of('random').state_dict()
    for other, what in ((sampler_of('random', seed=2), 'seed=0, this one has 2'),
                        (sampler_of('random', bs=9), 'batch_size=16'), (sampler_of('static'), "rule='RandomRule'"),
                        (sampler_of('random', True), 'super_batch=None'),
                        (sampler_of('random', rank=0, world_size=2), 'world_size=1, this one has 2')):
        with pytest.raises(ValueError, match=what): other.load_state_dict(state)
    mine, other = (sampler_of('ucb', rank=r, world_size=2) for r in (0, 1))
    mine.update(next(iter(mine)), torch.rand(16))
    state = mine.state_dict()
    with pytest.raises(ValueError, match='only rank 0 has seen, and this is rank 1'): other.load_state_dict(state)

# Several ranks

@pytest.mark.parametrize('super_batch', [None, True, False])
@pytest.mark.parametrize('name', pairs)
def test_ranks_have_equal_steps_and_no_sample_twice(name, super_batch):
    for world_size in (2, 3):
        samplers = [sampler_of(name, super_batch, bs=8, rank=r, world_size=world_size) for r in range(world_size)]
        epochs, rule = [[list(s) for s in samplers]], pairs[name][1]()
        if name not in ('ucb', 'epsilon_greedy', 'infobatch'): epochs += [[list(s) for s in samplers]]
        for ranks in epochs:
            assert len({str([len(b) for b in batches]) for batches in ranks}) == 1
            seen = list(chain(*chain(*ranks)))
            assert len(set(seen)) == len(seen) and len(seen) >= 8
            if name not in by_epoch: continue
            # all ranks read parts of one choice
            epoch = Epoch(epochs.index(ranks), n_epochs=n_epochs)
            whole = plan_rule(rule, epoch_order(n, epoch), 8, pairs[name][2], epoch, super_batch)
            assert len(set(seen) - {i for s in whole.steps for i in s.kept.tolist()}) <= 1


def test_losses_of_other_processes_need_a_group():
    sampler = sampler_of('ucb', rank=0, world_size=2)
    for idx in sampler: sampler.update(idx, torch.rand(len(idx)))
    assert len(sampler) == 2                    # of the last epoch: `len` waits for no other process
    sampler.set_epoch(1)
    assert len(sampler) == 2
    with pytest.raises(RuntimeError, match='all 2 processes, but this one is in a group of 1'): list(sampler)

# Arguments

def test_what_is_refused():
    for make, error, match in (
        (lambda: CuratedBatchSampler(FiedlerRule(x[:50]), 8, n=n), ValueError,
         'features of 50 samples, but the training set has 103'),
        (lambda: CuratedBatchSampler(StaticRule(x[:50, 0]), 8, n=n), ValueError, 'scores of 50 samples'),
        (lambda: CuratedBatchSampler(RandomRule(), 8), ValueError, r'give n=len\(train_set\)'),
        (lambda: CuratedBatchSampler(RandomRule(), 8, n=0), ValueError, 'n must be a whole number'),
        (lambda: CuratedBatchSampler(RandomRule(), 0, n=n), ValueError, 'batch_size must be a whole number'),
        (lambda: CuratedBatchSampler(RandomRule(), 8, 1.5, n=n), ValueError, '0 <= filter_ratio < 1'),
        (lambda: CuratedBatchSampler(RandomRule(), 8, 'most', n=n), ValueError, '0 <= filter_ratio < 1'),
        (lambda: CuratedBatchSampler(RandomRule(), 8, lambda share: 2., n=n, n_epochs=2), ValueError,
         '0 <= filter_ratio < 1'),
        (lambda: CuratedBatchSampler(RandomRule(), 8, cos, n=n), ValueError,
         'a schedule of the filter ratio .* give n_epochs'),
        (lambda: CuratedBatchSampler(InfoBatchRule(), 8, n=n), ValueError, 'InfoBatchRule .* give n_epochs'),
        (lambda: CuratedBatchSampler(TrustRule(x[:, 0], wider), 8), ValueError, 'a function .* give n_epochs'),
        (lambda: CuratedBatchSampler(RandomRule(), 8, n=n, n_epochs=0), ValueError, 'n_epochs must be a whole number'),
        (lambda: CuratedBatchSampler(RandomRule(), 8, n=n, rank=2, world_size=2), ValueError, 'rank .* from 0 to 1'),
        (lambda: CuratedBatchSampler(RandomRule(), 8, n=n, world_size=2), ValueError, 'both rank and world_size'),
        (lambda: CuratedBatchSampler(RandomRule, 8, n=n), TypeError, 'rule must be a rule such as'),
        (lambda: list(CuratedBatchSampler(RandomRule(), 8, n=5, drop_last=True)), ValueError, 'has no step: 5'),
        (lambda: list(CuratedBatchSampler(RandomRule(), 8, n=1, rank=0, world_size=2)), ValueError, 'no step'),
        (lambda: list(CuratedBatchSampler(Rule(), 8, n=5)), TypeError, 'a BatchRule or an EpochRule')):
        with pytest.raises(error, match=match): make()


def test_extreme_sizes():
    assert [len(b) for b in CuratedBatchSampler(RandomRule(), 1, n=5)] == [1]*5     # nothing to remove from one
    assert [len(b) for b in CuratedBatchSampler(RandomRule(), 64, .99, n=n)] == [2, 2]
    assert [len(b) for b in CuratedBatchSampler(RandomRule(), 500, n=n)] == [20]
    assert sorted(chain(*CuratedBatchSampler(RandomRule(), 16, 0., n=n))) == list(range(n))
    for rule in (InfoBatchRule(), DynamicRule('ucb')):      # nothing removed: the rule is not asked
        sampler = CuratedBatchSampler(rule, 16, 0., n=n, n_epochs=2)
        assert sorted(chain(*sampler)) == list(range(n)) and sampler.weights([1]).tolist() == [1]

# Without fastai

def test_imports_no_fastai(fresh):
    "Nor do the modules that it is made of: they are all loaded here."
    loaded = fresh("import json, sys, spectral_curation.train.sampler; import spectral_curation.train.trust_rules; "
                   "print(json.dumps(sorted(sys.modules)))")
    heavy = {m.split('.')[0] for m in loaded} & {'fastai', 'fastcore', 'matplotlib', 'pandas', 'sklearn', 'torchvision',
                                                'accelerate', 'lightning', 'transformers'}
    assert not heavy
    for module in ('rules', 'trust_rules', 'epoch_rules', 'plan', 'epochs'):
        assert f'spectral_curation.train.{module}' in loaded
