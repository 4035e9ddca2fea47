"Selectors by loss: the count follows the ratio in force, and what can't be scored is refused before the first step."
import numpy as np
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

from spectral_curation.train.by_loss import JEST, RHO, SelectiveBackprop, TopLoss

n, bs, classes = 80, 20, 3
x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
y = torch.arange(n) % classes
losses = torch.rand(n, generator=torch.Generator().manual_seed(1))
outputs = torch.randn(n, classes, generator=torch.Generator().manual_seed(2))
makers = dict(top_loss=TopLoss, selective_backprop=SelectiveBackprop, rho=lambda r: RHO(r, losses), jest=lambda r: JEST(r, outputs),
              jest_pairs=lambda r: JEST(r, outputs, pairs=True), jest_hard=lambda r: JEST(r, method='hard'))


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


@pytest.mark.parametrize('name', makers)
def test_the_count_follows_a_scheduled_ratio(name):
    selector, count = makers[name](.5), Count()
    selector.ratio_at = lambda pct, batch=0: .8 - .1*batch
    fit(learner(selector), cbs=[count])
    assert count.kept == [4, 6, 8, 10]*2


@pytest.mark.parametrize('name', makers)
def test_the_count_is_the_one_that_was_asked_for(name):
    "However the base decides how many stay: the choice has no count of its own."
    selector = makers[name](.9)
    asked = []
    def before_batch():
        type(selector).before_batch(selector)
    class Ask(Callback):
        order, run_valid = 5, False
        def before_batch(self):
            if len(self.x) < 2: return
    learn = learner(selector)
    seen = []
    select = selector.select
    def three(idx, k):
        seen.append(len(select(idx, 3)))
        return select(idx, k)
    selector.select = three
    fit(learn, 1)
    assert seen == [3]*4


@pytest.mark.parametrize('make', [lambda ref: JEST(.5, ref), lambda ref: JEST(.5, ref, pairs=True), lambda ref: RHO(.5, ref)])
@pytest.mark.parametrize('columns', [1, 2, 5])
def test_a_reference_with_other_classes(make, columns):
    learn = learner(make(torch.randn(n, columns)))
    with pytest.raises(ValueError, match=f'{columns} columns.*3'): fit(learn)
    assert untouched(learn)


def test_a_reference_with_other_classes_is_refused_even_where_selection_begins_later():
    selector = RHO(.5, torch.randn(n, 5))
    selector.ratio_at = lambda pct, batch=0: 0. if pct < .5 else .5
    learn = learner(selector)
    with pytest.raises(ValueError, match='5 columns'): fit(learn)
    assert untouched(learn)


def test_a_scorer_with_other_classes():
    learn = learner(TopLoss(.5, scorer=nn.Linear(8, 5)))
    with pytest.raises(ValueError, match='scorer.*5.*3'): fit(learn)
    assert untouched(learn)


def mean_only(pred, y): return F.cross_entropy(pred, y)
def mean_whatever(pred, y, reduction='mean'): return F.cross_entropy(pred, y)


@pytest.mark.parametrize('loss_func, words', [(mean_only, "mean_only can't give one loss a sample"), (mean_whatever, 'one loss a sample')])
@pytest.mark.parametrize('make', [lambda: TopLoss(.5), lambda: SelectiveBackprop(.5, start=.5), lambda: RHO(.5, losses), lambda: JEST(.5, losses)])
def test_a_loss_that_gives_only_the_mean_is_refused_before_the_first_step(make, loss_func, words):
    learn = learner(make(), loss_func)
    with pytest.raises(TypeError, match=words): fit(learn)
    assert untouched(learn)


def test_pairs_need_no_loss_of_samples(): fit(learner(JEST(.5, outputs, pairs=True), mean_only))


def test_nothing_is_asked_of_the_loss_at_ratio_0(): fit(learner(TopLoss(0.), mean_only))
