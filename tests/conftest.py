"What the tests share: a home of their own, real data where it is at hand, and fresh Python processes."
import json, os, subprocess, sys
from pathlib import Path

import pytest
from threadpoolctl import threadpool_limits

def pytest_configure(config):
    for line in ('ignore:.*torch.jit.*', 'ignore:.*chained_assignment.*'):
        config.addinivalue_line('filterwarnings', line)

@pytest.fixture(scope='session', autouse=True)
def fastai_home(tmp_path_factory):
    "fastai's folder for this run, so that nothing is written to the user's."
    with pytest.MonkeyPatch.context() as m:
        m.setenv('FASTAI_HOME', str(home := tmp_path_factory.mktemp('fastai_home')))
        yield home

@pytest.fixture(scope='session', autouse=True)
def one_thread():
    "Small matrices on a busy machine: the threads of BLAS would mostly wait for each other."
    with threadpool_limits(1): yield

@pytest.fixture(scope='session')
def data_dir():
    "Folder with real weights and images: `SPECTRAL_CURATION_DATA`, or shared/data beside the repository."
    folder = Path(os.environ.get('SPECTRAL_CURATION_DATA', Path(__file__).parents[2]/'shared'/'data'))
    if not folder.is_dir(): pytest.skip('no real data here: set SPECTRAL_CURATION_DATA to its folder')
    return folder

@pytest.fixture
def fresh(tmp_path):
    "Run code in a new Python process; the last line that it prints is JSON, and is returned."
    def run(code: str, *args):
        out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *map(str, args)], capture_output=True, text=True, cwd=tmp_path)
        assert not out.returncode, out.stderr
        return json.loads(out.stdout.splitlines()[-1])
    return run
