"Resuming: where the optimizer's state lies, and what the file holds."
import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, OptimWrapper
from fastai.torch_core import set_seed
from functools import partial
from torch import nn

from spectral_curation.train.by_index import RandomSubset
from spectral_curation.train.checkpoint import Checkpoint

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
x, y = torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3


def learner(path, seed=0, device='cpu', opt_func=Adam):
    set_seed(seed)
    data = list(zip(x, y))
    loaders = DataLoader(data, bs=20, shuffle=True, device=device), DataLoader(data[:20], bs=20, device=device)
    model, cbs = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)).to(device), [RandomSubset(.5), Checkpoint(path)]
    return Learner(DataLoaders(*loaders, device=device), model, CrossEntropyLossFlat(), lr=.1, opt_func=opt_func, cbs=cbs)


def fit(learn, epochs=3):
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)


class Stopped(Exception): pass


def stopped(learn, epochs=3):
    "The same training, broken off after the first epoch is saved."
    def stop(): raise Stopped('by the test')
    checkpoint = learn.checkpoint
    after_epoch = checkpoint.after_epoch
    checkpoint.after_epoch = lambda: (after_epoch(), stop())
    with pytest.raises(Stopped): fit(learn, epochs)


def tensors(o):
    if torch.is_tensor(o): yield o
    elif isinstance(o, dict):
        for v in o.values(): yield from tensors(v)
    elif isinstance(o, (list, tuple)):
        for v in o: yield from tensors(v)


def test_the_optimizers_state_lies_where_its_parameters_do(tmp_path):
    "The file is read to the CPU; parameters that lie elsewhere, here on the meta device, get their state there."
    from spectral_curation.train.checkpoint import load_optimizer_state
    first = learner(tmp_path/'run.pt')
    stopped(first)
    state = torch.load(tmp_path/'run.pt', map_location='cpu', weights_only=True)['opt']
    assert {t.device.type for t in tensors(state)} == {'cpu'}
    opt = Adam(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3)).to('meta').parameters(), lr=.1)
    load_optimizer_state(opt, state)
    assert len(found := [t for p in opt.all_params().itemgot(0) for t in tensors(dict(opt.state[p]))]) >= 8
    assert {t.device.type for t in found} == {'meta'}


@pytest.mark.parametrize('opt_func', [Adam, partial(OptimWrapper, opt=torch.optim.AdamW)])
@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=needs_gpu)])
def test_stopped_and_continued(tmp_path, device, opt_func):
    whole = learner(tmp_path/'whole.pt', device=device, opt_func=opt_func)
    fit(whole)
    stopped(learner(tmp_path/'run.pt', device=device, opt_func=opt_func))
    continued = learner(tmp_path/'run.pt', seed=9, device=device, opt_func=opt_func)
    fit(continued)
    for p, q in zip(whole.model.parameters(), continued.model.parameters()): assert torch.equal(p, q)
    assert whole.recorder.values == continued.recorder.values


def test_a_file_of_a_machine_with_gpus_goes_on_without(tmp_path):
    "Random states of devices that are not there are left alone."
    stopped(learner(tmp_path/'run.pt'))
    state = torch.load(tmp_path/'run.pt', weights_only=True)
    random = state['ranks'][0]['random']
    assert isinstance(random['torch_cuda_state'], list)
    random['torch_cuda_state'] = random['torch_cuda_state'] + [random['torch_state']]*(torch.cuda.device_count() + 2)
    torch.save(state, tmp_path/'run.pt')
    fit(learner(tmp_path/'run.pt', seed=9))
