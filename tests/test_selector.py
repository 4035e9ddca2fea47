"Selection in training: same runs in two processes, exported learners, odd batches, odd loaders, odd answers."
import re
from operator import itemgetter

import fastai.callback.data, fastai.callback.progress
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.data.core import DataLoaders, Datasets
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn

from spectral_curation.select.fiedler import fiedler_vector
from spectral_curation.select.spectral import fiedler_select
from spectral_curation.train.rules import BatchRule
from spectral_curation.train.selector import BatchSelector
from spectral_curation.train.by_index import GSTDS, IndexSelector, RandomSubset, SALN
from spectral_curation.train.by_loss import SelectiveBackprop, TopLoss
from spectral_curation.train.by_reference import JEST
from spectral_curation.train.by_epoch import EpochSelector, InfoBatch, StandardShort

tagged = [(torch.full((3, 4, 4), float(i)), i % 10) for i in range(100)]    # each image says which it is

class Seen(Callback):
    "What the model was given, and what the selector says it was given."
    order, run_valid = 5, False
    def before_fit(self): self.given, self.claimed = [], []
    def before_batch(self):
        self.given.append(self.x[:, 0, 0, 0].long().tolist())
        self.claimed.append(self.learn.random_subset.kept_idx.tolist())

# Processes

training = '''
import hashlib, json, sys, torch
import fastai.callback.progress
from fastai.basics import *
from spectral_curation.train.by_index import RandomSubset, SALN

class Kept(Callback):
    order, run_valid = 5, False
    def before_fit(self): self.idxs = []
    def before_batch(self):
        self.idxs.append(next(cb for cb in self.learn.cbs if hasattr(cb, 'kept_idx')).kept_idx.tolist())

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
print(json.dumps({f'{s} {seed}': [run(s, w, seed) for w in (0, 2)] for s,
                  seed in (('random', 0), ('random', 1), ('extremes', 0), ('stratified', 0))}))
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
    dls = Datasets(items, [[itemgetter('x')], [itemgetter('y')]], splits=(range(48), range(48, 60))).dataloaders(bs=16,
            num_workers=0, device='cpu')
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

def datasets():
    return Datasets([dict(x=x, y=y) for x, y in tagged], [[itemgetter('x')], [itemgetter('y')]],
                    splits=(range(100), range(20)))
def weighted(): return datasets().weighted_dataloaders(np.arange(100.)**2, bs=16, num_workers=0, device='cpu')
def partial_epochs(): return datasets().partial_dataloaders(70, bs=16, num_workers=0, device='cpu')
def oversampled(): return DataLoaders(Oversampling(tagged, bs=16, num_workers=0), DataLoader(tagged, bs=16))
def given_order():
    return DataLoaders(DataLoader(tagged, bs=16, num_workers=0, get_idxs=lambda: [5]*40 + [*range(60)]),
                       DataLoader(tagged, bs=16))

@pytest.mark.parametrize('dls, repeats',
                         [(weighted, True), (partial_epochs, False), (oversampled, True), (given_order, True)])
@pytest.mark.parametrize('filter_ratio', [0, .5])
def test_indices_are_those_of_the_images(dls, repeats, filter_ratio):
    dls, seen = dls(), Seen()
    before = vars(dls.train).get('get_idxs')
    with Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(48, 10)), nn.CrossEntropyLoss(), lr=1e-6,
                 cbs=[RandomSubset(filter_ratio), seen]).no_bar() as l, l.no_logging():
        l.fit(2)
    assert seen.claimed == seen.given and len(seen.claimed) == 2*len(dls.train)
    epoch = sum(seen.claimed[:len(dls.train)], [])
    assert (len(set(epoch)) < len(epoch)) == repeats
    assert vars(dls.train).get('get_idxs') is before


# Batches of which one sample would stay

class Normalized(nn.Sequential):
    def __init__(self): super().__init__(nn.Flatten(), nn.Linear(48, 4), nn.BatchNorm1d(4), nn.Linear(4, 10))


class Contrast(BatchSelector):
    def select(self, idx, k): return self.x.flatten(1).sum(1).topk(k).indices


class Steps(Callback):
    "How many samples each step trains on."
    order, run_valid = 5, False
    def before_fit(self): self.sizes = []
    def before_batch(self): self.sizes.append(len(self.xb[0]))


def features(n=100): return torch.rand(n, 6, generator=torch.Generator().manual_seed(0))
def loaders(n, bs=16, **kwargs):
    return DataLoaders(DataLoader(tagged[:n], bs=bs, shuffle=True, **kwargs), DataLoader(tagged[:20], bs=bs))
def trained(cb, dls, epochs=1, cbs=()):
    steps = Steps()
    learn = Learner(dls, Normalized(), CrossEntropyLossFlat(), lr=.01, cbs=[cb, steps, *cbs])
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs)
    return steps.sizes


by_batch = dict(random=RandomSubset, in_batch=lambda r: RandomSubset(r, before_decode=False), own=Contrast,
                loss=TopLoss,
                backprop=SelectiveBackprop, jest=lambda r: JEST(r, method='hard', n_chunks=2),
                saln=lambda r, n: SALN(r, features=features(n)), gstds=lambda r, n: GSTDS(r, features=features(n)),
                short=StandardShort)


@pytest.mark.parametrize('mix', [False, True])
@pytest.mark.parametrize('name', by_batch)
def test_no_step_of_one_sample(name, mix):
    "Two of a short last batch of three; a last batch of one is left out; and the accounts say so."
    for n, sizes, offered in ((35, [3, 3, 2], 35), (33, [3, 3], 32), (34, [3, 3, 2], 34)):
        cb = by_batch[name](.8, n) if name in ('saln', 'gstds') else by_batch[name](.8)
        assert trained(cb, loaders(n), cbs=[MixUp()]*mix) == sizes
        assert cb.trained == sum(sizes) and (cb.offered == offered or name == 'short')


def test_one_sample_where_there_is_no_other():
    "A data set of one, and a batch size of one."
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    for n, bs, sizes in ((1, 16, [1]), (3, 1, [1, 1, 1])):
        steps = Steps()
        learn = Learner(loaders(n, bs), model, CrossEntropyLossFlat(), lr=.01, cbs=[RandomSubset(.8), steps])
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        assert steps.sizes == sizes


def test_super_batch_of_one_or_two():
    "The end of the order: 80 candidates, then three, two or one."
    for n, sizes in ((83, [16, 2]), (82, [16, 2]), (81, [16])):
        for cb in (RandomSubset(.8, super_batch=True), TopLoss(.8, super_batch=True)):
            assert trained(cb, loaders(n)) == sizes


@pytest.mark.parametrize('form', [dict(super_batch=False), dict(before_decode=False)])
def test_no_step_of_one_chosen_sample(form):
    class Chosen(EpochSelector):
        def choose(self, n): return torch.tensor([0, 1, 2, 17, 32, 33])
    cb = Chosen(.8, **form)
    dls = DataLoaders(DataLoader(tagged[:40], bs=16), DataLoader(tagged[:20], bs=16))
    assert trained(cb, dls) == [3, 3] and cb.trained == 6       # the one that is alone in its batch joins the next


# What a selector may say

@pytest.mark.parametrize('answer, wrong', [([0]*8, [0]), ([-1, *range(7)], [-1]), ([*range(9, 16), 16], [16])])
def test_positions_that_are_none(answer, wrong):
    class Says(BatchSelector):
        def select(self, idx, k): return torch.tensor(answer)
    class SaysBefore(IndexSelector):
        def select(self, idx, k): return torch.tensor(answer)
    class Rule(BatchRule):
        def positions(self, indices, k, generators): return torch.tensor([answer]*len(indices))
    for cb, name in ((Says(.5), 'Says.select'), (SaysBefore(.5), 'SaysBefore.select'),
                     (SaysBefore(.5, before_decode=False), 'SaysBefore.select'),
                     (IndexSelector(.5, rule=Rule()), 'Rule.positions')):
        with pytest.raises(ValueError, match=re.escape(f'{name} must return each of its positions once')) as e:
            trained(cb, loaders(32))
        assert f'got {wrong}' in str(e.value)


# Another source, another data set

def test_other_features_take_effect():
    cb, other = SALN(.5, features=features()), features().flip(0)
    learn = Learner(loaders(100), Normalized(), CrossEntropyLossFlat(), lr=.01, cbs=cb)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        cb.features = other
        learn.fit(1)
    assert cb.positions.tolist() == fiedler_select(other[cb.idx], .5).tolist()


def test_another_reference_takes_effect(tmp_path):
    cb = SALN(.5, reference='pixels', cache=False)
    class Blue(nn.Module):
        def __init__(self): super().__init__(); self.fc = nn.Linear(48, 5)
        def forward(self, x): return self.fc(x.flatten(1))
    torch.manual_seed(0)
    images = [(torch.rand(3, 4, 4), i % 10) for i in range(40)]
    dls = DataLoaders(DataLoader(images, bs=16), DataLoader(images, bs=16))
    learn = Learner(dls, Normalized(), CrossEntropyLossFlat(), lr=.01, cbs=cb)
    with learn.no_bar(), learn.no_logging():
        learn.fit(1)
        before = cb.batch_features(torch.arange(4))
        cb.reference = Blue()
        learn.fit(1)
    assert cb.batch_features(torch.arange(4)).shape != before.shape


def test_the_vector_is_that_of_the_batch():
    "Also where the schedule keeps everything; and features may be a list."
    cb = GSTDS(lambda pct: .5*(pct < .5), features=features().tolist())
    assert cb.vector is None
    trained(cb, loaders(100), 2)
    assert len(cb.positions) == len(cb.idx)
    torch.testing.assert_close(cb.vector, fiedler_vector(features()[cb.idx]))


# What a loader may give

class Texts(nn.Module):
    def __init__(self): super().__init__(); self.fc = nn.Linear(3, 2)
    def forward(self, batch):
        assert [len(t) for t in batch['text']] == batch['ids'][:, 0].long().tolist()
        return self.fc(batch['ids'])


@pytest.mark.parametrize('before_decode', [True, False])
def test_a_batch_that_holds_strings(before_decode):
    items = [({'text': 'a'*i, 'ids': torch.full((3,), float(i))}, i % 2) for i in range(40)]
    dls = DataLoaders(DataLoader(items, bs=8, shuffle=True), DataLoader(items, bs=8))
    cb = RandomSubset(.5, before_decode=before_decode)
    with Learner(dls, Texts(), CrossEntropyLossFlat(), lr=.01, cbs=cb).no_bar() as learn, learn.no_logging():
        learn.fit(1)
    assert cb.trained == 20


class Stream:
    def __iter__(self): return iter(tagged)


@pytest.mark.parametrize('make',
                         [lambda: BatchSelector(0.), lambda: RandomSubset(.5), lambda: SALN(.5, features=features()),
                                  lambda: InfoBatch(.5), lambda: StandardShort(.5), lambda: TopLoss(.5)])
def test_a_data_set_without_length(make):
    "Refused before the first epoch, with the type of the data set."
    learn = Learner(DataLoaders(DataLoader(Stream(), bs=16), DataLoader(tagged, bs=16)), Normalized(),
                    CrossEntropyLossFlat(), cbs=make())
    with learn.no_bar(), learn.no_logging(), pytest.raises(TypeError,
                                                           match='data set of type Stream, without a length'):
        learn.fit(1)
    assert not learn.metrics
