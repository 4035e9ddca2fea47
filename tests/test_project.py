"The project's own rules: README from the index notebook, no machine paths, no large files. Skipped outside a clone."
import re
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not (root/'settings.ini').exists(), reason='not in a clone of the repository')


def tracked(): return [root/f for f in subprocess.run(['git', 'ls-files'], cwd=root, capture_output=True, text=True, check=True).stdout.split('\n') if f]


def test_readme_is_made_from_the_index():
    pytest.importorskip('nbconvert')
    r = subprocess.run([sys.executable, root/'nbs/readme.py', '--check'], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


def test_readme_links_exist():
    for target in re.findall(r'\]\((?!http|#)([^)]+)\)', (root/'README.md').read_text()): assert (root/target).exists(), target


def test_no_large_files_and_no_machine_paths():
    home = re.compile(r'/(home|root|Users)/\w|/site-packages/\w')
    for f in tracked():
        assert f.stat().st_size < 2_000_000, f
        if f.suffix in ('.py', '.ipynb', '.md', '.ini', '.yaml'):
            hits = [line for line in f.read_text().splitlines() if home.search(line) and 'home = re.compile' not in line]
            assert not hits, (f, hits[:2])


def test_arrows_point_one_way():
    "No room imports a later one."
    rooms = 'spectral joint pruning reference loader distributed callback epoch scores checkpoint diagnostics data held plot experiment bench cli reproduce all'.split()
    for i, room in enumerate(rooms):
        f = root/f'spectral_curation/{room}.py'
        if not f.exists(): continue
        used = re.findall(r'^from (?:\.|spectral_curation\.)(\w+) import', f.read_text(), re.M)
        assert all(rooms.index(u) < i for u in used if u in rooms), (room, used)
    for room in rooms[:3]:
        f = root/f'spectral_curation/{room}.py'
        if f.exists(): assert 'fastai' not in f.read_text(), room
