"Logistic agreement, FINE, the neighbors' vote and the estimate of wrong labels, against plain ways to compute them."
import numpy as np
import pytest
import torch

from spectral_curation.select import agreement as module
from spectral_curation.select.agreement import Agreement, graph_agreement, logistic_agreement
from spectral_curation.select.label_scores import fine_scores, knn_vote, noise_share
from spectral_curation.train.trust_rules import AgreementRule


def clusters(n, d=10, classes=4, seed=0, noise=0., spread=2.):
    "Features around one centre per class, labels of which a share is wrong, and their classes."
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    given = np.where(rng.random(n) < noise, (y + rng.integers(1, classes, n)) % classes, y)
    return rng.normal(size=(classes, d))[y]*spread + rng.normal(size=(n, d)), given, y


def test_a_logistic_fit_has_not_seen_the_labels_that_it_judges(monkeypatch):
    x, given, _ = clusters(300, noise=.2)
    fold = torch.arange(300) % 3
    monkeypatch.setattr(module, '_stratified_folds', lambda codes, folds, seed: fold)
    before = logistic_agreement(x, given)
    changed = np.where(fold == 1, (given + 1) % 4, given)
    after = logistic_agreement(x, changed)
    same = [torch.stack([torch.maximum(a.given, a.proposed_value)])[0] for a in (before, after)]     # of all classes
    torch.testing.assert_close(same[0][fold == 1], same[1][fold == 1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(same[0][fold == 0], same[1][fold == 0], atol=1e-2)


def test_logistic_folds_are_seeded_stratified_and_shuffled():
    codes = torch.tensor([0]*100 + [1]*31 + [2]*2 + [3])
    fold = module._stratified_folds(codes, 3, 5)
    for c in range(4):
        sizes = torch.bincount(fold[codes == c], minlength=3)
        assert sizes.max() - sizes.min() <= 1
    assert torch.equal(fold, module._stratified_folds(codes, 3, 5))
    assert not torch.equal(fold, module._stratified_folds(codes, 3, 6))
    assert (fold[:100].diff().remainder(3) == 1).float().mean() < .6         # not 0, 1, 2, 0, 1, 2, ... in their order


def test_files_sorted_by_class_give_nothing_away():
    "Wrong labels of one kind lie side by side; the rows' order must not change what is found."
    from sklearn.metrics import roc_auc_score
    x, given, y = clusters(1500, noise=.3, spread=.7)
    order = np.argsort(y, kind='stable')
    found = [roc_auc_score(given[o] != y[o], -logistic_agreement(x[o], given[o]).value) for o in (np.arange(1500), order)]
    assert abs(found[0] - found[1]) < .015


@pytest.mark.parametrize('labels', [[0, 0, 1, 1], ['a', 'a', 'b', 'b', 'c'], [0]*9 + [1]*2 + [2]])
def test_logistic_agreement_of_tiny_and_lone_classes_is_finite(labels):
    x = np.random.default_rng(0).normal(size=(len(labels), 3))
    a = logistic_agreement(x, labels)
    assert all(v.isfinite().all() for v in (a.value, a.given, a.proposed_value))
    lone = [i for i, v in enumerate(labels) if labels.count(v) == 1]
    assert (a.value[lone] < 0).all()                    # no other sample has that label
    assert logistic_agreement(np.ones((len(labels), 3)), labels).value.isfinite().all()       # the graph has no signal


def test_logistic_values_are_log_probabilities():
    x, given, _ = clusters(400, classes=2, noise=.1)
    a = logistic_agreement(x, given)
    torch.testing.assert_close(a.given.exp() + a.proposed_value.exp(), torch.ones(400), atol=1e-4, rtol=0)
    assert a.n_components == 10                          # no more than features have dimensions


@pytest.mark.parametrize('kind', ['array', 'memory map', 'tensor', 'half'])
def test_fine_is_the_alignment_with_the_class_s_first_singular_vector(kind, tmp_path):
    x, given, _ = clusters(9100, d=6, classes=2, noise=.2)
    given[-3:] = 2                                       # a class of fewer samples than dimensions
    np.save(tmp_path/'x.npy', x)
    features = {'array': x, 'memory map': np.load(tmp_path/'x.npy', mmap_mode='r'), 'tensor': torch.from_numpy(x),
                'half': x.astype(np.float16)}[kind]
    scores, u = fine_scores(features, given), x/np.linalg.norm(x, axis=1, keepdims=True)
    for c in range(3):
        v = np.linalg.svd(u[given == c], full_matrices=False)[2][0]
        np.testing.assert_allclose(scores[given == c], (u[given == c] @ v)**2, atol=1e-5 if kind != 'half' else 1e-2)


@pytest.mark.parametrize('n, k', [(2, 1), (40, 3), (9000, 7)])
def test_the_vote_is_that_of_the_nearest_by_cosine(n, k):
    "9,000 rows are more than one block."
    x, given, _ = clusters(n, d=5, noise=.2)
    vote, u = knn_vote(x, given, k), x/np.linalg.norm(x, axis=1, keepdims=True)
    for i in range(0, n, max(1, n//50)):
        s = u @ u[i]
        s[i] = -np.inf
        share = np.bincount(given[np.argsort(-s)[:k]], minlength=4)/k
        assert abs(vote[i] - (share[given[i]] - np.delete(share, given[i]).max())) < 1e-5


def test_a_sample_has_no_vote_on_itself_but_its_copies_have():
    x = np.eye(4)[[0, 0, 1, 2]] + 1e-3
    assert knn_vote(x, ['a', 'b', 'c', 'd'], 1)[:2].tolist() == [-1., -1.]
    assert knn_vote(x, ['a', 'a', 'c', 'd'], 1)[:2].tolist() == [1., 1.]


@pytest.mark.parametrize('score', [fine_scores, knn_vote])
def test_scores_do_not_depend_on_scale_rotation_order_or_names(score):
    x, given, _ = clusters(300, noise=.2)
    rng, s = np.random.default_rng(0), score(x, given)
    order = rng.permutation(300)
    turned = (x*rng.uniform(.1, 10, (300, 1))) @ np.linalg.qr(rng.normal(size=(10, 10)))[0]
    np.testing.assert_allclose(score(turned[order], np.array([*'dbac'])[given[order]]), s[order], atol=1e-5)


@pytest.mark.parametrize('score', [fine_scores, knn_vote, logistic_agreement])
def test_scores_name_the_row_of_nan_and_wrong_shapes(score):
    x, given, _ = clusters(5000, d=3)
    x[4321, 1] = np.nan
    with pytest.raises(ValueError, match='in row 4321'): score(x, given)
    with pytest.raises(ValueError, match=r'got shape \[3\]'): score(x[0], given[:3])
    with pytest.raises(TypeError, match='float'): score(np.ones((20, 3), int), given[:20])
    with pytest.raises(ValueError, match='5000 rows of features need 5000 labels'): score(x, given[:-1])


@pytest.mark.parametrize('fit', ['least_squares', 'logistic'])
@pytest.mark.parametrize('noise', [0., .1, .3, .5])
def test_the_share_of_wrong_labels_is_estimated_without_clean_ones(noise, fit):
    x, given, y = clusters(6000, noise=noise, spread=1.)
    assert abs(noise_share(graph_agreement(x, given, fit=fit)) - (given != y).mean()) < .04


def test_the_estimate_counts_among_the_surest():
    value = torch.tensor([-.5, .2, .3, -.1, .9])
    a = Agreement(value, torch.tensor([.1, .7, .5, .2, .95]), torch.zeros(5, dtype=torch.int64),
                  torch.tensor([.6, .5, .2, .3, .05]), 1, np.arange(2))
    for surest, share in ((.2, 0.), (.4, 0.), (.6, 1/3), (1., 2/5)): assert noise_share(a, surest) == pytest.approx(share)


@pytest.mark.parametrize('fit', ['least_squares', 'logistic'])
def test_a_rule_trusts_all_but_the_estimated_share(fit):
    x, given, y = clusters(2000, noise=.3)
    rule = AgreementRule(x, given, trust='estimated', fit=fit)
    trusted = rule.trusted(torch.arange(2000)).numpy()
    assert abs(trusted.mean() - .7) < .05 and (given == y)[trusted].mean() > .93
    again = AgreementRule(x, given, trust='estimated', fit=fit)
    again.load_state_dict(rule.state_dict())
    assert torch.equal(again.trusted(torch.arange(2000)), torch.from_numpy(trusted))
    with pytest.raises(ValueError, match="fit must be least_squares or logistic; got 'svm'"): AgreementRule(x, given, fit='svm')
