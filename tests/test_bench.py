"`curate_bench` at tiny sizes: that its tables hold what they say. Never how long anything takes."
import json, subprocess, sys
from pathlib import Path

import pytest

from spectral_curation.lab.bench import curate_bench, tables

committed = Path(__file__).parent.parent/'nbs/lab/bench'


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    out = tmp_path_factory.mktemp('bench')
    assert curate_bench(['--tiny', '--rounds', '1', '--out', str(out), '--folder', str(tmp_path_factory.mktemp('large'))]) == 0
    return {f.stem: json.loads(f.read_text()) for f in out.iterdir()}


@pytest.mark.skipif(not committed.is_dir(), reason='not in a clone of the repository')
def test_the_committed_files_have_the_columns_of_today(saved):
    "The notebook and the README read them by these names."
    for f in committed.glob('*.json'):
        o = json.loads(f.read_text())
        assert set(o['rows'][0]) <= set().union(*map(set, saved[o['table']]['rows'])), f


def test_every_table_is_written(saved):
    assert set(saved) == set(tables)
    for name, o in saved.items():
        assert o['table'] == name and o['machine']['torch'] and o['settings']['tiny'] and o['rows']
        for r in o['rows']: assert 0 < r['least'] <= r['seconds'] <= r['most']


def test_ratios_follow_from_times(saved):
    for name, base in (('fiedler', 'listing'), ('epoch', 'standard'), ('extraction', 'bare loop, same loader'), ('loading', 'files')):
        by = {(r.get('n'), r.get('batches'), r['case']): r for r in saved[name]['rows']}
        for (n, batches, _), r in by.items(): assert r['speedup'] == pytest.approx(by[n, batches, base]['seconds']/r['seconds'])


def test_all_solvers_keep_the_same(saved):
    assert all(r['same_kept'] for r in saved['fiedler']['rows'] if r['case'] in ('listing', 'dense', 'iterative') and not r.get('batches'))


def test_theoretical_speedups(saved):
    "At filter ratio 0.5: 2 for a selection without a scoring pass, 3/(1 + 1.5) with one."
    by = {r['case']: r['theoretical_speedup'] for r in saved['epoch']['rows']}
    assert by['standard'] == 1 and by['jest'] == pytest.approx(1.2)
    for case in ('saln, before decode, super-batch', 'saln, cached, super-batch', 'random by epoch'): assert by[case] == 2


def test_scale_counts(saved):
    for r in saved['scale']['rows']: assert r['kept'] == r['n']//64*12 and r['peak_bytes'] >= r['before_bytes'] > 1e6 and r['feature_bytes'] == 2*r['n']*r['d']


@pytest.mark.parametrize('argv, says', [(['fast'], "got 'fast'"),
                                        (['--rounds', '0'], "at least 1, got '0'"), (['--size', '2'], "at least 8, got '2'"),
                                        (['--device', 'abacus'], "got 'abacus'")])
def test_bad_options(argv, says, capsys):
    with pytest.raises(SystemExit) as e: curate_bench(argv)
    assert e.value.code == 2 and says in capsys.readouterr().err


def test_the_command_is_installed():
    r = subprocess.run([str(Path(sys.executable).with_name('curate_bench')), '--help'], capture_output=True, text=True)
    assert r.returncode == 0 and 'fiedler' in r.stdout
