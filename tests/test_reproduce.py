"Runs side by side in processes, the papers' experiments end to end at a tiny size, and the committed lines."
import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision

from spectral_curation.lab.bench_train import digit_files
from spectral_curation.lab.grid import grid, run_all
from spectral_curation.lab.results import read_records
from spectral_curation.lab.paper_figures import read_figures, save_figures
from spectral_curation.lab.paper_tables import budget_curves, claims_table, describe_rows, front_table, paper_table
from spectral_curation.lab.papers import budget_methods, experiment_configs, experiment_rows, experiments
from spectral_curation.lab.tables import control_titles
from spectral_curation.lab.reproduce import curate_reproduce, execute_notebook

clock = ('seconds', 'data', 'selection', 'training')
results = Path(__file__).parent.parent/'nbs/experiments/results'


def timeless(row): return {k: v for k, v in row.items() if 'seconds' not in k and k != 'versions'} | dict(history=[{k: v for k, v in h.items() if k not in clock} for h in row['history']])


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_runs_in_processes_are_the_same_runs(tmp_path, one_thread, monkeypatch):
    monkeypatch.setattr('os.cpu_count', lambda: 2)      # a thread for each of two jobs
    configs = grid(['standard', 'saln', 'rho'], 1, n_train=128, n_valid=32, epochs=1, bs=32, size=16, device='cpu', cache=str(tmp_path/'cache'))
    alone, together = run_all(configs, tmp_path/'alone', False), run_all(configs, tmp_path/'together', False, jobs=2)
    assert list(map(timeless, alone)) == list(map(timeless, together))
    assert {r['key'] for r in read_records(tmp_path/'together/results.jsonl')} == {c.key for c in configs}
    with pytest.raises(ValueError, match='got 0'): run_all(configs, tmp_path/'alone', False, jobs=0)


script = """
import sys
from spectral_curation.lab.grid import grid, run_all
if __name__ == '__main__':
    try: run_all(grid(['standard', 'random'], 3, n_train=256, n_valid=32, epochs=2, bs=32, size=16, device='cpu'), sys.argv[1], False, jobs=2)
    except KeyboardInterrupt: sys.exit(130)
"""


def test_ctrl_c_stops_all_processes_and_keeps_their_lines(tmp_path):
    (tmp_path/'script.py').write_text(script)
    command = [sys.executable, str(tmp_path/'script.py'), str(tmp_path/'out')]
    p = subprocess.Popen(command, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), stderr=subprocess.PIPE, text=True)
    lines = tmp_path/'out/results.jsonl'
    while not lines.exists():
        assert p.poll() is None, p.communicate()[1]
        time.sleep(.05)
    p.send_signal(signal.SIGINT)
    p.communicate(timeout=60)
    assert p.returncode == 130
    before = read_records(lines)
    assert 1 <= len(before) < 6
    subprocess.run(command, check=True)
    after = read_records(lines)
    assert after[:len(before)] == before and len({r['key'] for r in after}) == len(after) == 6
    assert not list((tmp_path/'out').rglob('*.pt'))


def test_an_experiment_end_to_end(tmp_path):
    "All runs of the tables, on digits stored as files in CIFAR's layout; figures; tables that hold every method and control."
    digit_files(tmp_path/'cifar10', 400)
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path/'resnet18.pth')
    configs = experiment_configs('cifar10', 'cpu', seeds=1, root=str(tmp_path), weights=str(tmp_path/'resnet18.pth'), reference='pixels', n_train=256, n_valid=32, epochs=1, size=16, num_workers=0, device='cpu', cache=str(tmp_path/'cache'))
    rows = run_all(configs, tmp_path/'out', False)
    claims = claims_table(rows)
    assert list(claims.index) == ['standard', 'saln', 'gstds', 'jest'] and claims.loc['saln', 'cost'] == '20%'
    for control in control_titles.values():
        assert all(claims.loc[m, control].endswith('(one seed)') for m in ('saln', 'jest'))
    for n in range(9, 17): assert 'not run here' not in paper_table(n, rows)['ours'].tolist()
    save_figures(configs[0], tmp_path/'out', (0, 1))
    (tmp_path/'cifar10-cpu-tables').symlink_to(tmp_path/'out')
    figures = read_figures('cifar10', folder=tmp_path)
    assert [len(b['keep']) for b in figures['selection']] == [64, 64] and set(figures['weights']) == {'standard', 'saln'}
    assert describe_rows(rows).startswith('10 runs, 10 configurations, seeds [0]')
    assert read_figures('pets', folder=tmp_path) is None


def test_a_notebook_is_run_in_place(tmp_path):
    "With the new outputs where it succeeds; untouched where a cell fails."
    pytest.importorskip('ipykernel')
    from nbclient.exceptions import CellExecutionError
    def notebook(source): return dict(cells=[dict(cell_type='code', execution_count=None, id='a', metadata={}, outputs=[], source=[source])], metadata={}, nbformat=4, nbformat_minor=5)
    path = tmp_path/'n.ipynb'
    path.write_text(json.dumps(notebook('print(6*7)')))
    execute_notebook(path)
    assert json.loads(path.read_text())['cells'][0]['outputs'][0]['text'] == ['42\n']
    path.write_text(before := json.dumps(notebook('1/0')))
    with pytest.raises(CellExecutionError, match='ZeroDivisionError'): execute_notebook(path)
    assert path.read_text() == before and [f.name for f in tmp_path.iterdir()] == ['n.ipynb']


@pytest.mark.parametrize('args, said', [
    (['--dataset', 'digits'], "invalid choice: 'digits'"),
    (['--dataset', 'flowers', '--experiments', 'ablation', '--root', '.'], "'ablation' is an experiment on cifar10"),
    (['--dataset', 'cifar10', '--root', 'nowhere'], 'train/<class>/'),
    (['--dataset', 'cifar10', '--experiments', 'rates'], "'rates'"),
])
def test_bad_options(args, said, capsys):
    with pytest.raises(SystemExit) as e: curate_reproduce(args)
    assert e.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.skipif(not results.is_dir(), reason='not in a clone of the repository')
def test_committed_lines_are_what_their_keys_say():
    "The key of each line is the hash of its configuration, and no run is there twice."
    files = sorted(results.rglob('*.jsonl'))
    assert files
    for f in files:
        rows = read_records(f)
        for r in rows: assert hashlib.sha256(json.dumps(r['config'], sort_keys=True).encode()).hexdigest()[:16] == r['key'], f
        assert len({r['key'] for r in rows}) == len(rows), f


@pytest.mark.skipif(not results.is_dir(), reason='not in a clone of the repository')
@pytest.mark.parametrize('dataset, experiment', [(d, e) for d in ('cifar10', 'flowers') for e in experiments
                                                 if e != 'noise' and (d == 'cifar10' or e != 'ablation')])
def test_the_experiments_are_the_committed_runs(dataset, experiment):
    "What `curate_reproduce` would run is what lies there: nothing is run again, nothing is left over."
    rows = experiment_rows(dataset, experiment=experiment, folder=results)
    weights, = {r['config']['weights'] for r in rows}
    reference = next((r['config']['reference'] for r in rows if r['config']['method'] == 'saln'), None)
    seeds = len({r['config']['seed'] for r in rows})
    config = dict(weights=weights, reference=reference, device='cpu')
    configs = experiment_configs(dataset, experiment=experiment, seeds=seeds, **config)
    assert {c.key for c in configs} == {r['key'] for r in rows}


@pytest.mark.skipif(not results.is_dir(), reason='not in a clone of the repository')
@pytest.mark.parametrize('dataset', ['cifar10', 'imagenette'])
def test_the_records_of_wrong_labels_are_runs_of_the_experiment(dataset):
    "Not all variants have been run: what lies there is not run again, and nothing else lies there."
    rows = experiment_rows(dataset, experiment='noise', folder=results)
    c = next(r['config'] for r in rows if r['config']['method'] == 'agreement')
    config = {k: c.get(k) for k in ('weights', 'reference', 'label_file', 'device')}
    seeds = 1 + max(r['config']['seed'] for r in rows)
    assert rows and {r['key'] for r in rows} <= {r.key for r in experiment_configs(dataset, 'cpu', 'noise', seeds, **config)}


@pytest.mark.skipif(not results.is_dir(), reason='not in a clone of the repository')
def test_tables_of_the_committed_records():
    "Every method of a budget has a curve of each seed; the front page's table compares every method."
    for dataset in ('cifar10', 'flowers'):
        curves = budget_curves(experiment_rows(dataset, experiment='budget', folder=results))
        assert list(curves) == list(budget_methods) and all(len(of) == 5 for of in curves.values())
    lines = front_table(results).splitlines()
    assert len(lines) == 2 + 2*4 and len({line.count('|') for line in lines}) == 1
    compared = [line for line in lines[2:] if '| standard |' not in line]
    assert len(compared) == 6 and all(line.count(', p ') == 2 for line in compared)
