"Several processes that work on one folder, and where the seconds of a run on an accelerator are counted."
import subprocess
import sys

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn

from spectral_curation.lab.config import Config
from spectral_curation.lab.grid import grid, run_all
from spectral_curation.lab.prepare import prepare
from spectral_curation.lab.results import read_records
from spectral_curation.lab.watch import EpochTimer
from spectral_curation.train.selector import BatchSelector

given = dict(n_train=256, n_valid=32, bs=32, size=16, device='cpu')
program = """
import sys
from spectral_curation.lab.grid import grid, run_all
seeds, epochs = int(sys.argv[2]), int(sys.argv[3])
given = dict(n_train=256, n_valid=32, bs=32, size=16, device='cpu')
run_all(grid(['standard', 'random'], seeds, epochs=epochs, **given), sys.argv[1], False)
"""


def start(out, seeds, epochs):
    command = [sys.executable, '-W', 'ignore', '-c', program, *map(str, (out, seeds, epochs))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_share_the_work(tmp_path):
    "One folder, one list of runs: each run has one record, made once; who waits for whom is said."
    processes = [start(tmp_path, 2, 1) for _ in range(2)]
    said = [p.communicate(timeout=300) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    wanted = {c.key for c in grid(['standard', 'random'], 2, epochs=1, **given)}
    keys = [r['key'] for r in read_records(tmp_path/'results.jsonl')]
    assert sorted(keys) == sorted(wanted)
    assert not [p for p in (tmp_path/'runs').iterdir() if p.suffix != '.npz']
    for (out, _), me, other in zip(said, processes, reversed(processes)):
        for line in out.splitlines():
            assert f'process {other.pid} on ' in line
            assert f'process {me.pid} does its others first' in line


claim = """
import sys, time
from pathlib import Path
from spectral_curation.lab.results import claimed
with claimed(Path(sys.argv[1])) as ours:
    print(ours, flush=True)
    time.sleep(600)
"""


def test_a_killed_process_gives_its_run_up(tmp_path):
    "Who waits for it does the run."
    (tmp_path/'runs').mkdir()
    key = Config(method='standard', epochs=1, **given).key
    first = subprocess.Popen([sys.executable, '-c', claim, tmp_path/'runs'/key], stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == 'True\n'
    second = start(tmp_path, 1, 1)
    line = second.stdout.readline()
    assert line.startswith(f'digits, standard, seed 0: process {first.pid} on '), second.communicate()[1]
    assert not [r for r in read_records(tmp_path/'results.jsonl') if r['key'] == key]
    first.kill()
    first.communicate()
    _, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert sorted(r['config']['method'] for r in read_records(tmp_path/'results.jsonl')) == ['random', 'standard']


def test_nothing_is_prepared_where_nothing_is_chosen(tmp_path):
    "At filter ratio 0 no features and no scores are made, and none are charged for."
    for method in ('saln', 'jest', 'el2n'):
        prepared = prepare(Config(method=method, filter_ratio=0., cache=str(tmp_path/'cache'), **given))
        assert (prepared.features, prepared.scores, prepared.cost) == (None, None, 0)
    assert not (tmp_path/'cache').exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA here')
def test_seconds_of_an_accelerator_are_counted_where_it_works():
    "Work that goes on in the background is part of training, not of waiting for data."
    class Heavy(nn.Linear):
        "Launches a second's work at once, and does not wait for it."
        def forward(self, x):
            if self.training: torch.cuda._sleep(1_000_000_000)
            return super().forward(x)
    data = [(torch.ones(2), 0)]*8
    selector = BatchSelector(0.)
    timer = EpochTimer(selector)
    dls = DataLoaders.from_dsets(data, data, bs=4, num_workers=0, device='cuda')
    learn = Learner(dls, Heavy(2, 2).cuda(), loss_func=nn.CrossEntropyLoss(), lr=.01, cbs=[timer, selector])
    with learn.no_bar(), learn.no_logging(): learn.fit(2)
    later = timer.seconds[1]        # the first epoch also starts the device
    assert later['training'] > .9*later['seconds'] > .5
    assert later['data'] < .1*later['seconds']


def test_what_a_kill_left_unfinished_is_removed(tmp_path):
    "A kill within a write leaves a file under a temporary name; the run that is done again takes it away."
    config = Config(method='random', epochs=1, n_train=64, n_valid=16, bs=32, size=16, device='cpu').complete()
    (tmp_path/'runs').mkdir()
    for name in (f'{config.key}.pt.17-ab.tmp', f'{config.key}.npz.17-cd.tmp', 'another.pt.17-ef.tmp'):
        (tmp_path/'runs'/name).write_bytes(b'half')
    run_all([config], tmp_path, progress=False)
    assert [f.name for f in (tmp_path/'runs').glob('*.tmp')] == ['another.pt.17-ef.tmp']
    (tmp_path/'runs'/f'{config.key}.pt').write_bytes(b'old')
    run_all([config], tmp_path, progress=False)
    assert not list((tmp_path/'runs').glob('*.pt'))
