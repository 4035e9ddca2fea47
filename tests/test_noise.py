"Wrong labels: the shares that are published, and validation and test labels as they are."
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from spectral_curation.lab.config import Config
from spectral_curation.lab.data import cifar10_dls, digits_dls
from spectral_curation.lab.label_noise import Noise, read_labels
from spectral_curation.lab.methods import methods
from spectral_curation.lab.prepare import make_dls, preparation_of, prepare
from spectral_curation.lab.run import run_config
from spectral_curation.train.rows import class_labels

shares = dict(worst=.402, random1=.172, aggregate=.090)     # of wrong labels, CIFAR-10N's paper (arXiv 2110.12088)


@pytest.mark.parametrize('column', shares)
def test_cifar10n(data_dir, column):
    "The human labels of all 50,000 training images."
    labels = read_labels(data_dir/'cifar10n.csv.gz', column)
    assert len(labels) == 50_000
    wrong = np.mean([label != name.split('/')[1] for name, label in labels.items()])
    assert wrong == pytest.approx(shares[column], abs=5e-4)


@pytest.fixture(scope='module')
def images(data_dir, tmp_path_factory):
    "Black images in the layout of CIFAR-10, named as in CIFAR-10N's file: 60 of each class, and 10 for testing."
    root = tmp_path_factory.mktemp('cifar10')
    by_class = {}
    for name in read_labels(data_dir/'cifar10n.csv.gz', 'clean'):
        by_class.setdefault(name.split('/')[1], []).append(name)
    for label, names in by_class.items():
        for part, files in (('train', names[:60]), ('test', [f'test/{label}/{i:04d}.jpg' for i in range(10)])):
            (root/part/label).mkdir(parents=True)
            for f in files: Image.new('RGB', (2, 2)).save((root/f).with_suffix('.png'))
    return root

def labels_of(dl): return [int(y) for y in dl.dataset.tls[-1]]
def own_labels(dls, dl): return [list(dls.vocab).index(p.parent.name) for p in dl.dataset.items]

@pytest.mark.parametrize('column', shares)
def test_only_training_labels_come_from_the_file(data_dir, images, column):
    file = data_dir/'cifar10n.csv.gz'
    dls = cifar10_dls(images, bs=16, num_workers=0, device='cpu', labels=column, label_file=file)
    train, valid, test = dls.loaders
    by_stem = {name.rsplit('.', 1)[0]: label for name, label in read_labels(file, column).items()}
    expect = [by_stem[p.relative_to(images).with_suffix('').as_posix()] for p in train.dataset.items]
    assert [dls.vocab[i] for i in labels_of(train)] == expect
    assert (dls.own_labels == own_labels(dls, train)).all() and class_labels(dls).tolist() == labels_of(train)
    assert np.mean(dls.own_labels != labels_of(train)) == pytest.approx(shares[column], abs=.07)
    for dl in (valid, test): assert labels_of(dl) == own_labels(dls, dl) and len(dl.dataset)
    assert not {*train.dataset.items} & ({*valid.dataset.items} | {*test.dataset.items})
    batch = next(iter(valid))[1]        # what is trained and tested with is what the loaders give
    assert batch.tolist() == own_labels(dls, valid)[:len(batch)]


@pytest.mark.parametrize('noise', [Noise(.4), Noise(1.), Noise(.3, [1, 2, 3, 4, 5, 6, 7, 8, 9, 0])])
def test_only_training_labels_are_injected(images, noise):
    clean, noisy = (cifar10_dls(images, num_workers=0, device='cpu', noise=o) for o in (Noise(), noise))
    train, valid, test = noisy.loaders
    own, now = noisy.own_labels, np.array(labels_of(train))
    assert (own == own_labels(noisy, train)).all() and (own == labels_of(clean.train)).all()
    assert (own != now).sum() == round(noise.share*len(own))
    if noise.to is not None: assert (now[own != now] == np.array(noise.to)[own[own != now]]).all()
    for dl in (valid, test): assert labels_of(dl) == own_labels(noisy, dl)
    again = cifar10_dls(images, num_workers=0, device='cpu', noise=noise)
    assert labels_of(again.train) == labels_of(train)
    other = cifar10_dls(images, num_workers=0, device='cpu', noise=noise._replace(seed=1))
    if noise.share < 1: assert labels_of(other.train) != labels_of(train)


def test_injected_and_given_together(data_dir, images):
    "Noise is added to the labels from the file; `own_labels` are the data set's own."
    given = dict(labels='worst', label_file=data_dir/'cifar10n.csv.gz', num_workers=0, device='cpu')
    dls, plain = cifar10_dls(images, noise=Noise(.5), **given), cifar10_dls(images, **given)
    changed = np.array(labels_of(dls.train)) != labels_of(plain.train)
    assert changed.sum() == round(.5*len(changed)) and (dls.own_labels == own_labels(dls, dls.train)).all()


def test_noisy_imagenette(data_dir):
    "The published file: a quarter, and half of the training labels are wrong; validation labels are all right."
    with tarfile.open(data_dir/'imagenette.tgz') as tar:
        member = next(m for m in tar if m.name.endswith('noisy_imagenette.csv'))
        rows = [line.split(',') for line in tar.extractfile(member).read().decode().split()]
    columns = {name: [row[i] for row in rows[1:]] for i, name in enumerate(rows[0])}
    own = np.array([path.split('/')[1] for path in columns['path']])
    is_valid = np.array([path.startswith('val') for path in columns['path']])
    for percent in (25, 50):
        wrong = np.array(columns[f'noisy_labels_{percent}']) != own
        assert wrong[~is_valid].mean() == pytest.approx(percent/100, abs=.01) and not wrong[is_valid].any()


def test_digits():
    clean, noisy = digits_dls(num_workers=0), digits_dls(num_workers=0, noise=Noise(.3))
    assert (np.array(labels_of(noisy.train)) != labels_of(clean.train)).sum() == round(.3*1079)
    for a, b in zip(clean.loaders[1:], noisy.loaders[1:]):
        assert labels_of(a) == labels_of(b)
        assert all(map(np.array_equal, (o['image'] for o in a.dataset.items), (o['image'] for o in b.dataset.items)))


@pytest.mark.parametrize('kind', ['symmetric', 'similar'])
def test_a_runs_data(tmp_path, kind):
    "The decoded loaders that runs share give each run its own training labels, and all the same others."
    config = dict(noise_kind=kind, device='cpu', cache=str(tmp_path), n_train=300, bs=100)
    clean, noisy, after = (make_dls(Config(noise=share, **config)) for share in (0., .4, 0.))
    def rows(dl): return [int(y) for b in dl for y in b[1]]
    assert (class_labels(noisy).numpy() != noisy.own_labels).sum() == 120
    assert sorted(rows(noisy.train)) == sorted(class_labels(noisy).tolist())
    assert class_labels(after).tolist() == class_labels(clean).tolist() == clean.own_labels.tolist()
    for a, b in zip(clean.loaders[1:], noisy.loaders[1:]): assert rows(a) == rows(b)


@pytest.mark.parametrize('name', ['fine', 'knn'])
def test_peers_find_right_labels(tmp_path, name):
    "From the reference's features and the labels as they are given; prepared once, with SALN and agreement."
    c = Config(method=name, noise=.3, filter_ratio=.5, device='cpu', cache=str(tmp_path))
    prepared, dls = prepare(c), make_dls(c)
    is_right = prepared.labels.numpy() == dls.own_labels
    assert is_right.mean() == pytest.approx(.7, abs=1e-3)
    selector = methods[name].make(c, prepared)
    best = np.argsort(-selector.scores.numpy(), kind='stable')[:len(is_right)//2]
    assert is_right[best].mean() > .9
    saln = replace(c, method='saln')
    assert preparation_of(c) == preparation_of(saln) and prepared.cost == prepare(saln).cost


@pytest.mark.parametrize('name', ['fine', 'knn', 'small_loss'])
def test_runs_of_peers(tmp_path, name):
    c = Config(method=name, noise=.3, filter_ratio=.5, device='cpu', cache=str(tmp_path), n_train=256, bs=64, epochs=2)
    record = run_config(c)
    scored = 256*2 if name == 'small_loss' else 0
    assert record['config']['method'] == name and record['config']['noise'] == .3
    assert [h['trained'] for h in record['history']] == [128, 128]
    assert sum(h['cost'] for h in record['history']) == scored + 3*256
