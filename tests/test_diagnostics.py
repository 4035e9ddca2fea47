"What the log of a training holds: of batches that keep everything, too."
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from torch import nn

from spectral_curation.train.by_index import GSTDS
from spectral_curation.train.diagnostics import SelectionLog

x, y = torch.rand(80, 8, generator=torch.Generator().manual_seed(0)), torch.arange(80) % 3


def gaps(before_decode):
    "Mean spectral gap by epoch: of two epochs, the last batch of the first and all of the second keep everything."
    set_seed(0)
    data = list(zip(x, y))
    dls = DataLoaders(DataLoader(data, bs=20, shuffle=True), DataLoader(data[:20], bs=20))
    selector = GSTDS(schedule=lambda pct: .5 if pct < .3 else 0., features=x, before_decode=before_decode)
    learn, log = Learner(dls, nn.Linear(8, 3), CrossEntropyLossFlat(), lr=.1, cbs=selector), SelectionLog()
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=log)
    return log.gap


def test_batches_that_keep_everything_have_no_gap():
    "No Fiedler vector is computed for them, and that of the batch before says nothing of them."
    planned, in_batch = gaps(True), gaps(False)
    assert len(planned) == 1 and in_batch == pytest.approx(planned)
