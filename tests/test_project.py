"The project's own rules: README from the index notebook, no machine paths, no large files. Skipped outside a clone."
import ast
import configparser
import importlib.metadata
import os
import re
import shutil
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


def test_a_readme_that_is_out_of_date_is_found(tmp_path):
    "The check runs the index's code: a figure that is changed in the README, or a method that is added, does not pass."
    pytest.importorskip('nbconvert')
    clone = tmp_path/'clone'
    for part in ('nbs', 'spectral_curation'): shutil.copytree(root/part, clone/part)
    text = (root/'README.md').read_text(encoding='utf-8')
    def check(readme):
        (clone/'README.md').write_text(readme, encoding='utf-8')
        return subprocess.run([sys.executable, clone/'nbs/readme.py', '--check'], capture_output=True, text=True, env=env)
    env = os.environ | dict(PYTHONPATH=str(clone))
    assert check(text).returncode == 0
    assert 'README.md' in check(text.replace('SALN: the ends', 'SALN: the end')).stderr
    methods = clone/'spectral_curation/lab/methods.py'
    mine = "\nregister(Method('mine', None, 'a method of mine', looks_at='nothing', chooses='batch'))\n"
    methods.write_text(methods.read_text() + mine)
    assert 'saved outputs' in check(text).stderr


def test_readme_links_exist():
    for target in re.findall(r'\]\((?!http|#)([^)]+)\)', (root/'README.md').read_text()): assert (root/target).exists(), target


def test_no_large_files_and_no_machine_paths():
    home = re.compile(r'/(home|root|Users)/\w|/site-packages/\w')
    for f in tracked():
        assert f.stat().st_size < 2_000_000, f
        if f.suffix in ('.py', '.ipynb', '.md', '.ini', '.yaml'):
            hits = [line for line in f.read_text().splitlines() if home.search(line) and 'home = re.compile' not in line]
            assert not hits, (f, hits[:2])


wings = 'select', 'features', 'train', 'lab'      # an arrow points to a wing further left, or to an earlier notebook of its own


def modules() -> dict:
    "Every exported module, in reading order: its dotted name -> its file. The order is that of the notebooks' numbers."
    place = {}
    for nb in sorted((root/'nbs').rglob('*.ipynb')):
        export = re.search(r'#\| default_exp ([\w.]+)', nb.read_text(encoding='utf-8'))
        if export: place[export[1]] = (wings.index(nb.parent.name) if nb.parent.name in wings else len(wings), nb.name)
    files = {'.'.join(f.relative_to(root/'spectral_curation').with_suffix('').parts): f for f in (root/'spectral_curation').rglob('*.py') if not f.name.startswith('_')}
    assert set(files) == set(place), 'each module has a notebook, each notebook its module'
    return {m: files[m] for m in sorted(place, key=place.get)}


def imports(file: Path, module: str) -> set:
    "Absolute names of what a module imports, anywhere in it: `spectral_curation.x.y` for ours."
    found, package = set(), ['spectral_curation', *module.split('.')[:-1]]
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join((package[:len(package)-node.level+1] if node.level else []) + ([node.module] if node.module else []))
            found |= {base, *(f'{base}.{a.name}' for a in node.names)}
    return found


def test_arrows_point_down():
    "No module imports a later one; a module is covered without being listed, and imports inside functions count."
    order = list(modules())
    for i, (name, file) in enumerate(modules().items()):
        used = {m for m in order for u in imports(file, name) if u == f'spectral_curation.{m}'}
        assert not (up := [m for m in used if order.index(m) >= i]), f'{name} imports {up}, which come after it'


@pytest.mark.parametrize('wing, allowed', [('select', {'torch', 'numpy', 'scipy', 'threadpoolctl'})])
def test_select_needs_torch_and_scipy_alone(wing, allowed):
    for name, file in modules().items():
        if name.startswith(wing + '.'):
            inside = {'sklearn'} if name == 'select.agreement' else set()     # in one function: see the next test
            other = {u.split('.')[0] for u in imports(file, name)} - allowed - inside - {'spectral_curation'} - set(sys.stdlib_module_names)
            assert not other, (name, other)


def test_select_is_imported_without_scikit_learn(fresh):
    names = [f'spectral_curation.{m}' for m in modules() if m.startswith('select.')]
    loaded = fresh('import importlib, json, sys\nfor m in sys.argv[1:]: importlib.import_module(m)\nprint(json.dumps(sorted({m.split(".")[0] for m in sys.modules})))', *names)
    assert {'torch', 'spectral_curation'} <= set(loaded) and not {'sklearn', 'fastai', 'fastcore', 'pandas'} & set(loaded)


def test_an_arrow_that_points_up_is_found(tmp_path):
    "The test above can fail: inside a function, relative or absolute."
    (file := tmp_path/'x.py').write_text('def f():\n    from ..train.by_index import SALN\n    import spectral_curation.lab.run\n')
    assert {'spectral_curation.train.by_index', 'spectral_curation.lab.run'} <= imports(file, 'select.x')


def declared(key: str) -> set:
    "Distributions that settings.ini names under this key, without versions."
    ini = configparser.ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    return {re.split(r'[<>=!~\[;]', r)[0].lower() for r in ini['DEFAULT'][key].split()}


def undeclared(file: Path, requirements: set, whole_file: bool) -> set:
    "Distributions that a module imports, at its top level or anywhere, and that are not among the requirements."
    tree = ast.parse(file.read_text(encoding='utf-8'))
    nodes = list(ast.walk(tree)) if whole_file else tree.body
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level}
    names = {n.split('.')[0] for n in names} - set(sys.stdlib_module_names) - {'spectral_curation'}
    made_by = importlib.metadata.packages_distributions()
    return {n for n in names if not {d.lower() for d in made_by.get(n, [n])} & requirements}


def test_every_import_is_a_declared_requirement():
    "Also what fastai brings along: what is imported is needed, whoever else needs it. In functions, dev will do."
    needed, dev = declared('requirements'), declared('dev_requirements') | declared('lite_requirements')
    for name, file in modules().items():
        assert not (missing := undeclared(file, needed, False)), (name, missing)
        assert not (missing := undeclared(file, needed | dev, True)), (name, missing)


def test_an_undeclared_import_is_found(tmp_path):
    "The test above can fail: at the top level, and inside a function."
    (file := tmp_path/'x.py').write_text('import os, numpy.linalg\nfrom sklearn import svm\ndef f(): import nbconvert\n')
    assert undeclared(file, {'numpy'}, False) == {'sklearn'}
    assert undeclared(file, {'numpy'}, True) == {'sklearn', 'nbconvert'}
    assert not undeclared(file, {'numpy', 'scikit-learn', 'nbconvert'}, True)


def test_modules_are_small():
    "About 250 exported lines: a module is one subject."
    for name, file in modules().items(): assert len(file.read_text(encoding='utf-8').splitlines()) <= 300, name
