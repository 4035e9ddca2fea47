"Selectors by loss: the count follows the ratio in force, and what can't be scored is refused before the first step."
from functools import partial

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from torch import nn
from torch.nn import functional as F

from spectral_curation.train.by_loss import SelectiveBackprop, TopLoss
from spectral_curation.train.by_reference import JEST, RHO

n, bs, classes = 80, 20, 3
x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
y = torch.arange(n) % classes
losses = torch.rand(n, generator=torch.Generator().manual_seed(1))
outputs = torch.randn(n, classes, generator=torch.Generator().manual_seed(2))
cases = dict(top_loss=(TopLoss, {}), selective_backprop=(SelectiveBackprop, {}), rho=(RHO, dict(reference=losses)),
             jest=(JEST, dict(reference=outputs)), jest_pairs=(JEST, dict(reference=outputs, pairs=True)), jest_hard=(JEST, dict(method='hard')))


def learner(selector, loss_func=None):
    set_seed(0)
    data = list(zip(x, y))
    dls = DataLoaders(DataLoader(data, bs=bs, shuffle=True), DataLoader(data[:20], bs=20))
    return Learner(dls, nn.Linear(8, classes), loss_func or CrossEntropyLossFlat(), lr=.1, cbs=selector)


def fit(learn, epochs=2, cbs=()):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=list(cbs))


def untouched(learn):
    "No step was taken: the weights are the initial ones."
    torch.manual_seed(0)
    fresh = learner(None).model
    return all(torch.equal(p, q) for p, q in zip(learn.model.parameters(), fresh.parameters()))


class Count(Callback):
    order, run_valid = 5, False
    def before_fit(self): self.kept = []
    def before_batch(self): self.kept.append(len(self.x))


def scheduled(cls, schedule):
    "A subclass whose filter ratio follows a schedule."
    class Scheduled(cls):
        def ratio_at(self, pct, batch=0): return schedule(pct, batch)
    return Scheduled


@pytest.mark.parametrize('cls, kwargs', cases.values(), ids=cases)
def test_the_count_follows_a_scheduled_ratio(cls, kwargs):
    count = Count()
    fit(learner(scheduled(cls, lambda pct, batch: .8 - .1*batch)(.5, **kwargs)), cbs=[count])
    assert count.kept == [4, 6, 8, 10]*2


@pytest.mark.parametrize('cls, kwargs', cases.values(), ids=cases)
def test_the_choice_has_no_count_of_its_own(cls, kwargs):
    "However the base decides how many stay, as many are chosen as `select` is asked for."
    asked = []
    class Three(cls):
        def select(self, idx, k):
            asked.append(len(super().select(idx, 3)))
            return super().select(idx, k)
    fit(learner(Three(.9, **kwargs)), 1)
    assert asked == [3]*4


def test_another_reference_takes_effect():
    "Given to a selector that was prepared for one on the same data."
    class References(Callback):
        order, run_valid = 5, False
        def before_batch(self): seen.append(torch.equal(self.rho.reference_losses(), self.rho.reference[self.rho.idx]))
    seen, learn = [], learner(RHO(.5, losses))
    fit(learn, 1, [References()])
    learn.rho.reference = -losses
    fit(learn, 1, [References()])
    assert seen == [True]*8


@pytest.mark.parametrize('cls, kwargs', [(JEST, {}), (JEST, dict(pairs=True)), (RHO, {})])
@pytest.mark.parametrize('columns', [1, 2, 5])
def test_a_reference_with_other_classes(cls, kwargs, columns):
    learn = learner(cls(.5, torch.randn(n, columns), **kwargs))
    with pytest.raises(ValueError, match=f'{columns} columns.*3'): fit(learn)
    assert untouched(learn)


def test_a_reference_with_other_classes_is_refused_even_where_selection_begins_later():
    learn = learner(scheduled(RHO, lambda pct, batch: 0. if pct < .5 else .5)(.5, torch.randn(n, 5)))
    with pytest.raises(ValueError, match='5 columns'): fit(learn)
    assert untouched(learn)


def test_a_scorer_with_other_classes():
    learn = learner(TopLoss(.5, scorer=nn.Linear(8, 5)))
    with pytest.raises(ValueError, match='scorer.*5.*3'): fit(learn)
    assert untouched(learn)


def mean_only(pred, y): return F.cross_entropy(pred, y)
def mean_whatever(pred, y, reduction='mean'): return F.cross_entropy(pred, y)


refused_losses = [(mean_only, "mean_only can't give one loss per sample"), (mean_whatever, 'one loss per sample')]


@pytest.mark.parametrize('loss_func, words', refused_losses)
@pytest.mark.parametrize('make', [partial(TopLoss, .5), partial(SelectiveBackprop, .5, start=.5), partial(RHO, .5, losses),
                                  partial(JEST, .5, losses)])
def test_a_loss_that_gives_only_the_mean_is_refused_before_the_first_step(make, loss_func, words):
    learn = learner(make(), loss_func)
    with pytest.raises(TypeError, match=words): fit(learn)
    assert untouched(learn)


def test_pairs_need_no_loss_of_samples(): fit(learner(JEST(.5, outputs, pairs=True), mean_only))


def test_nothing_is_asked_of_the_loss_at_ratio_0(): fit(learner(TopLoss(0.), mean_only))
