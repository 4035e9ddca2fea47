"The command `curate` as a user meets it: in a process of its own, on a terminal, in a pipe, killed, stopped, resumed."
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spectral_curation.lab.methods import methods

tiny = '--epochs 2 --n_train 256 --bs 64 --size 16 --device cpu --methods standard,random'.split()


def start(tmp, *args, **kwargs):
    command = [Path(sys.executable).parent/'curate', *tiny, '--cache', tmp/'cache', '--out', tmp/'out', *args]
    # a shell starts its background jobs with ctrl-c ignored, and children inherit that; a terminal does not
    kwargs = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | kwargs
    return subprocess.Popen(list(map(str, command)), cwd=tmp, **kwargs,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def wait_until(reached, process, seconds=300):
    "Poll until something has been reached; fail where the process ends before, or takes too long."
    end = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, 'it takes too long'
        time.sleep(.02)


def lines(tmp):
    f = tmp/'out/results.jsonl'
    return f.read_text().splitlines() if f.exists() else []


clock = ('seconds', 'data', 'selection', 'training')


def stripped(row):
    "A result record without what depends on the clock."
    row = json.loads(row)
    history = [{k: v for k, v in h.items() if k not in clock} for h in row['history']]
    return {k: v for k, v in row.items() if 'seconds' not in k} | dict(history=history)


def in_order(records):
    "Several runs at a time end in any order."
    return sorted(map(stripped, records), key=lambda r: r['key'])


@pytest.mark.parametrize('methods, seeds, until, jobs', [
    ('standard,random', 2, 'a result record', 1),
    ('standard,random', 2, 'a result record', 2),
    ('saln,ucb', 1, 'a checkpoint', 1),      # in the middle of a run
])
def test_killed_and_resumed(tmp_path, methods, seeds, until, jobs):
    "`kill -9` keeps what is finished; the same command does the rest and gives what an unbroken one gives."
    args = ['--seeds', str(seeds), '--methods', methods, '--epochs', '3', '--jobs', str(jobs)]
    checkpoints = lambda: list((tmp_path/'out/runs').glob('*.pt'))
    reached = checkpoints if until == 'a checkpoint' else lambda: lines(tmp_path)
    p = start(tmp_path, *args)
    wait_until(reached, p)
    p.send_signal(signal.SIGKILL)
    p.communicate(timeout=60)       # returns when the processes of its runs have ended, too: they share its output
    before = lines(tmp_path)
    total = seeds*2
    assert len(before) < total
    p = start(tmp_path, *args)
    out, err = p.communicate(timeout=600)
    assert p.returncode == 0, err
    after = lines(tmp_path)
    keys = [json.loads(line)['key'] for line in after]
    assert after[:len(before)] == before and len(set(keys)) == len(keys) >= total
    assert methods.split(',')[0] in out
    unbroken = tmp_path/'unbroken'
    unbroken.mkdir()
    start(unbroken, *args).communicate(timeout=600)
    assert in_order(lines(unbroken)) == in_order(after)
    assert not [f for f in (tmp_path/'out').rglob('*') if f.suffix in ('.tmp', '.pt')]


@pytest.mark.parametrize('jobs', [1, 2])
def test_stopped_by_ctrl_c(tmp_path, jobs):
    "Ctrl-c on a terminal reaches every process of the command; it ends with one line and no traceback."
    p = start(tmp_path, '--seeds', '3', '--jobs', str(jobs), start_new_session=True)
    wait_until(lambda: lines(tmp_path), p)
    os.killpg(p.pid, signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and 'resumes from there' in err and 'Traceback' not in err, err
    assert lines(tmp_path)


@pytest.mark.parametrize('args, words', [
    (['--filter_ratio', '.5,2'], ['--filter_ratio', "'2'", '0 <= filter_ratio < 1']),
    (['--methods', 'standard,best'], ['--methods', "'best'", 'standard_short']),
    (['--dataset', 'pets', '--root', 'nowhere', '--methods', 'random'], ['--root', 'annotations']),
    (['--weights', 'broken.pth'], ['--weights', 'broken.pth']),
    (['--noise', '1.01'], ['--noise', "'1.01'", 'from 0 to 1']),
    (['--noise_kind', 'human'], ['--noise_kind', "'human'", 'similar']),
    (['--trust', '0'], ['--trust', "'0'", 'a share above 0']),
    (['--labels', 'worse', '--label_file', 'labels.csv'], ['--labels', "'worse' for digits", 'imagenette']),
    (['--dataset', 'cifar10', '--labels', 'worse'], ['--labels', 'needs --label_file']),
    (['--dataset', 'cifar10', '--labels', 'worse', '--label_file', 'none.csv'], ['--label_file', "no file 'none.csv'"]),
    (['--label_file', 'labels.csv'], ['--label_file', 'needs --labels']),
])
def test_bad_values(tmp_path, args, words):
    (tmp_path/'broken.pth').write_bytes(b'not weights')
    (tmp_path/'labels.csv').write_text('file,worst\ntrain/cat/0001.png,dog\n')
    p = start(tmp_path, *args)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 2 and 'Traceback' not in err
    message = [line for line in err.splitlines() if line.startswith('curate:')]
    assert len(message) == 1 and all(w in message[0] for w in words), err
    assert not (tmp_path/'out').exists()


def test_help_explains_every_option(tmp_path):
    "Each option has a text of its own, which names its default; each method has a line."
    out, _ = start(tmp_path, '--help').communicate(timeout=60)
    options, listed = out.split('\nmethods:\n')
    texts = dict(re.findall(r'^  --(\w+)\s(.*?)(?=^  --|\Z)', options.split('exit\n', 1)[1], re.S | re.M))
    names = 'noise noise_kind labels label_file trust dataset methods filter_ratio form seeds epochs bs size lr n_train n_valid weights reference out'
    assert set(texts) == {*names.split(), 'root', 'reference_size', 'device', 'num_workers', 'jobs', 'cache'}
    for option, text in texts.items(): assert 'default' in text, option
    for m in methods.values(): assert re.search(rf'^  {m.name}\s+{re.escape(m.title)}$', listed, re.M), m.name


@pytest.mark.parametrize('command', ['cli:curate', 'reproduce:curate_reproduce', 'bench:curate_bench'])
@pytest.mark.parametrize('args', [['--help'], ['--speed', '9'], ['--device']])
def test_options_are_read_without_torch(fresh, command, args):
    "Help and a refused option import nothing that takes long."
    module, name = command.split(':')
    heavy = fresh(f"""import json, sys
from spectral_curation.lab.{module} import {name}
try: {name}(sys.argv[1:])
except SystemExit: pass
heavy = {{'torch', 'fastai', 'numpy', 'pandas', 'matplotlib', 'sklearn', 'scipy'}}
print(json.dumps(sorted(heavy & set(sys.modules))))""", *args)
    assert heavy == []


def test_a_method_that_is_registered_is_an_option(fresh):
    "One record is all that the command line needs."
    out = fresh("""import contextlib, io, json
from spectral_curation.lab.methods import Method, register
from spectral_curation.lab.cli import parser
register(Method('mine', None, 'a method of mine', looks_at='nothing', chooses='batch'))
p = parser()
print(json.dumps(dict(help=p.format_help(), methods=p.parse_args(['--methods', 'mine']).methods)))""")
    assert re.search(r'^  mine\s+a method of mine$', out['help'], re.M) and out['methods'] == ['mine']


def test_wrong_labels(tmp_path):
    "Labels are wrong in training alone; the table says how many of those trained on were right, the gallery shows some."
    args = ['--seeds', '1', '--noise', '.3', '--methods', 'standard,agreement', '--filter_ratio', '.5']
    out, err = start(tmp_path, *args).communicate(timeout=600)
    assert '30% wrong labels (symmetric)' in out and re.search(r'contradicts \d+ of 256 training labels, among them \d+ of the 77', out), err
    rows = {(o := json.loads(line))['config']['method']: o for line in lines(tmp_path)}
    assert rows['standard']['right_labels'] == pytest.approx(1 - 77/256, abs=.02) and rows['agreement']['right_labels'] > .8
    assert all(o['config']['noise'] == .3 for o in rows.values())
    assert (tmp_path/'out/issues.png').read_bytes()[1:4] == b'PNG'
    short = out[out.index('\ndigits\n'):out.index('In detail')]
    assert 'right labels' in short and 'agreement' in short


@pytest.mark.parametrize('column, name, words', [('worst', 'labels.csv', ['--label_file', 'train/']),
                                                 ('best', 'labels.csv', ['--labels', "no column 'best'", 'worst'])])
def test_labels_that_do_not_fit(tmp_path, column, name, words):
    "A file of labels is checked before the first run, against the images that are there."
    from PIL import Image
    for part in ('train', 'test'):
        for c in ('cat', 'dog'):
            (folder := tmp_path/'data'/part/c).mkdir(parents=True)
            for i in range(40): Image.new('RGB', (8, 8), (i, 0, 0)).save(folder/f'{i:04d}.png')
    (tmp_path/name).write_text('file,worst\ntrain/cat/0001.png,dog\n')
    args = ['--dataset', 'cifar10', '--root', 'data', '--n_train', '64', '--labels', column, '--label_file', name]
    out, err = start(tmp_path, *args).communicate(timeout=300)
    assert 'Traceback' not in err and err.count('\n') == 1 and all(w in err for w in words), err


def test_a_log_gets_a_line_for_each_run(tmp_path):
    "In a pipe: one plain line a finished run, no carriage return, and a table alone on standard output."
    out, err = start(tmp_path, '--seeds', '2', '--methods', 'standard,saln').communicate(timeout=600)
    progress = [line for line in err.splitlines() if re.match(r'\d/4 digits, ', line)]
    assert [line[:3] for line in progress] == ['1/4', '2/4', '3/4', '4/4']
    assert '\r' not in out + err and '1/4' not in out


def test_a_terminal_gets_one_bar(tmp_path):
    "On a terminal: the same line again and again, and nothing of it left at the end; features are part of it."
    ours, theirs = pty.openpty()
    p = start(tmp_path, '--seeds', '1', '--methods', 'saln', '--jobs', '1', stderr=theirs)
    os.close(theirs)
    shown = b''
    while True:
        try: part = os.read(ours, 10_000)
        except OSError: break       # the last process that had the terminal has ended
        if not part: break
        shown += part
    p.communicate(timeout=60)
    frames = shown.decode(errors='replace').split('\r\x1b[K')
    assert p.returncode == 0 and frames[-1] == ''
    assert '\n' not in ''.join(frames[1:-1])
    assert all(f.startswith('[') for f in frames[1:-1] if f), frames[:3]        # never a bar of something else
    assert any('epochs 2/2' in f for f in frames)
    assert any('epochs 0/2' in f and '| features' in f for f in frames)
