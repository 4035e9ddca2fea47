"What may be compared, at which cost, and what follows from it: made-up records, numbers worked by hand."
import itertools
import warnings

import numpy as np
import pytest
from scipy import stats

from spectral_curation.lab.comparable import disagreement, grouped
from spectral_curation.lab.config import forms
from spectral_curation.lab.grid import grid
from spectral_curation.lab.methods import controls, cost_share, methods
from spectral_curation.lab.stats import (Difference, Point, at_equal_cost, holm, interval_text, mean_interval,
                                         paired_difference, value_at_cost, verdict)
from spectral_curation.lab.tables import comparison_table, paired_differences, paired_table, results_table

base = dict(dataset='d', epochs=2, bs=128, size=32, lr=.01, n_train=None, n_valid=500, n_test=2000, arch='resnet18',
            weights='imagenet', imbalance=None, device='cpu')
other_values = dict(dataset='e', epochs=4, bs=64, size=64, lr=.03, n_train=100, n_valid=100, n_test=100,
                    arch='resnet34', weights=None, imbalance=.1, device='cuda')
own_values = dict(which='boundary', laplacian='symmetric', schedule='0.5', reference='pixels', reference_size=64,
                  reference_epochs=9, filter_ratio=.5, step=7, checks=12, form='before_decode')


def record(method='saln', seed=0, accuracy=.5, cost=30, ratio=.8, step=None, prepared=0, **changed):
    config = base | dict(method=method, filter_ratio=ratio, step=step, seed=seed) | changed
    epoch = dict(valid_accuracy=accuracy, seconds=1, cost=cost)
    return dict(config=config, test_accuracy=accuracy, cost=cost, preparation_cost=prepared, scored=0, trained=1,
                seconds=1, seconds_data=0, seconds_selection=0, seconds_training=1, history=[epoch])


def points(d): return [round(100*x, 6) for x in d.by_seed.values()]


@pytest.mark.parametrize('field', other_values)
def test_only_runs_that_agree_are_compared(field):
    method, control = record(), record('random', accuracy=.4)
    assert points(at_equal_cost([method], [control], 'random_subset')) == [10]
    control['config'][field] = other_values[field]
    d = at_equal_cost([method], [control], 'random_subset')
    assert d.n == 0 and np.isnan(d.mean) and d.basis == f'not comparable: {field} {base[field]} and {other_values[field]}'
    assert points(at_equal_cost([method], [control], 'random_subset', may_differ=[field])) == [10]


@pytest.mark.parametrize('field', own_values)
def test_what_belongs_to_the_method_may_differ(field):
    d = at_equal_cost([record(**{field: own_values[field]})], [record('random', accuracy=.4)], 'random_subset')
    assert points(d) == [10]


@pytest.mark.parametrize('field', [*other_values, *own_values])
def test_no_row_of_a_table_mixes_configurations(field):
    value = (other_values | own_values)[field]
    rows = [record(accuracy=.2), record(seed=1, accuracy=.8, **{field: value})]
    assert [len(runs) for runs in grouped(rows).values()] == [1, 1]
    if field == 'dataset': return
    table = results_table(rows)
    assert list(table['test accuracy (%)']) == ['20.00', '80.00'] and table.index.is_unique
    assert len({k for k, _ in paired_differences(rows)}) == 2


def test_seeds_of_one_configuration_are_one_row():
    rows = [record(seed=s, accuracy=a) for s, a in enumerate((.2, .8))]
    assert list(results_table(rows).index) == ['saln']
    assert results_table(rows).loc['saln', 'test accuracy (%)'].startswith('50.00 ± ')


def test_a_field_that_old_records_lack_had_its_default():
    old, new = record(), record(imbalance=None, n_test=2000, which='extremes')
    del old['config']['imbalance']
    assert disagreement(old['config'], new['config']) == '' and len(grouped([old, new])) == 1


def test_cost_ties_favour_nobody():
    controls_ = [record('random', accuracy=a, cost=30, form=f) for a, f in ((.4, 'in_batch'), (.8, 'before_decode'))]
    for rows in (controls_, controls_[::-1]):
        d = at_equal_cost([record(accuracy=.5)], rows, 'random_subset')
        assert points(d) == [-10] and d.basis == 'mean of 2 runs of random, 0.8, same cost'


@pytest.mark.parametrize('cost, value', [
    (100, .7), (105, .7), (95, .7),     # within 5%, the bounds included
    (105.01, None), (94.99, None),      # a single point is no line
])
def test_the_same_cost_is_within_five_percent(cost, value):
    assert value_at_cost([Point(cost, .7)], 100).value == value


@pytest.mark.parametrize('gap', [.1, -.1, 1e-6])
@pytest.mark.parametrize('n', [2, 5])
def test_identical_differences_are_not_tested(gap, n):
    "Without any spread there is no t statistic: two equal gaps are no proof of a difference."
    control = {s: .5 + s/100 for s in range(n)}
    d = Difference({s: v + gap for s, v in control.items()}, control, '')
    assert np.isnan(d.p) and verdict(d) == 'not tested'
    assert verdict(d, holm([d.p, .01])[0]) == 'not tested'
    same = Difference(control, control, '')
    assert same.p == 1 and verdict(same) == 'n.s.'


def test_a_table_says_what_was_not_tested():
    rows = [record(m, s, .5 + s/100 + .1*(m == 'saln')) for s in range(2) for m in ('saln', 'random')]
    row = paired_table(rows).loc[('saln', 'random subset, same compute')]
    assert row['verdict'] == 'not tested' and '<' not in str(row['p (Holm)'])


def test_two_runs_that_are_both_too_far_do_not_make_one_that_is_near():
    assert value_at_cost([Point(94, .5, 'a'), Point(100/.94, .7, 'b')], 100).basis == 'interpolated between a and b'
    assert value_at_cost([Point(95, .5, 'a'), Point(100/.95, .7, 'b')], 100).basis == 'a, cost -5%'      # 5.3% is out


def test_between_two_runs_the_line_is_over_the_logarithm():
    ends = [Point(30, .5, 'a'), Point(480, .9, 'b')]
    assert value_at_cost(ends, 120).value == pytest.approx(.7)                # 30, 120, 480: half of the way
    assert value_at_cost(ends[::-1], 60).value == pytest.approx(.6)           # a quarter
    assert value_at_cost(ends, 120).basis == 'interpolated between a and b'


def test_nothing_beyond_the_most_expensive_or_below_the_cheapest():
    rows = [record('random', cost=30, accuracy=.4), record('standard', cost=150, ratio=0., accuracy=.5)]
    d = at_equal_cost([record(prepared=170)], rows, 'random_subset', with_preparation=True)
    assert d.n == 0 and d.basis == 'not comparable: the most expensive, standard, costs 75% of it'
    d = at_equal_cost([record(cost=10)], rows, 'random_subset')
    assert d.n == 0 and d.basis == 'not comparable: the cheapest, random, 0.8, costs 3.0 times as much'
    assert points(at_equal_cost([record(prepared=120)], rows, 'random_subset', with_preparation=True)) == [0]


def test_fewer_steps_have_the_size_of_the_method():
    jest = record('jest', cost=80)
    def short(step, cost=80): return record('standard_short', cost=cost, ratio=.4667, step=step, accuracy=.4)
    assert points(at_equal_cost([jest], [short(25)], 'fewer_steps')) == [10]
    assert at_equal_cost([jest], [short(128)], 'fewer_steps').basis == 'standard_short in steps of 25 was not run'
    # the whole of the training has steps of 128: it is not the end of a line of steps of 25
    whole = record('standard', cost=150, ratio=0., accuracy=.9)
    assert at_equal_cost([jest], [short(25, 30), whole], 'fewer_steps').n == 0
    wide = record('jest', cost=80, form='super_batch')
    assert at_equal_cost([wide], [short(128, 30), whole], 'fewer_steps').basis.startswith('interpolated between standard_short')
    assert points(at_equal_cost([wide], [short(128)], 'fewer_steps')) == [10]
    assert at_equal_cost([wide], [short(25)], 'fewer_steps').n == 0


def test_a_control_that_agrees_is_used_where_another_does_not():
    both = [record('random', lr=.03, accuracy=.9), record('random', accuracy=.4)]
    assert points(at_equal_cost([record()], both, 'random_subset')) == [10]


def test_the_basis_names_the_control_that_was_not_run():
    standard = record('standard', cost=150, ratio=0.)
    for rows in ([], [standard]):
        assert at_equal_cost([record()], rows, 'random_subset').basis == 'random was not run'
    assert at_equal_cost([record()], [record('standard_short', step=64)], 'fewer_steps').basis == (
        'standard_short in steps of 25 was not run')


def test_runs_that_are_not_seeds_of_one_configuration_are_refused():
    mixed = [record(), record(seed=1, lr=.03)]
    with pytest.raises(ValueError, match='saln, lr 0.01; saln, lr 0.03'): at_equal_cost(mixed, [], 'random_subset')
    with pytest.raises(ValueError, match=r"that random has \(fewer_steps\); got 'random_subset'"):
        at_equal_cost([record('random')], [], 'random_subset')


def test_super_batches_meet_super_batches():
    wide, narrow = (record('random', form=f, accuracy=.4) for f in ('super_batch', 'in_batch'))
    assert points(at_equal_cost([record(form='super_batch')], [wide], 'random_subset')) == [10]
    why = 'not comparable: steps of the kept samples and super-batches'
    assert at_equal_cost([record()], [wide], 'random_subset').basis == why
    assert points(at_equal_cost([record(form='before_decode')], [narrow], 'random_subset')) == [10]    # the same samples


@pytest.mark.parametrize('form', forms)
@pytest.mark.parametrize('method', [m for m in methods if controls(m) and not methods[m].data_dependent])
def test_the_grid_runs_controls_that_can_be_used(method, form):
    "Each method has each of its controls at its own cost, in every form."
    names = [method, *controls(method).values()]
    configs = grid(names, 1, [.8], form=form, device='cpu')
    def made_up(c):
        ratio = .75 if methods[c.method].scheduled else c.filter_ratio
        return dict(config=c.identity(), test_accuracy=.5, cost=1000*cost_share(c.method, ratio), preparation_cost=0)
    rows = [made_up(c) for c in configs]
    own = [r for r in rows if r['config']['method'] == method]
    runs = next(iter(grouped(own).values()))
    for control, name in controls(method).items():
        d = at_equal_cost(runs, rows, control)
        assert d.n == 1 and d.basis.startswith(name) and d.basis.endswith('same cost'), d.basis


def test_holm_by_hand_and_from_its_definition():
    assert holm([.01, .04, .03]).tolist() == pytest.approx([.03, .06, .06])
    assert holm([.04, .01, .2, .03]).tolist() == pytest.approx([.09, .04, .2, .09])
    assert holm([.9, .8]).tolist() == [1, 1]
    rng = np.random.default_rng(0)
    for _ in range(20):
        ps = rng.uniform(size=5)**3
        subsets = [s for n in range(1, 6) for s in itertools.combinations(range(5), n)]
        closed = [max(min(1, len(s)*min(ps[list(s)])) for s in subsets if i in s) for i in range(5)]
        assert holm(ps).tolist() == pytest.approx(closed)


def test_holm_keeps_false_finds_below_five_percent():
    "Ten comparisons in which nothing differs: a table with a find is rare with the correction, and usual without."
    ps = stats.ttest_1samp(np.random.default_rng(0).normal(size=(5, 2000, 10)), 0).pvalue
    assert (ps.min(1) < .05).mean() > .3
    assert np.mean([holm(table).min() < .05 for table in ps]) < .06


def test_intervals_and_p_are_those_of_scipy():
    a, b = np.random.default_rng(1).normal(size=(2, 6))
    d = Difference(dict(enumerate(a)), dict(enumerate(b)), '')
    assert d.p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    interval = stats.ttest_rel(a, b).confidence_interval()
    assert (d.mean-d.half_width, d.mean+d.half_width) == pytest.approx((interval.low, interval.high))
    assert mean_interval(a-b)[1] == pytest.approx(d.half_width)


def test_verdicts():
    def of(*values): return Difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.), '')
    assert [verdict(of(*v)) for v in ((.1, .11, .12), (-.1, -.11, -.12), (-.1, .1, .05), (.1,), ())] == [
        'better', 'worse', 'n.s.', 'one seed', '']
    with warnings.catch_warnings():
        warnings.simplefilter('error')      # equal differences are no error
        assert verdict(of(.1, .1)) == 'not tested' and verdict(of(0., 0.)) == 'n.s.'


def test_nothing_to_compare():
    assert interval_text([.5]) == '0.50' and len(holm([])) == 0
    assert np.isnan(holm([.01, np.nan])[1]) and holm([np.nan, .01])[1] == pytest.approx(.01)
    assert value_at_cost([], 100) == (None, 100, 'not run')
    assert paired_difference([record()], []).basis == 'not run'


def test_the_paired_table_says_what_it_compared():
    rng = np.random.default_rng(0)
    rows = [record(m, s, a + rng.normal()*.01, lr=lr) for s in range(4)
            for m, a, lr in (('saln', .5, .01), ('saln', .6, .03), ('random', .5, .01))]
    table = paired_table(rows)
    assert set(table['compared with']) == {'random, 0.8, same cost', 'not comparable: lr 0.03 and 0.01',
                                           'standard_short in steps of 25 was not run'}
    row = table.loc[('saln, lr 0.03', 'random subset, same compute')]
    assert row.tolist() == ['-', '', '', 'not comparable: lr 0.03 and 0.01']


def test_p_values_are_corrected_over_the_table():
    def of(*values): return Difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.), '')
    clear, nothing, empty = of(-.05, -.04, -.03), of(-.01, .01, .001), of()
    assert comparison_table({('a', 'b'): clear}).iloc[0]['verdict'] == 'worse'
    three = comparison_table({('a', 'b'): clear, ('c', 'b'): nothing, ('d', 'b'): nothing, ('e', 'b'): empty})
    assert three['verdict'].tolist() == ['n.s.', 'n.s.', 'n.s.', '']
    # what was not tested does not count
    assert float(three['p (Holm)'].iloc[0]) == pytest.approx(3*clear.p, abs=5e-4)


def test_a_run_that_diverged_is_left_out_and_named():
    "NaN is no accuracy: it makes a method neither better nor worse, on either side."
    for nan_in in ('saln', 'random'):
        rows = [record(m, seed=s, accuracy=.5 + (m == 'random')*.01*s) for m in ('saln', 'random') for s in range(3)]
        for r in rows:
            if r['config']['method'] == nan_in and r['config']['seed'] == 1: r['test_accuracy'] = float('nan')
        d = at_equal_cost([r for r in rows if r['config']['method'] == 'saln'], rows, 'random_subset')
        assert set(d.method) == {0, 2} and 'seed 1 left out: a value is not finite' in d.basis
