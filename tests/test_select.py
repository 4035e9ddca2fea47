"The Fiedler selection against the paper's listing, scipy, closed forms, symmetries and nasty input."
import itertools, math, warnings
from fractions import Fraction

import numpy as np, pytest, scipy.linalg, scipy.sparse.linalg, torch
import torch.nn.functional as F
from sklearn.metrics.pairwise import cosine_similarity
from torch.overrides import TorchFunctionMode

from spectral_curation.select.fiedler import fiedler_from_affinity, fiedler_vector
from spectral_curation.select.graph import cosine_affinity, knn_affinity, laplacian, laplacian_kinds, unit_rows
from spectral_curation.select.history import (
    ForgettingCounter, History, el2n_scores, epsilon_greedy_keep, grand_last_layer_scores, grand_scores, keep_highest,
    ucb_keep)
from spectral_curation.select.losses import (
    class_pair_losses, gumbel_top_k, jest_logits, jest_select, random_select, rho_select, selective_backprop_select,
    top_loss_select)
from spectral_curation.select.ratio import candidates, n_keep
from spectral_curation.select.spectral import fiedler_select, select_by_vector, stratified_ranks, which_kinds

def rng_of(*key): return np.random.default_rng(key)
def kept(*args, **kwargs): return set(fiedler_select(*args, **kwargs).tolist())

def non_negative(rng, n):
    "[n, d] features as a network's last ReLU gives them, of one of three kinds."
    d = int(rng.integers(2, 65))
    kind = rng.integers(3)
    if kind == 0: return rng.random((n, d))
    if kind == 1: return rng.normal(size=(n, max(d, 16))).clip(0)   # half-sparse; rows of zeros, which leave the answer open, are rare
    return np.abs(rng.random((5, d))[rng.integers(5, size=n)] + .2*rng.normal(size=(n, d)))

def signed(rng, n):
    d = int(rng.integers(2, 65))
    return rng.normal(size=(n, d)) + rng.integers(2)*rng.normal(size=d)

def is_cut_clear(v, k, tol=1e-6):
    "Is |v| of the last one kept clearly larger than |v| of the first one removed?"
    a = np.sort(np.abs(np.asarray(v)))[::-1]
    return k == len(a) or a[k-1] - a[k] > tol*a[0]

def assert_parallel(u, v, tol):
    u, v = (np.asarray(o)/np.linalg.norm(o) for o in (u, v))
    assert min(np.abs(u-v).max(), np.abs(u+v).max()) < tol

# The paper's listing and scipy

def listing(features, n_draws):
    "SALN's listing; also says whether its answer is unique."
    s = cosine_similarity(features)
    values, vectors = np.linalg.eigh(np.diag(s.sum(1)) - s)
    v, gaps = vectors[:, 1], np.diff(values)[:2]
    return set(np.argsort(np.abs(v))[-n_draws:].tolist()), is_cut_clear(v, n_draws) and gaps.min() > 1e-7*values[-1]

@pytest.mark.parametrize('chunk', range(10))
def test_same_choice_as_the_papers_listing(chunk):
    compared = 0
    for i in range(100):
        rng = rng_of(0, chunk, i)
        x = non_negative(rng, int(rng.integers(2, 301)))
        ratio = rng.integers(1, 20)/20
        expect, unique = listing(x, n_keep(len(x), ratio))
        if not unique: continue
        compared += 1
        assert kept(torch.tensor(x), ratio) == expect, (chunk, i)
    assert compared >= 95

def test_signed_features_against_scipy():
    compared = 0
    for i in range(200):
        rng = rng_of(1, i)
        x = signed(rng, n := int(rng.integers(3, 151)))
        s = cosine_similarity(x)
        q = scipy.linalg.null_space(np.ones((1, n)))
        values, vectors = scipy.linalg.eigh(q.T @ (np.diag(s.sum(1)) - s) @ q)
        if values[1] - values[0] < 1e-6*np.abs(values).max(): continue
        compared += 1
        assert_parallel(fiedler_vector(torch.tensor(x)), q @ vectors[:, 0], 1e-7)
    assert compared >= 190

def test_normalized_laplacians_against_scipys_generalized_problem():
    compared = 0
    for i in range(200):
        rng = rng_of(2, i)
        x = non_negative(rng, int(rng.integers(3, 151)))
        x = x[x.any(1)]                         # scipy needs positive degrees
        s = cosine_similarity(x); deg = s.sum(1)
        values, vectors = scipy.linalg.eigh(np.diag(deg) - s, np.diag(deg))
        if np.diff(values[:3]).min() < 1e-6: continue
        compared += 1
        assert_parallel(fiedler_vector(torch.tensor(x), 'random_walk'), vectors[:, 1], 1e-7)
        assert_parallel(fiedler_vector(torch.tensor(x), 'symmetric'), np.sqrt(deg)*vectors[:, 1], 1e-7)
    assert compared >= 190

# Closed forms

def graph(n, edges):
    a = torch.zeros(n, n, dtype=torch.float64)
    for i, j in edges: a[i, j] = a[j, i] = 1
    return a
def unit(v): return F.normalize(torch.as_tensor(v, dtype=torch.float64), dim=0)
def close(a, b, tol=1e-9): torch.testing.assert_close(a, b, atol=tol, rtol=0)

@pytest.mark.parametrize('n', [2, 3, 4, 9, 40])
def test_path(n):
    i = torch.arange(n, dtype=torch.float64)
    close(fiedler_from_affinity(graph(n, [(j, j+1) for j in range(n-1)])), unit(torch.cos(math.pi*(i+.5)/n)))

@pytest.mark.parametrize('n', [3, 4, 9, 40])
def test_cycle_peaks_at_the_first_node(n):
    i = torch.arange(n, dtype=torch.float64)
    close(fiedler_from_affinity(graph(n, [(j, (j+1) % n) for j in range(n)])), unit(torch.cos(2*math.pi*i/n)))

@pytest.mark.parametrize('n', [2, 3, 8, 25])
def test_two_cliques_joined_by_one_edge(n):
    edges = [e for o in (0, n) for e in itertools.combinations(range(o, o+n), 2)]
    # value 1 in a clique and t at its bridge: L v = lambda v on the two kinds of node gives t^2 + n t - (n-1) = 0
    t = (math.sqrt(n*n + 4*(n-1)) - n)/2
    close(fiedler_from_affinity(graph(2*n, edges + [(n-1, n)])), unit([1.]*(n-1) + [t, -t] + [-1.]*(n-1)))

@pytest.mark.parametrize('n', [2, 3, 7, 30])
def test_complete_graph_singles_out_the_first_node(n):
    close(fiedler_from_affinity(1 - torch.eye(n).double()), unit(torch.eye(n)[0].double() - 1/n))

@pytest.mark.parametrize('centre', [0, 1, 5])
def test_star_singles_out_its_first_leaf(centre):
    # its eigenvalue 1 is repeated: all vectors on the leaves that sum to 0
    n, leaves = 6, [i for i in range(6) if i != centre]
    a = graph(n, [(centre, leaf) for leaf in leaves])
    expect = torch.zeros(n).double(); expect[leaves] = -1/len(leaves); expect[leaves[0]] += 1
    close(fiedler_from_affinity(a), unit(expect))
    assert torch.equal(fiedler_from_affinity(a), fiedler_from_affinity(a))

# Symmetries

def clear_batch(*key):
    "Features with a clear cut, and the number kept at filter ratio 0.7."
    for i in itertools.count():
        rng = rng_of(*key, i)
        x = torch.tensor((signed if key[-1] % 2 else non_negative)(rng, int(rng.integers(5, 80))))
        if is_cut_clear(fiedler_vector(x), n_keep(len(x), .7), 1e-4): return x, rng

@pytest.mark.parametrize('seed', range(20))
def test_length_order_and_rotation_do_not_matter(seed):
    x, rng = clear_batch(3, seed)
    v, n = fiedler_vector(x), len(x)
    longer = x * torch.tensor(10**rng.uniform(-6, 6, size=(n, 1)))
    rotated = x @ torch.tensor(scipy.linalg.qr(rng.normal(size=(x.shape[1],)*2))[0])
    order = torch.tensor(rng.permutation(n))
    for other, expect in ((longer, v), (rotated, v), (x[order], v[order])): assert_parallel(fiedler_vector(other), expect, 1e-7)
    assert kept(longer, .7) == kept(rotated, .7) == kept(x, .7) == {int(order[i]) for i in kept(x[order], .7)}

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_low_precision_is_rounded_once_and_never_again(dtype):
    x = torch.tensor(signed(rng_of(4), 60)).to(dtype)
    assert torch.equal(fiedler_vector(x), fiedler_vector(x.double()))
    assert fiedler_vector(x).dtype == torch.float64 and fiedler_select(x).dtype == torch.int64

@pytest.mark.parametrize('which', which_kinds)
@pytest.mark.parametrize('laplacian', laplacian_kinds)
@pytest.mark.parametrize('graph', ['full', 'knn'])
def test_many_batches_at_once(which, laplacian, graph):
    xs = torch.tensor(rng_of(5).random((6, 31, 8)))
    xs[2, 4] = 0; xs[3] = xs[3, 0]      # a row of zeros, and a batch of equal rows
    g, h = (torch.Generator().manual_seed(1) for _ in range(2))
    together = fiedler_select(xs, .6, which, laplacian, graph, 5, g)
    assert together.tolist() == [fiedler_select(x, .6, which, laplacian, graph, 5, h).tolist() for x in xs]

# How many, and which

def test_n_keep_is_exact():
    thousandths = [Fraction(k, 1000) for k in range(1000)]
    simple = {Fraction(i, j) for j in range(1, 31) for i in range(j)}
    for r in {*thousandths, *simple}:
        for n in (*range(1, 130), 256, 1000, 1024, 4096, 50_000):
            assert n_keep(n, float(r)) == max(1, math.floor(n*(1-r))), (n, r)

def outcomes(n, k, monkeypatch, us=()):
    "Every set of ranks that can be drawn, with its probability: the steps of u -> rank, block by block, by bisection."
    def ranks(*more):
        monkeypatch.setattr(torch, 'rand', lambda *a, **kw: torch.tensor([*us, *more, *[.5]*k][:k], dtype=torch.float64))
        return stratified_ranks(n, k)
    if len(us) == k: return [(ranks(), 1.)]
    found, start, top = [], 0., math.nextafter(1, 0)
    while start < 1:
        rank, lo, hi = ranks(start)[len(us)], start, 1.
        if ranks(top)[len(us)] != rank:
            while hi - lo > 1e-14:
                mid = (lo+hi)/2
                lo, hi = (mid, hi) if ranks(mid)[len(us)] == rank else (lo, mid)
        found += [(r, p*(hi-start)) for r, p in outcomes(n, k, monkeypatch, (*us, (start+hi)/2))]
        start = hi
    return found

@pytest.mark.parametrize('n', range(1, 9))
def test_stratified_keeps_each_sample_with_exactly_equal_probability(n, monkeypatch):
    for k in range(1, n+1):
        p = np.zeros(n)
        for ranks, prob in outcomes(n, k, monkeypatch):
            assert len(set(ranks)) == k and ranks == sorted(ranks)
            p[ranks] += prob
        np.testing.assert_allclose(p, k/n, atol=1e-9)

@pytest.mark.parametrize('n, k', [(13, 5), (13, 8), (20, 19), (64, 13), (50, 33)])
def test_stratified_draws_are_distinct_and_uniform(n, k):
    g, draws = torch.Generator().manual_seed(n), 8000
    count = np.zeros(n)
    for _ in range(draws):
        ranks = stratified_ranks(n, k, g)
        assert len(set(ranks)) == k and 0 <= min(ranks) and max(ranks) < n
        count[ranks] += 1
    # strata only lower the variance of sums, so the binomial's is a bound for each single count
    assert np.abs(count - draws*k/n).max() < 4.5*math.sqrt(draws*k/n*(1-k/n))

def test_stratified_mean_is_unbiased_and_less_variable():
    x = torch.tensor(rng_of(6).random((37, 6)))
    v, k, g, draws = fiedler_vector(x), 11, torch.Generator().manual_seed(0), 4000
    value = v.sign()*v.abs().sqrt()     # varies along v
    mean = torch.stack([value[select_by_vector(v, k, 'stratified', g)].mean() for _ in range(draws)])
    uniform = torch.stack([value[torch.randperm(37, generator=g)[:k]].mean() for _ in range(draws)])
    assert abs(mean.mean() - value.mean()) < 4.5*mean.std()/math.sqrt(draws)
    assert mean.var() < uniform.var()/2

# Devices and nasty input

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda_keeps_the_same():
    for seed in range(20):
        x, _ = clear_batch(7, seed)
        keep = fiedler_select(x.cuda(), .7)
        assert keep.is_cuda and set(keep.tolist()) == kept(x, .7)

def nasty(seed):
    "Features with equal rows, rows of zeros, and lengths from tiny to huge; few samples or few dimensions."
    rng = rng_of(8, seed)
    n, d = int(rng.choice([1, 2, 3, 4, 7, 16, 40, 130])), int(rng.choice([1, 2, 3, 16]))
    x = rng.normal(size=(n, d))
    if seed % 2: x = x.clip(0)
    if rng.integers(2): x = x[rng.integers(n, size=n)]
    if rng.integers(2): x = x * (rng.random((n, 1)) < .7)
    if rng.integers(2): x = x * 10**rng.uniform(-300, 300, size=(n, 1))
    if rng.integers(2): x = x.round()
    return torch.tensor(x)

@pytest.mark.parametrize('seed', range(60))
def test_nasty_input_has_a_defined_answer(seed):
    x = nasty(seed)
    # negative similarities make degrees negative: an error for the normalized kinds, and not the subject here
    for kind, graph, which in itertools.product(laplacian_kinds if seed % 2 else laplacian_kinds[:1], ('full', 'knn'), which_kinds):
        v = fiedler_vector(x, kind, graph, 3)
        assert v.isfinite().all()
        assert v.norm().item() == pytest.approx(1. if len(x) > 1 else 0.)
        def select(): return fiedler_select(x, .6, which, kind, graph, 3, torch.Generator().manual_seed(0)).tolist()
        keep = select()
        assert len(set(keep)) == len(keep) == n_keep(len(x), .6) and set(keep) <= set(range(len(x)))
        assert select() == keep
        if which != 'extremes' or kind != 'unnormalized': continue      # the others see the same vector, or one like it
        threads = torch.get_num_threads()
        try:
            for n in (1, 2): torch.set_num_threads(n); assert select() == keep
        finally: torch.set_num_threads(threads)

# Arguments: what is refused, by name, and what people may give

def seeded(seed=0): return torch.Generator().manual_seed(seed)
FEATURES, VECTOR = torch.rand(6, 3, generator=seeded()), torch.tensor([.1, -.5, .3, .2, -.1]).double()
LOSSES, PAIRS, TARGETS = torch.tensor([3., 1, 5, 2, 4]), torch.rand(5, 5, generator=seeded(1)), torch.tensor([0, 2, 1, 0, 2])
SYMMETRIC = PAIRS + PAIRS.T
def history(n):
    h = History(n)
    h.update(range(n-1), np.arange(n-1.))
    return h

@pytest.mark.parametrize('k', [5, 4, 0, -1, 2.5, None])
@pytest.mark.parametrize('draw', [
    lambda k: stratified_ranks(3, k), lambda k: select_by_vector(VECTOR[:3], k), lambda k: gumbel_top_k(torch.zeros(3), k),
    lambda k: keep_highest(torch.zeros(3), k), lambda k: epsilon_greedy_keep(history(3), k),
    lambda k: ucb_keep(history(3), k)])
def test_no_more_are_kept_than_there_are_and_at_least_one(draw, k):
    with pytest.raises(ValueError, match=rf'k must be a whole number from 1 to 3; got {k}'): draw(k)

def test_no_more_are_drawn_than_have_a_probability():
    logits = torch.tensor([0., -math.inf, 1.])
    assert set(gumbel_top_k(logits, 2).tolist()) == {0, 2}
    with pytest.raises(ValueError, match='k must be a whole number from 1 to 2'): gumbel_top_k(logits, 3)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match='logits'): gumbel_top_k(torch.tensor([0., bad]), 1)

@pytest.mark.parametrize('n', [0, -3, 2.5, None, '4'])
@pytest.mark.parametrize('call', [lambda n: n_keep(n, .5), lambda n: candidates(n, .5), lambda n: random_select(n, .5),
                                  lambda n: stratified_ranks(n, 1), History, ForgettingCounter])
def test_sizes_are_whole_numbers_from_one(call, n):
    with pytest.raises(ValueError, match='n must be a whole number of at least 1'): call(n)

@pytest.mark.parametrize('bad', [np.array([.1, .2]), torch.tensor([.1, .2]), [.5], 1j, 'x'])
def test_filter_ratio_is_one_number(bad):
    with pytest.raises(ValueError, match='filter_ratio'): n_keep(10, bad)

@pytest.mark.parametrize('bad', [0, -1, 2.5, None])
def test_n_neighbors_is_a_whole_number_from_one(bad):
    knn = dict(graph='knn', n_neighbors=bad)
    for call in (lambda: knn_affinity(SYMMETRIC, bad), lambda: fiedler_vector(FEATURES, **knn),
                 lambda: fiedler_select(FEATURES, **knn)):
        with pytest.raises(ValueError, match='n_neighbors must be a whole number of at least 1'): call()

def after_update(idx, scores):
    h = History(5)
    h.update(idx, scores)
    return h.mean

# name -> a function of arrays, arrays for it, the names of those arguments that are floating point
takes_arrays = {
    'unit_rows': (unit_rows, [FEATURES], ['features']),
    'cosine_affinity': (cosine_affinity, [FEATURES], ['features']),
    'knn_affinity': (lambda a: knn_affinity(a, 2), [SYMMETRIC], ['affinity']),
    'laplacian': (laplacian, [SYMMETRIC], ['affinity']),
    'fiedler_from_affinity': (fiedler_from_affinity, [SYMMETRIC], ['affinity']),
    'fiedler_vector': (fiedler_vector, [FEATURES], ['features']),
    'fiedler_select': (lambda f: fiedler_select(f, .5), [FEATURES], ['features']),
    'select_by_vector': (lambda v: select_by_vector(v, 2), [VECTOR], ['v']),
    'top_loss_select': (lambda a: top_loss_select(a, .5), [LOSSES], ['learner_loss']),
    'rho_select': (lambda a, b: rho_select(a, b, .5), [LOSSES, LOSSES.flip(0)], ['learner_loss', 'reference_loss']),
    'gumbel_top_k': (lambda a: gumbel_top_k(a, 2, seeded()), [LOSSES], ['logits']),
    'selective_backprop_select':
        (lambda a: selective_backprop_select(a, .5, seeded()), [LOSSES], ['learner_loss']),
    'jest_logits': (jest_logits, [PAIRS, torch.tensor([1, 3])], ['scores']),
    'jest_select': (lambda a, b: jest_select(a, b, .5, 2, generator=seeded()), [PAIRS, PAIRS.T.contiguous()],
                    ['learner_loss', 'reference_loss']),
    'class_pair_losses': (class_pair_losses, [PAIRS, TARGETS], ['logits']),
    'el2n_scores': (el2n_scores, [PAIRS, TARGETS], ['logits']),
    'grand_last_layer_scores': (grand_last_layer_scores, [FEATURES[:5], PAIRS, TARGETS], ['features', 'logits']),
    'keep_highest': (lambda a: keep_highest(a, 2, seeded()), [LOSSES], ['scores']),
    'History.update': (after_update, [TARGETS, LOSSES], ['scores'])}

def same(a, b): return torch.allclose(a.double(), b.double(), atol=1e-6)

def forms(arrays):
    "The same arrays in every form that people have them in."
    yield from ([a.numpy() for a in arrays], [a.tolist() for a in arrays], [list(a) for a in arrays])
    yield [a.numpy()[::-1].copy()[::-1] for a in arrays]            # negative strides
    yield [a.clone().requires_grad_() if a.is_floating_point() else a for a in arrays]
    yield [torch.stack([a, a], -1)[..., 0] for a in arrays]         # not contiguous
    read_only = [a.numpy().copy() for a in arrays]
    for a in read_only: a.flags.writeable = False
    yield read_only

@pytest.mark.parametrize('name', takes_arrays)
def test_lists_and_numpy_arrays_do_as_well_as_tensors(name):
    f, arrays, _ = takes_arrays[name]
    expect = f(*arrays)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for given in forms(arrays): assert same(f(*given), expect)

def bad_arguments(name):
    "(argument's name, call with something else in its place)"
    f, arrays, names = takes_arrays[name]
    for i, argument in zip([i for i, a in enumerate(arrays) if a.is_floating_point()], names):
        yield argument, arrays[i], lambda other, i=i: f(*arrays[:i], other, *arrays[i+1:])

@pytest.mark.parametrize('name', takes_arrays)
def test_what_is_no_array_of_floats_is_refused_by_name(name):
    for argument, right, call in bad_arguments(name):
        others = ['text', None, [[1., 2.], [3.]], right.to(torch.complex64), right > 0, object()]
        if argument != 'scores' or name == 'jest_logits': others.append(right.to(torch.int64))
        for other in others:
            with pytest.raises(TypeError, match=f'^{argument} must be'): call(other)

@pytest.mark.parametrize('name', takes_arrays)
def test_nan_and_nothing_are_refused_by_name(name):
    for argument, right, call in bad_arguments(name):
        other = right.clone()
        other.view(-1)[0] = math.nan
        if name not in ('class_pair_losses', 'el2n_scores', 'grand_last_layer_scores'):     # NaN in, NaN out
            with pytest.raises(ValueError, match='NaN|nan'): call(other)
        with pytest.raises((ValueError, TypeError), match=argument): call(right[:0])

@pytest.mark.parametrize('bad, says', [
    ([0, 5, 1, 2, 3], '5'), ([0, -1, 1, 2, 3], '-1'), ([0., 1, 2, 3, 4], 'float'),
    ([True, False, True, False, True], 'bool'), ([[0], [1], [2], [3], [4]], 'shape')])
def test_indices_are_whole_numbers_within_range(bad, says):
    "A negative index would silently be one from the end."
    calls = dict(a=(lambda: class_pair_losses(PAIRS, bad), 'targets'), b=(lambda: el2n_scores(PAIRS, bad), 'targets'),
                 c=(lambda: grand_last_layer_scores(FEATURES[:5], PAIRS, bad), 'targets'),
                 d=(lambda: jest_logits(PAIRS, bad), 'chosen'), e=(lambda: after_update(bad, LOSSES), 'idx'),
                 f=(lambda: ForgettingCounter(5).update(bad, LOSSES > 2), 'idx'))
    for call, argument in calls.values():
        with pytest.raises((TypeError, ValueError), match=f'{argument} .*{says}'): call()

def test_lengths_must_agree():
    linear = torch.nn.Linear(3, 4)
    for call in (lambda: class_pair_losses(PAIRS, TARGETS[:3]), lambda: el2n_scores(PAIRS, TARGETS[:3]),
                 lambda: grand_last_layer_scores(FEATURES[:4], PAIRS, TARGETS), lambda: after_update(TARGETS, LOSSES[:2]),
                 lambda: grand_scores(linear, FEATURES[:5], TARGETS[:3]),
                 lambda: ForgettingCounter(5).update(TARGETS, torch.ones(3).bool()),
                 lambda: History(5).load_state_dict(History(4).state_dict())):
        with pytest.raises(ValueError, match='shape|[345] (scores|samples)'): call()

def test_right_and_wrong_are_bool():
    "With 0 and 1 as whole numbers, `~right` would be -1 and -2, and the counts nonsense."
    with pytest.raises(TypeError, match='right must be bool'): ForgettingCounter(2).update([0, 1], torch.tensor([1, 0]))

def test_gradient_scores_take_arrays_and_need_a_gradient():
    linear = torch.nn.Linear(3, 4)
    expect = grand_scores(linear, FEATURES[:5], TARGETS)
    assert same(grand_scores(linear, FEATURES[:5].numpy(), TARGETS.numpy()), expect)
    assert same(expect, grand_last_layer_scores(FEATURES[:5], linear(FEATURES[:5]).detach(), TARGETS))
    with pytest.raises(ValueError, match='requires a gradient'):
        grand_scores(linear.requires_grad_(False), FEATURES[:5], TARGETS)

# Apple's GPUs have no float64: a stand-in for such a device

class OnMPS(torch.Tensor):
    "A tensor that says that it is on `mps`, and fails as one does when it is made float64 there."

def on_mps(x): return (x.float() if x.is_floating_point() else x).as_subclass(OnMPS)

class PretendMPS(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, is_there = kwargs or {}, bool(args) and isinstance(args[0], OnMPS)
        if func == torch.Tensor.device.__get__ and is_there: return torch.device('mps')
        if func == torch.Tensor.cpu and is_there: return args[0].as_subclass(torch.Tensor)
        if func == torch.Tensor.to and isinstance(args[1], torch.device):
            plain = args[0].as_subclass(torch.Tensor)
            return self.checked(plain.as_subclass(OnMPS)) if args[1].type == 'mps' else plain
        made_there = str(kwargs.get('device')).startswith('mps')
        out = func(*args, **(kwargs | dict(device='cpu') if made_there else kwargs))
        if made_there: out = out.as_subclass(OnMPS)
        for o in out if isinstance(out, (tuple, list)) else [out]: self.checked(o)
        return out

    def checked(self, out):
        if isinstance(out, OnMPS) and out.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return out

def test_the_stand_in_refuses_float64():
    with PretendMPS():
        x = on_mps(LOSSES)
        assert x.device.type == (x+1).device.type == 'mps' and x.cpu().double().device.type == 'cpu'
        for call in (x.double, lambda: x.to(torch.float64), lambda: VECTOR.to(x.device),
                     lambda: torch.zeros(3, dtype=torch.float64, device=x.device)):
            with pytest.raises(TypeError, match='MPS'): call()

@pytest.mark.parametrize('name', takes_arrays)
def test_no_float64_on_a_device_that_has_none(name):
    f, arrays, _ = takes_arrays[name]
    expect = f(*[a.float() if a.is_floating_point() else a for a in arrays])
    with PretendMPS():
        out = f(*map(on_mps, arrays))
        device = out.device.type
    assert same(out.as_subclass(torch.Tensor), expect)
    if not out.is_floating_point(): assert device == ('cpu' if name == 'keep_highest' else 'mps')

def test_large_batches_from_a_device_without_float64():
    x = torch.rand(400, 16, generator=seeded())
    with PretendMPS(): keep = fiedler_select(on_mps(x)).as_subclass(torch.Tensor)
    assert torch.equal(keep, fiedler_select(x))

# Large batches: the iterative solver

@pytest.mark.parametrize('seed', range(12))
def test_iterative_and_dense_keep_the_same(seed):
    rng = rng_of(9, seed)
    x = non_negative(rng, int(rng.integers(320, 700))) if seed % 3 else signed(rng, int(rng.integers(320, 700)))
    if seed % 4 == 0: x[:150] = x[-150:]        # equal rows
    k = n_keep(len(x), .8)
    for kind in laplacian_kinds if seed % 3 else laplacian_kinds[:1]:
        fast, dense = (fiedler_vector(x, kind, solver=solver) for solver in ('iterative', 'dense'))
        close(fast, dense, 1e-8)
        assert set(select_by_vector(fast, k).tolist()) == set(select_by_vector(dense, k).tolist())

@pytest.mark.parametrize('seed', range(6))
def test_large_batches_against_scipys_lanczos(seed):
    "Another solver altogether: `eigsh` on the product, the constant deflated by projection."
    rng = rng_of(10, seed)
    x = non_negative(rng, int(rng.integers(320, 900)))
    f = x[x.any(1)] / np.linalg.norm(x[x.any(1)], axis=1, keepdims=True)
    n, degree = len(f), f @ f.sum(0)
    def product(t):
        t = t - t.mean()
        y = (degree - 2*degree.max())*t - f @ (f.T @ t)
        return y - y.mean()
    operator = scipy.sparse.linalg.LinearOperator((n, n), matvec=product, dtype=np.float64)
    _, vectors = scipy.sparse.linalg.eigsh(operator, k=1, which='SA', v0=rng.normal(size=n))
    assert_parallel(fiedler_vector(f), vectors[:, 0], 1e-7)
