"The Fiedler selection against the paper's listing, scipy, closed forms, symmetries and nasty input."
import itertools, math
from fractions import Fraction

import numpy as np, pytest, scipy.linalg, torch
import torch.nn.functional as F
from sklearn.metrics.pairwise import cosine_similarity

from spectral_curation.select.fiedler import fiedler_from_affinity, fiedler_vector
from spectral_curation.select.graph import laplacian, laplacian_kinds
from spectral_curation.select.ratio import n_keep
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
