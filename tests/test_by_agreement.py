"Training on labels that the graph supports: one choice however it is read, resumed, exported or shared out."
import csv

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import SchedCos, SchedLin     # also Learner.lr_find
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner, load_learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import set_seed
from sklearn.datasets import load_digits
from torch import nn

from spectral_curation.select.agreement import label_agreement, label_issues
from spectral_curation.train.by_agreement import Agreement, TrustedSubset
from spectral_curation.train.by_loss import SmallLoss
from spectral_curation.train.checkpoint import Checkpoint
from spectral_curation.train.examples import digits_learner, small_digits
from spectral_curation.lab.data import digits_dls
from spectral_curation.lab.label_noise import Noise, inject_noise

n, bs, epochs = 301, 32, 4
digits, classes = (torch.tensor(a) for a in load_digits(return_X_y=True))
digits, given = digits.float()/16, torch.tensor(inject_noise(classes[:301].numpy(), 10, .3))
is_right = given == classes[:n]

class Kept(Callback):
    "What was trained on, step by step: the indices that the selector reports, and the samples that came."
    order, run_valid = 5, False
    def __init__(self, selector): self.selector = selector
    def before_fit(self): self.steps = []
    def before_batch(self):
        idx = self.selector.kept_idx
        assert torch.equal(self.x, digits[idx]) and torch.equal(self.y, given[idx])
        self.steps.append(idx.tolist())

def learner(selector, seed=0, num_workers=0):
    set_seed(seed)
    train, valid = [*zip(digits[:n], given)], [*zip(digits[n:400], classes[n:400])]
    dls = DataLoaders(DataLoader(train, bs=bs, shuffle=True, num_workers=num_workers), DataLoader(valid, bs=64))
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    return Learner(dls, model, CrossEntropyLossFlat(), lr=.1, cbs=selector)

def agreement(filter_ratio=.5, **kw): return Agreement(filter_ratio, features=digits[:n], labels=given, **kw)

def trained(selector, *cbs, epochs=epochs, **kw):
    learn, kept = learner(selector, **kw), Kept(selector)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=[kept, *cbs])
    return kept.steps, [p.detach().clone() for p in learn.model.parameters()]

def same(a, b): return a[0] == b[0] and all(map(torch.equal, a[1], b[1]))

kinds = dict(positive={}, share=dict(trust=.4), widening=dict(trust=SchedLin(.2, 1.)), batch=dict(scope='batch'),
             batch_share=dict(scope='batch', trust=.5), within=dict(trust=.5, within_classes=True),
             balanced=dict(balance=.5), refreshed=dict(refresh=(.25, .6)),
             scheduled=dict(filter_ratio=SchedCos(.8, .3)))


@pytest.mark.parametrize('kind', kinds)
def test_one_choice_with_workers_in_the_batch_and_again(kind):
    first = trained(agreement(**kinds[kind]))
    assert same(first, trained(agreement(**kinds[kind])))
    assert same(first, trained(agreement(before_decode=False, **kinds[kind])))
    if kind in ('positive', 'refreshed'): assert same(first, trained(agreement(**kinds[kind]), num_workers=2))
    assert first[0] != trained(agreement(seed=1, **kinds[kind]))[0]


@pytest.mark.parametrize('kind', ['positive', 'batch', 'refreshed'])
def test_super_batches_keep_the_loaders_batch_size(kind):
    read = [trained(agreement(super_batch=True, before_decode=b, **kinds[kind])) for b in (True, False)]
    assert same(*read)
    sizes = [len(s) for s in read[0][0]]
    assert set(sizes[:4] + sizes[5:9]) == {bs} and len(sizes) == 5*epochs      # 301 = 4*64 + 45 candidates


@pytest.mark.parametrize('kind', ['positive', 'within', 'refreshed'])
def test_what_is_trained_on_is_mostly_right(kind):
    "70% of the labels are right. Where a batch has enough trusted ones, no other is trained on."
    steps, _ = trained(cb := agreement(**kinds[kind]), epochs=12)
    shares = [float(is_right[s].float().mean()) for s in steps]
    assert np.mean(shares) > .93
    if kind == 'positive':
        trusted = label_agreement(digits[:n], given) > 0
        enough = [s for s in steps if len(s) == bs//2 and trusted[s].all()]
        assert len(enough) > .8*len(steps)


class Stop(Callback):
    order = 70      # after Checkpoint
    def __init__(self, at): self.at = at
    def after_epoch(self):
        if self.epoch == self.at: raise KeyboardInterrupt

@pytest.mark.parametrize('at', [0, 1, 2])
@pytest.mark.parametrize('kind', ['positive', 'widening', 'batch', 'refreshed', 'scheduled'])
def test_resumed_bit_exactly(tmp_path, kind, at):
    "Also where agreement was computed anew before the stop: it is in the file, with what it proposes."
    whole = trained(cb := agreement(**kinds[kind]), Checkpoint(tmp_path/'whole.pt'))
    with pytest.raises(KeyboardInterrupt): trained(agreement(**kinds[kind]), Checkpoint(tmp_path/'run.pt'), Stop(at))
    steps, weights = trained(again := agreement(**kinds[kind]), Checkpoint(tmp_path/'run.pt'), seed=at+5)
    assert all(map(torch.equal, weights, whole[1]))
    assert steps == whole[0][len(whole[0])//epochs*(at+1):]
    if kind != 'batch': assert np.array_equal(again.issues(), cb.issues())


def test_a_finished_run_gives_back_its_refreshed_agreement(tmp_path):
    trained(cb := agreement(refresh=(.5,)), Checkpoint(tmp_path/'run.pt'))
    trained(again := agreement(refresh=(.5,)), Checkpoint(tmp_path/'run.pt'))
    assert np.array_equal(again.issues(), cb.issues())
    assert not np.array_equal(cb.issues()['index'], label_issues(digits[:n], given)['index'])


def test_a_second_fit_begins_with_the_references_agreement():
    cb, first = agreement(refresh=(.5,)), label_agreement(digits[:n], given).double()
    learn = learner(cb)
    seen = []
    class Look(Callback):
        order, run_valid = 6, False
        def before_batch(self): seen.append(torch.equal(cb.rule.scores, first))
    with learn.no_bar(), learn.no_logging():
        for _ in range(2): learn.fit(2, cbs=Look())
    per_epoch = len(seen)//4
    assert seen == ([True]*per_epoch + [False]*per_epoch)*2


@pytest.mark.parametrize('kind', ['positive', 'refreshed', 'scheduled'])
def test_lr_find_leaves_no_trace(kind):
    first = trained(agreement(**kinds[kind]))
    cb = agreement(**kinds[kind])
    learn = learner(cb)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=25, show_plot=False)
    assert cb.epochs_begun == 0 and cb._refreshed == 0
    assert torch.equal(cb.rule.scores, label_agreement(digits[:n], given).double())
    kept = Kept(cb)
    set_seed(0)
    fresh = learner(agreement())     # draws the same initial weights, and leaves the same random states
    learn.model.load_state_dict(fresh.model.state_dict())
    learn.dls.train.rng = fresh.dls.train.rng
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=kept)
    assert kept.steps == first[0]


def test_exported_without_features(tmp_path):
    images, labels = small_digits()
    cb = Agreement(features=images[:512].flatten(1), refresh=(.5,), trust=SchedLin(.3, 1.))
    learn = digits_learner(cb, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    with learn.no_bar(): preds = learn.get_preds()[0]
    learn.export('run.pkl')
    assert (tmp_path/'run.pkl').stat().st_size < 400_000        # the features alone would take 1.5 MB
    loaded = load_learner(tmp_path/'run.pkl')
    assert loaded.agreement.rule is None
    loaded.dls = learn.dls
    with loaded.no_bar(), loaded.no_logging():
        assert torch.allclose(loaded.get_preds()[0], preds, atol=1e-5)
        with pytest.raises(ValueError, match='learn.agreement.features = '): loaded.fit(1)
        with pytest.raises(ValueError, match='learn.agreement.features = '): loaded.agreement.issues()
        loaded.agreement.features = images[:512].flatten(1)
        loaded.fit(1)


def test_labels_are_not_exported(tmp_path):
    images, labels = small_digits()
    features, labels = images[:512].flatten(1), labels[:512]
    learn = digits_learner(Agreement(features=features, labels=labels), path=tmp_path)
    learn.export('run.pkl')
    loaded = load_learner(tmp_path/'run.pkl')
    loaded.dls, loaded.agreement.features = learn.dls, features
    with loaded.no_bar(), loaded.no_logging():
        with pytest.raises(ValueError, match='learn.agreement.labels = '): loaded.fit(1)
        loaded.agreement.labels = labels
        loaded.fit(1)
    assert loaded.agreement.issues().tolist() == label_issues(features, labels).tolist()


def refused(selector, error, words):
    "Before the first step."
    learn = learner(selector)
    before = [p.detach().clone() for p in learn.model.parameters()]
    with learn.no_bar(), learn.no_logging(), pytest.raises(error, match=words): learn.fit(1)
    assert all(map(torch.equal, before, learn.model.parameters()))

def test_targets_without_a_class():
    "Several labels per sample, numbers, samples that would have to be opened: each is refused with what to do."
    several = nn.functional.one_hot(given, 10)
    refused(Agreement(features=digits[:n], labels=several), ValueError, 'call this once for each label')
    refused(Agreement(features=digits[:n], labels=given.double()/3), TypeError, 'for regression use classes')
    refused(Agreement(features=digits[:n]), ValueError, 'labels=')
    refused(Agreement(features=digits[:n], labels=given[:5]), ValueError, '301 labels, got 5')
    refused(Agreement(features=digits[:n], labels=torch.zeros(n).long()), ValueError, 'the only one given')
    refused(Agreement(features=digits[:5], labels=given), ValueError, '301')
    bad = digits[:n].clone()
    bad[7, 3] = float('nan')
    refused(Agreement(features=bad, labels=given), ValueError, 'row 7|sample 7')

@pytest.mark.parametrize('targets', [torch.rand(640), torch.nn.functional.one_hot(small_digits()[1], 10)])
def test_targets_of_the_loaders_own(targets):
    images = small_digits()[0]
    learn = digits_learner(Agreement(features=images[:512].flatten(1)), labels=targets)
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='several labels.*quantiles'): learn.fit(1)


def test_options_out_of_range():
    for kw, words in ((dict(trust=0.), 'got 0.0'), (dict(trust='some'), "got 'some'"), (dict(trust=True), 'got True'),
                      (dict(scope='epoch'), "got 'epoch'"), (dict(fit='ridge'), "got 'ridge'"),
                      (dict(balance=2.), 'got 2.0'), (dict(scope='batch', balance=.5), "need scope='dataset'")):
        refused(agreement(**kw), ValueError, words)
    for kw, words in ((dict(refresh=(0.,)), 'above 0'), (dict(refresh=(.5,), scope='batch'), "needs scope='dataset'"),
                      (dict(filter_ratio=1.), 'got 1'), (dict(filter_ratio=lambda share: 1.5), 'got 1.5')):
        with pytest.raises(ValueError, match=words): agreement(**kw)


def test_digits_are_mostly_right_from_noise_to_file(tmp_path):
    "From injected noise to the file of the labels to check, with the names of classes; nothing is trained."
    dls = digits_dls(noise=Noise(.3), n_train=400, num_workers=0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    learn = Learner(dls, model, CrossEntropyLossFlat(), cbs=Agreement(cache=False))
    table = learn.agreement.issues()
    learn.agreement.write_issues(tmp_path/'a'/'issues.csv')
    with open(tmp_path/'a'/'issues.csv', newline='') as f: rows = list(csv.DictReader(f))
    assert [int(r['index']) for r in rows] == table['index'].tolist()
    assert list(rows[0])[:3] == ['index', 'given', 'proposed']
    assert [p.name for p in (tmp_path/'a').iterdir()] == ['issues.csv']
    first = table['index'][:60]
    assert (np.array([int(r['proposed']) for r in rows[:60]]) == dls.own_labels[first]).mean() > .8
    assert not hasattr(learn, 'opt') or learn.opt is None


def test_names_of_classes_and_of_files(tmp_path):
    from fastai.vision.all import CategoryBlock, DataBlock, ImageBlock, get_image_files, parent_label
    from PIL import Image
    rng = np.random.default_rng(0)
    for k, name in enumerate(('dark', 'light')):
        (tmp_path/name).mkdir()
        for i in range(20):
            light = (k == 1) != (i == 0)        # the first of each lies in the wrong folder
            Image.fromarray(np.uint8(rng.integers(0, 60, (8, 8, 3)) + 180*light)).save(tmp_path/name/f'{i:02d}.png')
    block = DataBlock((ImageBlock, CategoryBlock), get_items=get_image_files, get_y=parent_label,
                      splitter=lambda files: (list(range(len(files))), [0]))
    dls = block.dataloaders(tmp_path, bs=8, num_workers=0)
    light = torch.tensor([np.asarray(Image.open(f)).mean() > 128 for f in dls.train_ds.items])
    noise = torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    features = nn.functional.one_hot(light.long(), 2).float() + .01*noise
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), cbs=Agreement(features=features))
    learn.agreement.write_issues(tmp_path/'issues.csv')
    rows = list(csv.DictReader(open(tmp_path/'issues.csv')))
    assert sorted((r['given'], r['proposed']) for r in rows) == [('dark', 'light'), ('light', 'dark')]
    assert sorted(r['file'] for r in rows) == [str(tmp_path/name/'00.png') for name in ('dark', 'light')]
    axs = learn.agreement.show_issues()
    assert {ax.get_title().splitlines()[0] for ax in axs.flat} == {'dark', 'light'}
    for ax, row in zip(axs.flat, rows):
        assert np.abs(ax.images[0].get_array() - np.asarray(Image.open(row['file']))).max() <= 1


def test_scores_of_ones_own():
    scores = label_agreement(digits[:n], given)
    assert same(trained(TrustedSubset(scores, .5)), trained(agreement()))
    refused(TrustedSubset(scores[:7]), ValueError, '301; got 7')
    with pytest.raises(ValueError, match='first in row 2'): TrustedSubset([1., 2., float('inf')])


class Losses(Callback):
    "Of all samples of each batch, before the choice; and of those chosen."
    order, run_valid = -6, False
    def before_fit(self): self.all, self.kept = [], []
    def before_batch(self):
        with torch.no_grad(): every = nn.functional.cross_entropy(self.model(self.x), self.y, reduction='none')
        self.all.append(every)
    def after_loss(self):
        with torch.no_grad(): self.kept.append(nn.functional.cross_entropy(self.pred, self.y, reduction='none'))

@pytest.mark.parametrize('super_batch', [False, True])
def test_small_loss_keeps_the_smallest(super_batch):
    "Co-teaching's rule: wrong labels have large losses at first, so fewer of them are trained on than by chance."
    steps, _ = trained(SmallLoss(.5, super_batch=super_batch), losses := Losses(), epochs=8)
    for every, kept in zip(losses.all, losses.kept):
        torch.testing.assert_close(kept, every.sort().values[:len(kept)])
        assert len(kept) == len(every)//2
    late = [i for s in steps[len(steps)//2:] for i in s]
    assert float(is_right[late].float().mean()) > float(is_right.float().mean()) + .1
