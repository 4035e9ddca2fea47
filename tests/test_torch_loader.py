"fastai given plain PyTorch loaders: each selector says what to do, and both ways that it names work."
from itertools import chain

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.utils.data import DataLoader

from spectral_curation.train.rules import FiedlerRule
from spectral_curation.train.by_index import GSTDS, RandomSubset, SALN
from spectral_curation.train.by_loss import SelectiveBackprop, TopLoss
from spectral_curation.train.by_reference import JEST, RHO
from spectral_curation.train.by_epoch import DynamicPruning, InfoBatch, StandardShort, StaticPruning
from spectral_curation.train.sampler import CuratedBatchSampler

n = 80
x = torch.randn(n, 5, generator=torch.Generator().manual_seed(0))
data = [(torch.cat([a, torch.tensor([float(i)])]), int(a[0] > 0)) for i, a in enumerate(x)]     # each says which it is

class Seen(Callback):
    order, run_valid = 9, False
    def before_fit(self): self.epochs = []
    def before_train(self): self.epochs.append([])
    def before_batch(self): self.epochs[-1].append(self.xb[0][:, -1].long().tolist())

def learner(dls, *cbs): return Learner(dls, nn.Linear(6, 2), CrossEntropyLossFlat(), lr=.01, cbs=[*cbs, Seen()])
def fit(learn, epochs=2):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return learn.seen.epochs
def plain(**kw): return DataLoaders(DataLoader(data, **(kw or dict(batch_size=16, shuffle=True))), DataLoader(data, 16))

selectors = dict(saln=lambda: SALN(.5, features=x), gstds=lambda: GSTDS(features=x), random=lambda: RandomSubset(.5),
                 top_loss=lambda: TopLoss(.5), backprop=lambda: SelectiveBackprop(.5),
                 jest=lambda: JEST(.5, method='hard'), rho=lambda: RHO(.5, torch.rand(n)),
                 pruned=lambda: DynamicPruning('ucb', .5), infobatch=lambda: InfoBatch(.5),
                 static=lambda: StaticPruning(None, .5), short=lambda: StandardShort(.5))

@pytest.mark.parametrize('name', selectors)
def test_each_selector_says_what_to_do(name):
    learn = learner(plain(), cb := selectors[name]())
    what_to_do = r'from_dsets\(train_ds, valid_ds\); or keep it.*batch_sampler=CuratedBatchSampler\(rule'
    with pytest.raises(TypeError, match=what_to_do): fit(learn)
    learn.remove_cb(cb)
    assert sorted(chain(*fit(learn, 1)[0])) == list(range(n))       # the learner trains as before without it


def test_the_sampler_in_a_fastai_learner():
    "The loader is PyTorch's own, fastai's learner trains on what it reads, and counts its steps."
    def sampler(): return CuratedBatchSampler(FiedlerRule(x), 16, .5)
    learn = learner(plain(batch_sampler=sampler()))
    direct = sampler()
    assert fit(learn, 3) == [list(direct) for _ in range(3)] and len(direct) == 5
    assert len(learn.recorder.losses) == 15


def test_its_data_set_in_a_fastai_loader():
    dls = DataLoaders.from_dsets(data, data[:16], bs=16, num_workers=0, drop_last=False)
    learn = learner(dls, SALN(.5, features=x))
    assert [len(b) for b in fit(learn, 1)[0]] == [8]*5
