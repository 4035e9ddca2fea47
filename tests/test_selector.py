"Selection in training where processes and loaders differ: same runs in two processes, exported learners, loaders that repeat samples."
from operator import itemgetter

import fastai.callback.data, fastai.callback.progress
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import DataLoader
from fastai.learner import Learner
from torch import nn

from spectral_curation.train.by_index import RandomSubset, SALN

tagged = [(torch.full((3, 4, 4), float(i)), i % 10) for i in range(100)]    # each image says which it is

class Seen(Callback):
    "What the model was given, and what the selector says it was given."
    order, run_valid = 5, False
    def before_fit(self): self.given, self.said = [], []
    def before_batch(self):
        self.given.append(self.x[:, 0, 0, 0].long().tolist()); self.said.append(self.learn.random_subset.kept_idx.tolist())

# Processes

training = '''
import hashlib, json, sys, torch
import fastai.callback.progress
from fastai.basics import *
from spectral_curation.train.by_index import RandomSubset, SALN

class Kept(Callback):
    order, run_valid = 5, False
    def before_fit(self): self.idxs = []
    def before_batch(self): self.idxs.append(next(cb for cb in self.learn.cbs if hasattr(cb, 'kept_idx')).kept_idx.tolist())

def run(selector, num_workers, seed):     # the seed is the selector's
    set_seed(0)
    x = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
    ds = [(a, (a[0] > 0).long()) for a in x]
    dls = DataLoaders(DataLoader(ds, bs=16, shuffle=True, num_workers=num_workers), DataLoader(ds[:16], bs=16))
    model, kept = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), Kept()
    selector = RandomSubset(.6, seed=seed) if selector == 'random' else SALN(.6, features=x, which=selector, seed=seed)
    with Learner(dls, model, nn.CrossEntropyLoss(), lr=.1, cbs=[selector, kept]).no_bar() as l, l.no_logging(): l.fit(2)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return hashlib.sha256(weights.numpy().tobytes()).hexdigest(), kept.idxs

torch.set_num_threads(1)
print(json.dumps({f'{s} {seed}': [run(s, w, seed) for w in (0, 2)] for s, seed in (('random', 0), ('random', 1), ('extremes', 0), ('stratified', 0))}))
'''

def test_same_seed_same_run_in_every_process(fresh):
    one, other = fresh(training), fresh(training)
    assert one == other
    for name, (alone, with_workers) in one.items():
        assert alone == with_workers, name
        assert [len(b) for b in alone[1]] == [6, 6, 6, 6, 6, 4]*2   # the last batch has 10 samples
    assert len({str(runs) for runs in one.values()}) == len(one)    # another seed or selector: another run

prediction = '''
import json, sys, torch
import fastai.callback.progress
from fastai.learner import load_learner
learn = load_learner(sys.argv[1])
with learn.no_bar(): preds = learn.get_preds(dl=learn.dls.test_dl(torch.load(sys.argv[2])))[0]
print(json.dumps([preds.tolist(), [m for m in sys.modules if m.startswith('spectral_curation')]]))
'''

def test_exported_learner_predicts_the_same_in_a_fresh_process(fresh, tmp_path):
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    items = [dict(x=a, y=int(a[0] > 0)) for a in x]
    dls = Datasets(items, [[itemgetter('x')], [itemgetter('y')]], splits=(range(48), range(48, 60))).dataloaders(bs=16, num_workers=0, device='cpu')
    learn = Learner(dls, nn.Linear(6, 2), nn.CrossEntropyLoss(), lr=.1, cbs=SALN(.5, features=x[:48]), path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
        expect = learn.get_preds(dl=dls.test_dl(items))[0]
    learn.export('learner.pkl'); torch.save(items, tmp_path/'items.pt')
    preds, modules = fresh(prediction, tmp_path/'learner.pkl', tmp_path/'items.pt')
    torch.testing.assert_close(torch.tensor(preds), expect, atol=1e-6, rtol=0)
    assert 'spectral_curation.train.by_index' in modules      # the selector came with it

# Loaders that do not read each sample once

class Oversampling(DataLoader):
    "Reads the last ten samples ten times as often as they are there."
    def get_idxs(self): return self.rng.choices([*range(90), *[*range(90, 100)]*10], k=self.n)

def datasets(): return Datasets([dict(x=x, y=y) for x, y in tagged], [[itemgetter('x')], [itemgetter('y')]], splits=(range(100), range(20)))
def weighted(): return datasets().weighted_dataloaders(np.arange(100.)**2, bs=16, num_workers=0, device='cpu')
def partial_epochs(): return datasets().partial_dataloaders(70, bs=16, num_workers=0, device='cpu')
def oversampled(): return DataLoaders(Oversampling(tagged, bs=16, num_workers=0), DataLoader(tagged, bs=16))
def given_order(): return DataLoaders(DataLoader(tagged, bs=16, num_workers=0, get_idxs=lambda: [5]*40 + [*range(60)]), DataLoader(tagged, bs=16))

@pytest.mark.parametrize('dls, repeats', [(weighted, True), (partial_epochs, False), (oversampled, True), (given_order, True)])
@pytest.mark.parametrize('filter_ratio', [0, .5])
def test_indices_are_those_of_the_images(dls, repeats, filter_ratio):
    dls, seen = dls(), Seen()
    before = vars(dls.train).get('get_idxs')
    with Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), nn.CrossEntropyLoss(), lr=1e-6, cbs=[RandomSubset(filter_ratio), seen]).no_bar() as l, l.no_logging(): l.fit(2)
    assert seen.said == seen.given and len(seen.said) == 2*len(dls.train)
    epoch = sum(seen.said[:len(dls.train)], [])
    assert (len(set(epoch)) < len(epoch)) == repeats
    assert vars(dls.train).get('get_idxs') is before
