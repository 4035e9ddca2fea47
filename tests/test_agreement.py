"Label agreement where sizes, classes and files are unusual, against dense linear algebra."
import numpy as np
import pytest
import torch
from scipy.linalg import eigh

from spectral_curation.select.agreement import agreement_select, batch_agreement, graph_agreement, label_agreement, label_issues
from spectral_curation.select.label_graph import spectral_coordinates


def clusters(n, d=12, classes=4, seed=0, shares=None, spread=2.):
    "Features around one centre per class, and their classes."
    rng = np.random.default_rng(seed)
    y = rng.choice(classes, n, p=shares)
    return rng.normal(size=(classes, d))[y]*spread + rng.normal(size=(n, d)), y


def dense(x, y, k):
    "Agreement by the full hat matrix of the centred affinity's first k eigenvectors."
    n, classes = len(x), y.max()+1
    u = x/np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300)
    p = np.linalg.svd(u - u.mean(0), full_matrices=False)[0][:, :k]
    hat = p @ p.T + 1/n
    target, h = np.eye(classes)[y], np.diag(hat)[:, None]
    t = (hat @ target - h*target)/(1-h) - np.bincount(y, minlength=classes)/n
    given = t[np.arange(n), y].copy()
    t[np.arange(n), y] = -np.inf
    return given - t.max(1)


@pytest.mark.parametrize('n, k', [(7, 2), (60, 5), (300, 12)])
def test_against_the_dense_hat_matrix(n, k):
    x, y = clusters(n)
    y = np.unique(y, return_inverse=True)[1]
    np.testing.assert_allclose(label_agreement(x, y, k), dense(x, y, k), atol=1e-5)


def test_more_rows_than_a_chunk_from_a_memory_map(tmp_path):
    x, y = clusters(9000)
    np.save(tmp_path/'x.npy', x.astype(np.float32))
    mapped = np.load(tmp_path/'x.npy', mmap_mode='r')
    np.testing.assert_allclose(label_agreement(mapped, y, 8), label_agreement(torch.from_numpy(x), y, 8), atol=1e-4)
    with_nan = np.array(mapped)
    with_nan[8500, 3] = np.nan
    with pytest.raises(ValueError, match='in row 8500'): label_agreement(with_nan, y, 8)


def test_rare_classes_need_balance():
    "Class shares of 1:50 and 30% wrong labels: in the plain form the right labels of rare classes are outvoted."
    x, y = clusters(4000, d=20, shares=[.49, .49, .01, .01], spread=.4)
    rng = np.random.default_rng(1)
    noisy = np.where(rng.random(len(y)) < .3, rng.integers(0, 4, len(y)), y)
    rare = (y > 1) & (noisy == y)
    supported = [float((label_agreement(x, noisy, 16, balance)[rare] > 0).float().mean()) for balance in (0., 1.)]
    assert supported[1] > supported[0] + .2


def test_weights_are_those_of_weighted_least_squares():
    "One explicit weighted fit without the sample, for each sample, in the basis of the weighted Gram matrix."
    x, y = clusters(40, classes=3, seed=3)
    w = (1/np.bincount(y))[y]
    u = x/np.linalg.norm(x, axis=1, keepdims=True)
    u = u - (w[:, None]*u).sum(0)/w.sum()
    values, q = np.linalg.eigh((w[:, None]*u).T @ u)
    z = u @ q[:, ::-1][:, :4]/np.sqrt(values[::-1][:4])
    design, target, root = np.c_[np.ones(40), z], np.eye(3)[y], np.sqrt(w)[:, None]
    shares, expect = (w[:, None]*target).sum(0)/w.sum(), []
    for i in range(40):
        rest = np.arange(40) != i
        fit = np.linalg.lstsq((root*design)[rest], (root*target)[rest], rcond=None)[0]
        t = design[i] @ fit - shares
        expect.append(t[y[i]] - np.delete(t, y[i]).max())
    np.testing.assert_allclose(label_agreement(x, y, 4, 1.), expect, atol=1e-5)


@pytest.mark.parametrize('dtype', [np.int8, np.int64, np.uint16, bool, str, object])
def test_labels_of_any_type(dtype):
    x, y = clusters(80, classes=2)
    names = np.array(['no', 'yes'])[y].astype(object) if dtype is object else y.astype(dtype)
    np.testing.assert_allclose(label_agreement(x, names, 4), label_agreement(x, y, 4))
    assert set(label_issues(x, names)['given']) <= set(names.tolist() if dtype is not object else ['no', 'yes'])


@pytest.mark.parametrize('x, y', [
    (np.ones((20, 3)), np.arange(20) % 2),             # duplicates alone: no signal
    (np.zeros((20, 3)), np.arange(20) % 2),            # rows of zeros
    (np.eye(5), np.arange(5)),                         # as many classes as samples
    (np.eye(3)[[0, 1]], np.array([0, 1])),             # two samples
])
def test_degenerate_sets_have_finite_answers(x, y):
    a = graph_agreement(x, y)
    assert a.value.isfinite().all() and a.given.isfinite().all() and ((0 <= a.proposed) & (a.proposed < len(a.classes))).all()


def test_batches_at_once_are_the_batches_one_by_one():
    x, y = clusters(120)
    at_once = batch_agreement(x.reshape(3, 40, 12), y.reshape(3, 40), 6)
    for i in range(3):
        np.testing.assert_allclose(at_once[i], batch_agreement(x[40*i:40*i+40], y[40*i:40*i+40], 6), atol=1e-12)


def test_choice_is_seeded_and_of_the_right_size():
    a = torch.randn(100, generator=torch.Generator().manual_seed(0))
    for ratio in (0., .3, .8, .99):
        one, two = (agreement_select(a, ratio, generator=torch.Generator().manual_seed(5)) for _ in range(2))
        assert torch.equal(one, two) and len(set(one.tolist())) == len(one) == max(1, round(100*(1-ratio)))
    kept = agreement_select(a, .8, trust=.3)
    assert set(kept.tolist()) <= set(a.topk(30).indices.tolist())


@pytest.mark.parametrize('n, classes, k', [(12, 2, 1), (30, 5, 4), (45, 9, 11)])
def test_against_refits_without_each_sample(n, classes, k):
    "scipy's eigenvectors of the centred affinity, and one least squares fit for each sample, which has not seen it."
    x, y = clusters(n, classes=classes, seed=n)
    y = np.unique(y, return_inverse=True)[1]
    u = x/np.linalg.norm(x, axis=1, keepdims=True)
    center = np.eye(n) - 1/n
    signals = eigh(center @ u @ u.T @ center, subset_by_index=(n-k, n-1))[1]
    np.testing.assert_allclose(spectral_coordinates(x, k).square().sum(1)/n, (signals**2).sum(1), atol=1e-5)
    design, target, a = np.c_[np.ones(n), signals], np.eye(y.max()+1)[y], graph_agreement(x, y, k)
    for i in range(n):
        rest = np.arange(n) != i
        t = design[i] @ np.linalg.lstsq(design[rest], target[rest], rcond=None)[0] - target.mean(0)
        others = np.where(np.arange(len(t)) == y[i], -np.inf, t)
        assert abs(a.given[i] - t[y[i]]) < 1e-5 and abs(a.proposed_value[i] - others.max()) < 1e-5
        assert others[a.proposed[i]] > others.max() - 1e-5


@pytest.mark.parametrize('balance', [0., .7])
@pytest.mark.parametrize('change', ['scale', 'rotate', 'rows', 'classes'])
def test_invariances(change, balance):
    x, y = clusters(90, seed=7)
    a, rng = label_agreement(x, y, 6, balance), np.random.default_rng(0)
    order = rng.permutation(90) if change == 'rows' else np.arange(90)
    if change == 'scale': x = x*rng.uniform(1e-3, 1e3, (90, 1))
    if change == 'rotate': x = x @ np.linalg.qr(rng.normal(size=(12, 12)))[0]
    if change == 'classes': y = np.array(['d', 'b', 'a', 'c'])[y]
    np.testing.assert_allclose(label_agreement(x[order], y[order], 6, balance), a[order], atol=1e-5)


def test_duplicates_and_rows_of_zeros_against_the_dense_hat_matrix():
    x, y = clusters(40)
    other = np.where(np.arange(40) < 5, (y+1) % 4, y)                   # the copies of five rows have another label
    twice, labels = np.r_[x, x], np.r_[y, other]
    np.testing.assert_allclose(label_agreement(twice, labels, 8), dense(twice, labels, 8), atol=1e-5)
    assert (label_agreement(twice, labels, 8)[40:45] < label_agreement(twice, labels, 8)[:5]).all()
    zeros = np.r_[x, np.zeros((6, 12))]
    labels = np.r_[y, np.arange(6) % 4]
    np.testing.assert_allclose(label_agreement(zeros, labels, 8), dense(zeros, labels, 8), atol=1e-5)


@pytest.mark.parametrize('fit', ['least_squares', 'logistic'])
@pytest.mark.parametrize('labels, error, says', [
    (['a']*30, ValueError, "the only one given is"),
    (np.arange(29) % 2, ValueError, '30 rows of features need 30 labels, got 29'),
    (np.eye(30, dtype=int), ValueError, r'call this once for each label'),             # several labels a sample
    (np.linspace(0, 1, 30), TypeError, 'for regression use classes, e.g. quantiles'),
    ([1.]*29 + [np.nan], ValueError, 'row 29 is NaN'),
    (['a', 'b', None]*10, ValueError, r'row 2 is missing \(10 in all\)'),
])
def test_labels_that_are_no_classes_are_refused(fit, labels, error, says):
    with pytest.raises(error, match=says): label_issues(np.random.default_rng(0).normal(size=(30, 4)), labels, fit=fit)


@pytest.mark.parametrize('fit', ['least_squares', 'logistic'])
def test_issues_of_string_labels_name_their_rows(fit):
    x, y = clusters(200, spread=3.)
    names = np.array(['ape', 'bee', 'cat', 'dog'])
    given = y.copy()
    given[[3, 50, 120]] = (y[[3, 50, 120]] + 2) % 4
    issues = label_issues(x, names[given].tolist(), fit=fit)
    assert set(issues['index'][:3]) == {3, 50, 120}
    assert (issues['given'][:3] == names[given[issues['index'][:3]]]).all()
    assert (issues['proposed'][:3] == names[y[issues['index'][:3]]]).all()
    assert (np.diff(issues['agreement']) >= 0).all() and (issues['agreement'] < 0).all()
    np.testing.assert_allclose(issues['given_value'] - issues['proposed_value'], issues['agreement'], atol=1e-4)


def test_labels_of_an_object_column_stay_what_they_are():
    "As a pandas column of mixed origin gives them: whole numbers are not turned into strings."
    x, y = clusters(60, classes=3)
    assert graph_agreement(x, (y*5 + 5).astype(object), 4).classes.tolist() == [5, 10, 15]


def test_batches_hold_fewer_samples_than_there_are_classes():
    x, _ = clusters(6)
    y = np.array([90, 3, 3, 41, 90, 7])
    a = batch_agreement(x, y, 2)
    assert a.isfinite().all()
    np.testing.assert_allclose(a, batch_agreement(x, np.unique(y, return_inverse=True)[1], 2), atol=1e-12)
    with pytest.raises(ValueError, match=r'in 1 row\(s\): \(0, 2\)'):
        batch_agreement(np.where(np.arange(6)[:, None] == 2, np.nan, x)[None], y[None])


@pytest.mark.parametrize('options, says', [
    (dict(n_components=13), 'n_components must be a whole number from 1 to 12; got 13'),
    (dict(balance=1.1), 'balance must be from 0 to 1, got 1.1'),
    (dict(fit='ridge'), "fit must be least_squares or logistic; got 'ridge'"),
    (dict(fit='logistic', balance=.5), 'balance=0.5'),
])
def test_options_out_of_range_are_named(options, says):
    x, y = clusters(60)
    for f in (graph_agreement, label_agreement, label_issues):
        with pytest.raises(ValueError, match=says): f(x, y, **options)
