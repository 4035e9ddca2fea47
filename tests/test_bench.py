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


def test_agreement_counts(saved):
    "All labels of two sizes, and the choice from a batch, each with its share of what training takes."
    *whole, choice = saved['agreement']['rows']
    assert [r['n'] for r in whole] == [512, 1024] and choice['n'] == 40 and choice['share_of_step'] > 0
    for r in whole:
        assert r['peak_bytes'] >= r['before_bytes'] > 1e6 and r['feature_bytes'] == 2*r['n']*r['d'] and r['wall_seconds'] > 0
        assert r['microseconds_a_sample'] == pytest.approx(1e6*r['seconds']/r['n'])
    assert whole[0]['share_of_epoch']/whole[1]['share_of_epoch'] == pytest.approx(2*whole[0]['seconds']/whole[1]['seconds'])


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='peak memory is read from /proc')
def test_agreement_does_not_keep_what_it_has_read(fresh):
    "Features in a file of 205 MB, memory-mapped: two passes over them, and no more than a part of them in memory at a time."
    grown = fresh("""import json, numpy as np
from spectral_curation.lab.bench_select import peak_memory
from spectral_curation.select.agreement import label_agreement
features = np.lib.format.open_memmap('f.npy', mode='w+', dtype=np.float16, shape=(1_600_000, 64))
rng = np.random.default_rng(0)
for start in range(0, len(features), 100_000):
    features[start:start+100_000] = rng.random((100_000, 64), dtype=np.float32)
    features.flush(); features._mmap.madvise(4)
del features
mapped, labels = np.load('f.npy', mmap_mode='r'), np.arange(1_600_000) % 3
label_agreement(mapped[:5000], labels[:5000], 2)
before = peak_memory()
a = label_agreement(mapped, labels, 2)
print(json.dumps([peak_memory() - before, a.nbytes]))""")
    assert grown[0] < 160e6, grown


@pytest.mark.parametrize('argv, says', [(['fast'], "got 'fast'"),
                                        (['--rounds', '0'], "at least 1, got '0'"), (['--size', '2'], "at least 8, got '2'"),
                                        (['--device', 'abacus'], "got 'abacus'")])
def test_bad_options(argv, says, capsys):
    with pytest.raises(SystemExit) as e: curate_bench(argv)
    assert e.value.code == 2 and says in capsys.readouterr().err


def test_the_command_is_installed():
    r = subprocess.run([str(Path(sys.executable).with_name('curate_bench')), '--help'], capture_output=True, text=True)
    assert r.returncode == 0 and 'fiedler' in r.stdout
