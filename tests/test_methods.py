"One record per method: what follows from it, the keys that must not change, and a method added by one record."
import hashlib
import json
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from spectral_curation.lab.cli import _default_jobs, curate, parser
from spectral_curation.lab.comparable import mean_step
from spectral_curation.lab.compare import compare
from spectral_curation.lab.config import Config, forms, method_options
from spectral_curation.lab.grid import control_runs, grid, run_all
from spectral_curation.lab.methods import Method, controls, cost_share, methods, register, samples_per_step
from spectral_curation.lab.methods import theoretical_speedup
from spectral_curation.lab.papers import experiment_configs
from spectral_curation.lab.results import read_records
from spectral_curation.lab.tables import control_titles
from spectral_curation.train.plan import plan_candidates
from spectral_curation.train.selector import BatchSelector

results = Path(__file__).parent.parent/'nbs/experiments/results'
in_clone = pytest.mark.skipif(not results.is_dir(), reason='not in a clone of the repository')


@pytest.mark.parametrize('module', ['lab.methods', 'lab.config'])
def test_options_are_read_without_torch(module):
    "`curate --help` needs the methods and the defaults of the configuration, and no more."
    program = f"""if 1:
        import sys, spectral_curation.{module}
        print([m for m in ('torch', 'fastai', 'pandas', 'matplotlib') if m in sys.modules])"""
    r = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, check=True)
    assert r.stdout.strip() == '[]'


def config_of(record: dict) -> Config:
    "The configuration whose record this is: what a record leaves out had its default."
    return Config(**{'form': 'in_batch'} | {k: v for k, v in record['config'].items() if v is not None})


@in_clone
@pytest.mark.parametrize('file', sorted(f.relative_to(results) for f in results.rglob('*.jsonl')), ids=str)
def test_committed_keys(file):
    "Each record's configuration, completed again, has the identity and the key that stand in the record."
    records = read_records(results/file)
    assert records
    for r in records:
        c = config_of(r)
        assert c.identity() == r['config']
        assert c.key == r['key'] == hashlib.sha256(json.dumps(r['config'], sort_keys=True).encode()).hexdigest()[:16]


@in_clone
@pytest.mark.parametrize('folder', sorted(f.parent.name for f in results.rglob('results.jsonl')))
def test_keys_of_the_papers_experiments(folder):
    "The committed records are those of the runs that `experiment_configs` asks for: asked again, nothing is run."
    records = read_records(results/folder/'results.jsonl')
    config = next((r['config'] for r in records if r['config']['method'] in ('saln', 'agreement')), records[0]['config'])
    given = {k: config[k] for k in ('weights', 'reference', 'device')}
    given |= {'label_file': f for r in records if (f := r['config'].get('label_file'))}
    numbers = {r['config']['seed'] for r in records}
    seeds = 1 + max(numbers) if folder.endswith('-noise') else len(numbers)       # of rate: seed 100 alone
    wanted, found = {c.key for c in experiment_configs(*folder.split('-'), seeds, **given)}, {r['key'] for r in records}
    assert found <= wanted
    assert found == wanted or folder.endswith('-noise')         # not all of its variants have been run


@in_clone
@pytest.mark.parametrize('dataset', ['digits', 'cifar10'])
def test_keys_of_all_methods(dataset):
    "The records of the comparison of all methods are among the runs of the grid that makes them."
    records = read_records(results/f'{dataset}.jsonl')
    c = config_of(next(r for r in records if r['config']['method'] == 'saln'))
    of_grid = 'dataset', 'method', 'seed', 'filter_ratio', 'step'
    given = {f.name: getattr(c, f.name) for f in fields(c) if f.name not in of_grid}
    seeds = {r['config']['seed'] for r in records}
    names = [m for m in methods if m not in ('agreement', 'oracle', 'small_loss', 'fine', 'knn')]      # of label noise
    wanted = {c.key for c in grid(names, seeds, [.8], [dataset], **given)}
    new = {r.key for s in seeds for r in control_runs(Config(dataset=dataset, method='gstds', seed=s, **given))}
    assert {r['key'] for r in records} == wanted - new


def test_records_are_complete():
    for m in methods.values():
        assert m.looks_at in ('nothing', 'features', 'losses', 'history of losses', 'scores', 'features and labels',
                              'right labels'), m
        assert m.chooses in ('batch', 'epoch', 'once', 'never'), m
        assert m.needs in ('', 'features', 'held_out', 'el2n', 'grand', 'forgetting', 'own_labels'), m
        assert set(m.options) <= set(method_options), m
        assert set(m.forms) <= set(forms), m
        assert set(controls(m.name).values()) <= set(methods), m


@pytest.mark.parametrize('name', methods)
def test_theoretical_speedup(name):
    "1/q, or 3/(scoring + 3q)."
    m, q = methods[name], .2
    if m.chooses == 'never': expected = 1.
    elif m.data_dependent: expected = None
    else: expected = 3/(m.scoring + 3*q)
    assert theoretical_speedup(name, 1-q) == (expected and pytest.approx(expected))


@pytest.mark.parametrize('form', forms)
@pytest.mark.parametrize('name', [m for m in methods if m != 'standard'])
def test_controls_cost_the_same_and_take_steps_of_the_same_size(name, form):
    "In every form: with super-batches JEST's steps hold as many samples as the loader's batches, as do its control's."
    c = Config(method=name, form=form, device='cpu')
    if methods[name].scheduled or methods[name].data_dependent: return      # known only after the run
    steps = samples_per_step(name, c.bs, c.filter_ratio, form, c.step)
    for r in control_runs(c):
        assert cost_share(r.method, r.filter_ratio) == pytest.approx(cost_share(name, c.filter_ratio), abs=1e-3)
        if r.method == 'standard_short': assert samples_per_step(r.method, r.bs, r.filter_ratio, r.form, r.step) == steps
    in_grid = {g.key for g in grid([name, *controls(name).values()], 1, [c.filter_ratio], form=form, device='cpu')}
    assert {r.key for r in control_runs(c)} <= in_grid


@pytest.mark.parametrize('bs', range(2, 12))
@pytest.mark.parametrize('name', [m.name for m in methods.values() if m.chooses != 'never' and not m.full_steps])
def test_steps_hold_as_many_samples_as_training_takes(name, bs):
    "Small batches, too: training takes at least two samples, and the control takes steps of that size."
    ratios = .5, .8, .99
    taken = [plan_candidates(range(bs), bs, r).steps[0].n_kept for r in ratios]
    assert min(taken) == 2
    config = dict(method=name, bs=bs, form='in_batch', schedule='0.99', step=None)
    assert [mean_step(config | dict(filter_ratio=r, schedule=str(r))) for r in ratios] == taken
    if methods[name].scheduled: return
    assert [samples_per_step(name, bs, r) for r in ratios] == taken
    for r, step in zip(ratios, taken):
        for c in control_runs(Config(method=name, bs=bs, filter_ratio=r, form='in_batch', device='cpu')):
            if c.method == 'standard_short': assert mean_step(c.identity()) == step


@pytest.mark.parametrize('name', ['n_train', 'n_valid', 'n_test', 'epochs', 'reference_epochs'])
def test_zero_is_not_all(name):
    with pytest.raises(ValueError, match=f'{name} must be at least 1; got 0'): Config(**{name: 0}).complete()
    with pytest.raises(ValueError, match=f'{name} must be at least 1; got 0'): grid(['standard'], **{name: 0})


class EveryOther(BatchSelector):
    "Keep samples at even spacing."
    def select(self, idx, k): return torch.linspace(0, len(idx)-1, k).long()


@pytest.fixture
def every_other():
    m = register(Method('every_other', lambda config, prepared: EveryOther(config.filter_ratio, seed=config.seed),
                        'samples at even spacing', looks_at='nothing', chooses='batch', scoring=.3))
    yield m.name
    del methods[m.name]


def test_a_method_is_added_by_one_record(every_other, tmp_path, monkeypatch):
    "It is in the command's help, in the grid with its controls, in the results and in the paired table."
    monkeypatch.setitem(torchvision.models._api.BUILTIN_MODELS, 'tiny', tiny)
    assert every_other in parser().format_help()
    assert parser().parse_args(['--methods', f'standard,{every_other}']).methods == ['standard', every_other]
    names, given = ['standard', 'random', 'standard_short', every_other], dict(bs=32, device='cpu')
    runs = {(c.method, c.filter_ratio, c.step) for c in grid(names, 1, [.8], **given)}
    assert {(every_other, .8, None), ('random', .7, None), ('standard_short', .7, 6)} <= runs
    comparison = compare(names, 2, tmp_path, progress=False, epochs=2, n_train=256, n_valid=64, size=16, lr=.05,
                         arch='tiny', **given)
    assert every_other in comparison.table.index
    for control in control_titles.values(): assert '±' in comparison.paired.loc[(every_other, control), 'points']


def tiny(weights=None):
    "A network that trains in no time."
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1),
                         nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))


def test_other_processes_do_not_know_a_method_of_your_own(every_other, tmp_path, capsys):
    "Refused before anything runs, also if the method has another one's selector; the default is one job."
    copied = register(replace(methods['random'], name='copied'))
    try:
        for name in (every_other, copied.name):
            configs = grid(['standard', name], 1, device='cpu')
            with pytest.raises(ValueError, match=f'{name}: .*--jobs 1.*got 2'):
                run_all(configs, tmp_path/'run', False, jobs=2)
            args = ['--methods', f'standard,{name}', '--device', 'cpu', '--out', str(tmp_path/'out')]
            with pytest.raises(SystemExit, match='2'): curate([*args, '--jobs', '2'])
            assert f'{name}: registered in this process' in capsys.readouterr().err
            assert _default_jobs(configs) == 1
    finally: del methods[copied.name]
    assert not (tmp_path/'run').exists() and not (tmp_path/'out/results.jsonl').exists()


def test_a_name_is_taken_once(every_other):
    with pytest.raises(ValueError, match='already'): register(methods[every_other])
    with pytest.raises(ValueError, match="'rondom' of 'mine' is not registered"):
        register(replace(methods[every_other], name='mine', random_subset_control='rondom'))
