"Label agreement where sizes, classes and files are unusual, against dense linear algebra."
import numpy as np
import pytest
import torch

from spectral_curation.select.agreement import agreement_select, batch_agreement, graph_agreement, label_agreement, label_issues


def clusters(n, d=12, classes=4, seed=0, shares=None, spread=2.):
    "Features around one centre per class, and their classes."
    rng = np.random.default_rng(seed)
    y = rng.choice(classes, n, p=shares)
    return rng.normal(size=(classes, d))[y]*spread + rng.normal(size=(n, d)), y


def dense(x, y, k):
    "Agreement by the full hat matrix of the centred affinity's first k eigenvectors."
    n, classes = len(x), y.max()+1
    u = x/np.linalg.norm(x, axis=1, keepdims=True)
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
