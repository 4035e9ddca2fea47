"The command `curate` as a user meets it: in a process of its own, killed, stopped, resumed."
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

tiny = '--epochs 2 --n_train 256 --bs 64 --size 16 --device cpu --methods standard,random'.split()


def start(tmp, *args):
    command = [Path(sys.executable).parent/'curate', *tiny, '--cache', tmp/'cache', '--out', tmp/'out', *args]
    # a shell starts its background jobs with ctrl-c ignored, and children inherit that; a terminal does not
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def lines(tmp):
    f = tmp/'out/results.jsonl'
    return f.read_text().splitlines() if f.exists() else []


clock = ('seconds', 'data', 'selection', 'training')


def stripped(row):
    "A result without what depends on the clock."
    row = json.loads(row)
    return {k: v for k, v in row.items() if 'seconds' not in k} | dict(history=[{k: v for k, v in h.items() if k not in clock} for h in row['history']])


@pytest.mark.parametrize('methods, seeds, until', [
    ('standard,random', 2, 'a line of results'),
    ('saln,ucb', 1, 'a checkpoint'),      # in the middle of a run
])
def test_killed_and_resumed(tmp_path, methods, seeds, until):
    "`kill -9` keeps what is finished; the same command does the rest and gives what an unbroken one gives."
    args = ['--seeds', str(seeds), '--methods', methods, '--epochs', '3']
    reached = (lambda: lines(tmp_path)) if until == 'a line of results' else (lambda: list((tmp_path/'out/runs').glob('*.pt')))
    p = start(tmp_path, *args)
    while not reached():
        assert p.poll() is None, p.communicate()
        time.sleep(.02)
    p.send_signal(signal.SIGKILL); p.communicate()
    before = lines(tmp_path)
    total = seeds*2
    assert len(before) < total
    p = start(tmp_path, *args); out, err = p.communicate()
    assert p.returncode == 0, err
    after = lines(tmp_path)
    keys = [json.loads(line)['key'] for line in after]
    assert after[:len(before)] == before and len(set(keys)) == len(keys) >= total
    assert methods.split(',')[0] in out
    whole = tmp_path/'whole'; whole.mkdir()
    start(whole, *args).communicate()
    assert list(map(stripped, lines(whole))) == list(map(stripped, after))
    assert not [f for f in (tmp_path/'out').rglob('*') if f.suffix in ('.tmp', '.pt')]


def test_stopped_by_ctrl_c(tmp_path):
    p = start(tmp_path, '--seeds', '3')
    while not lines(tmp_path):
        assert p.poll() is None, p.communicate()
        time.sleep(.05)
    p.send_signal(signal.SIGINT); out, err = p.communicate()
    assert p.returncode == 130 and 'goes on from there' in err and 'Traceback' not in err
    assert lines(tmp_path)


@pytest.mark.parametrize('args, words', [
    (['--filter_ratio', '.5,2'], ['--filter_ratio', "'2'", '0 <= filter_ratio < 1']),
    (['--methods', 'standard,best'], ['--methods', "'best'", 'standard_short']),
    (['--dataset', 'pets', '--root', 'nowhere', '--methods', 'random'], ['--root', 'annotations']),
    (['--weights', 'broken.pth'], ['--weights', 'broken.pth']),
])
def test_bad_values(tmp_path, args, words):
    (tmp_path/'broken.pth').write_bytes(b'not weights')
    p = start(tmp_path, *args); out, err = p.communicate()
    assert p.returncode == 2 and 'Traceback' not in err
    said = [line for line in err.splitlines() if line.startswith('curate:')]
    assert len(said) == 1 and all(w in said[0] for w in words), err
    assert not (tmp_path/'out').exists()


def test_help_explains_every_option(tmp_path):
    p = start(tmp_path, '--help'); out, _ = p.communicate()
    assert p.returncode == 0
    for option in 'dataset root methods filter_ratio seeds epochs bs size lr n_train n_valid weights reference reference_size device num_workers cache out'.split():
        start_ = out.index(f'  --{option} '); text = out[start_:start_+400]
        assert 'default' in text, option
