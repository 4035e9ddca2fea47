"The sampler in other people's loops: StatefulDataLoader, Lightning, Hugging Face `Trainer`, accelerate, two processes."
import importlib.util
import json
import os
import socket
import subprocess
import sys
import textwrap
from itertools import chain

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from spectral_curation.train.rules import FiedlerRule, RandomRule
from spectral_curation.train.epoch_rules import DynamicRule, InfoBatchRule
from spectral_curation.train.sampler import CuratedBatchSampler

n = 60
x = torch.randn(n, 5, generator=torch.Generator().manual_seed(0))
data = [(i, a, int(a[0] > 0)) for i, a in enumerate(x)]      # each sample says which it is
rules = dict(random=RandomRule, fiedler=lambda: FiedlerRule(x), ucb=lambda: DynamicRule('ucb'), infobatch=InfoBatchRule)
def sampler_of(name, **kw): return CuratedBatchSampler(rules[name](), 8, .5, n=n, n_epochs=3, **kw)

def needs(package):
    "Skip where a peer is not installed; it is looked for without being imported."
    if importlib.util.find_spec(package) is None: pytest.skip(f'{package} is not installed: pip install {package}')

# torchdata

@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('name', ['fiedler', 'random', 'ucb'])
def test_stateful_data_loader(name, num_workers):
    "The loader saves the sampler's state with its own; worker processes fetch ahead, and the place is still right."
    loading = pytest.importorskip('torchdata.stateful_dataloader', reason='torchdata is not installed')
    if name == 'ucb' and num_workers: pytest.skip('losses are not known when a batch is fetched ahead')
    def read(loader, sampler, epochs, stop=None):
        kept, state = [], None
        for e in range(epochs):
            for i, (idx, _, y) in enumerate(loader):
                sampler.update(idx, y + idx.float() % 7)
                kept.append(idx.tolist())
                if (e, i) == stop: state = loader.state_dict()
        return kept, state
    def make():
        sampler = sampler_of(name)
        return loading.StatefulDataLoader(data, batch_sampler=sampler, num_workers=num_workers), sampler
    expect, state = read(*make(), 3, stop=(1, 1))
    steps = len(sampler_of(name))
    loader, sampler = make()
    loader.load_state_dict(state)
    assert read(loader, sampler, 2)[0] == expect[steps+2:]

# Lightning

def lightning_parts():
    needs('lightning')
    import lightning
    class Module(lightning.LightningModule):
        "Says which samples it trained on, and reports the losses."
        def __init__(self, sampler):
            super().__init__()
            self.net, self.curated, self.kept = nn.Linear(5, 2), sampler, []
        def on_train_epoch_start(self): self.kept.append([])
        def training_step(self, batch, _):
            idx, x, y = batch
            self.kept[-1].append(idx.tolist())
            losses = F.cross_entropy(self.net(x), y, reduction='none')
            self.curated.update(idx, losses)
            return (losses*self.curated.weights(idx)).mean()
        def configure_optimizers(self): return torch.optim.SGD(self.parameters(), .1)
        def train_dataloader(self): return DataLoader(data, batch_sampler=self.curated)
    quiet = dict(accelerator='cpu', logger=False, enable_progress_bar=False, enable_model_summary=False,
                 enable_checkpointing=False)
    return Module, lambda **kw: lightning.Trainer(**(quiet | kw))

@pytest.mark.parametrize('name', rules)
def test_lightning(name):
    Module, trainer = lightning_parts()
    module = Module(sampler_of(name))
    (t := trainer(max_epochs=3)).fit(module)
    assert t.global_step == sum(map(len, module.kept)) and len({str(e) for e in module.kept}) == 3
    if name in ('random', 'fiedler'): assert module.kept == [list(s) for s in [sampler_of(name)]*3]
    else: assert all(0 < len(list(chain(*e))) <= n for e in module.kept)


def test_lightning_goes_on_in_the_right_epoch(tmp_path):
    "It calls `set_epoch`, so that a restored training does not read the first epochs again."
    Module, trainer = lightning_parts()
    whole, first, rest = (Module(sampler_of('fiedler')) for _ in range(3))
    trainer(max_epochs=3).fit(whole)
    (t := trainer(max_epochs=1)).fit(first)
    t.save_checkpoint(tmp_path/'last.ckpt')
    trainer(max_epochs=3).fit(rest, ckpt_path=tmp_path/'last.ckpt')
    assert first.kept + rest.kept == whole.kept

# Hugging Face

def bert_trainer(sampler, folder, **kw):
    needs('transformers'); needs('accelerate')
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
    class Curated(Trainer):
        kept = ()
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator)
        def compute_loss(self, model, inputs, **kw):
            self.kept = [*self.kept, inputs.pop('idx').tolist()]
            return super().compute_loss(model, inputs, **kw)
    class WithIndex(BertForSequenceClassification):
        def forward(self, idx=None, **kw): return super().forward(**kw)     # `Trainer` drops what forward does not name
    tokens = torch.randint(0, 50, (n, 6), generator=torch.Generator().manual_seed(0))
    texts = [dict(input_ids=t.tolist(), labels=int(t[0] > 25), idx=i) for i, t in enumerate(tokens)]
    torch.manual_seed(0)
    model = WithIndex(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                 intermediate_size=16, max_position_embeddings=8))
    args = TrainingArguments(str(folder), num_train_epochs=3, report_to=[], use_cpu=True, disable_tqdm=True,
                             remove_unused_columns=False, **(dict(save_strategy='no') | kw))
    return Curated(model, args, train_dataset=texts)

def test_hugging_face_trainer(tmp_path):
    direct = sampler_of('fiedler')
    trainer = bert_trainer(sampler_of('fiedler'), tmp_path)
    trainer.train()
    assert trainer.kept == list(chain(*(list(direct) for _ in range(3))))
    assert trainer.state.global_step == len(trainer.kept) == 24


def test_hugging_face_trainer_resumes(tmp_path):
    "In the middle of the second epoch: `Trainer` skips what it has read."
    steps = len(sampler_of('fiedler'))
    whole = bert_trainer(sampler_of('fiedler'), tmp_path, save_strategy='steps', save_steps=steps+3)
    whole.train()
    done = whole.args.save_steps
    rest = bert_trainer(sampler_of('fiedler'), tmp_path)
    rest.train(resume_from_checkpoint=str(tmp_path/f'checkpoint-{done}'))
    assert rest.kept == whole.kept[done:]

# accelerate

def test_accelerate_passes_on_every_batch():
    "Also those whose size is not the size asked for; accelerate left them out where a sampler has a `batch_size`."
    accelerate = pytest.importorskip('accelerate', reason='accelerate is not installed')
    direct = sampler_of('fiedler')
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(data, batch_sampler=sampler_of('fiedler')))
    for _ in range(3): assert [idx.tolist() for idx, *_ in loader] == list(direct)
    assert direct.batch_size is None

# Two processes

common = """
import json, os, sys
import torch, torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from spectral_curation.train.rules import FiedlerRule, RandomRule
from spectral_curation.train.epoch_rules import DynamicRule, InfoBatchRule
from spectral_curation.train.sampler import CuratedBatchSampler
torch.set_num_threads(1)
rank, n = int(os.environ['RANK']), 60
x = torch.randn(n, 5, generator=torch.Generator().manual_seed(0))
data = [(i, a, int(a[0] > 0)) for i, a in enumerate(x)]
rules = dict(random=RandomRule, fiedler=lambda: FiedlerRule(x), ucb=lambda: DynamicRule('ucb'), infobatch=InfoBatchRule)
def sampler_of(name, **kw): return CuratedBatchSampler(rules[name](), 8, .5, n=n, n_epochs=3, **kw)
def train(net, opt, name, backward):
    sampler, kept = sampler_of(name), []
    loader = DataLoader(data, batch_sampler=sampler)
    for epoch in range(3):
        kept.append([])
        for idx, xb, yb in loader:
            kept[-1].append(idx.tolist())
            losses = F.cross_entropy(net(xb), yb, reduction='none')
            backward((losses*sampler.weights(idx)).mean()); opt.step(); opt.zero_grad()
            sampler.update(idx, losses)
        assert len(loader) == len(kept[-1])
    history = getattr(sampler.rule, 'history', None)
    return dict(kept=kept, history=None if history is None else history.mean.tolist())
def report(**what): print('\\n' + json.dumps(what), flush=True)
"""

def in_two_processes(code, folder, seconds=300):
    "Run a script as ranks 0 and 1; what each printed last. A hang, or an error on one, fails with what both said."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    (folder/'ranks.py').write_text(common + textwrap.dedent(code))
    env = os.environ | dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port),
                            OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true', NODE_RANK='0')
    outs = [[open(folder/f'{kind}{rank}', 'w+') for kind in ('out', 'err')] for rank in range(2)]
    ranks = [subprocess.Popen([sys.executable, '-W', 'ignore', 'ranks.py'], cwd=folder, stdout=out, stderr=err,
                              env=env | dict(RANK=str(r), LOCAL_RANK=str(r))) for r, (out, err) in enumerate(outs)]
    try: codes = [p.wait(seconds) for p in ranks]
    except subprocess.TimeoutExpired: codes = f'no end after {seconds} s'
    finally:
        for p in ranks: p.kill()
    said = []
    for f in chain(*outs): f.seek(0); said.append(f.read()); f.close()
    assert codes == [0, 0], (codes, *(t[-1500:] for t in said[1::2]))
    return [json.loads(t.splitlines()[-1]) for t in said[::2]]

def check_ranks(ranks):
    "Equal steps of equal size, no sample twice in an epoch, the same history."
    for a, b in zip(*(r['kept'] for r in ranks)):
        assert [len(i) for i in a] == [len(i) for i in b] and a
        seen = list(chain(*a, *b))
        assert len(set(seen)) == len(seen)
    assert ranks[0]['history'] == ranks[1]['history']
    if ranks[0]['history']: assert sum(v != 0 for v in ranks[0]['history']) > n//2      # of what both have seen


def test_two_processes_of_plain_pytorch(tmp_path):
    "Rank and number of processes come from torch.distributed; losses of both ranks are put together."
    ranks = in_two_processes("""
        import torch.distributed as dist
        early = sampler_of('random')        # made before there is a group
        dist.init_process_group('gloo')
        torch.manual_seed(0)
        net = nn.parallel.DistributedDataParallel(nn.Linear(5, 2))
        opt = torch.optim.SGD(net.parameters(), .1)
        results = {name: train(net, opt, name, torch.Tensor.backward) for name in rules}
        errors = []
        for other in (dict(seed=rank), dict(drop_last=bool(rank))):
            try: next(iter(sampler_of('random', **other)))
            except ValueError as e: errors.append(str(e))
        lost = sampler_of('ucb')
        list(lost)
        try: list(lost)
        except RuntimeError as e: errors.append(str(e))
        report(results=results, errors=errors, early=list(early), weights=[p.tolist() for p in net.parameters()])
        dist.destroy_process_group()
        """, tmp_path)
    for name in rules: check_ranks([r['results'][name] for r in ranks])
    assert ranks[0]['weights'] == ranks[1]['weights']
    assert not {*chain(*ranks[0]['early'])} & {*chain(*ranks[1]['early'])}
    for r in ranks:
        seeds, drop_last, lost = r['errors']
        assert 'must train alike, but seed is 0 on rank 0 and 1 on rank 1' in seeds and 'drop_last' in drop_last
        assert 'call sampler.update' in lost


def test_two_processes_of_accelerate(tmp_path):
    "The sampler shares out by itself; a loader that is prepared, and so shared out twice, is refused."
    needs('accelerate')
    ranks = in_two_processes("""
        from accelerate import Accelerator
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        net, opt = accelerator.prepare(net := nn.Linear(5, 2), torch.optim.SGD(net.parameters(), .1))
        results = {name: train(net, opt, name, accelerator.backward) for name in ('fiedler', 'ucb')}
        try: accelerator.prepare(DataLoader(data, batch_sampler=sampler_of('random')))
        except RuntimeError as e: error = str(e)
        report(results=results, error=error, world=accelerator.num_processes)
        accelerator.end_training()
        """, tmp_path)
    assert ranks[0]['world'] == 2
    for name in ('fiedler', 'ucb'): check_ranks([r['results'][name] for r in ranks])
    assert all('leave the loader out of prepare' in r['error'] for r in ranks)


def test_two_processes_of_lightning(tmp_path):
    needs('lightning')
    ranks = in_two_processes("""
        import lightning
        class Module(lightning.LightningModule):
            def __init__(self, name):
                super().__init__()
                self.net, self.curated, self.kept = nn.Linear(5, 2), sampler_of(name), []
            def on_train_epoch_start(self): self.kept.append([])
            def training_step(self, batch, _):
                idx, x, y = batch
                self.kept[-1].append(idx.tolist())
                losses = F.cross_entropy(self.net(x), y, reduction='none')
                self.curated.update(idx, losses)
                return losses.mean()
            def configure_optimizers(self): return torch.optim.SGD(self.parameters(), .1)
            def train_dataloader(self): return DataLoader(data, batch_sampler=self.curated)
        def fit(name, **kw):
            module = Module(name)
            lightning.Trainer(accelerator='cpu', devices=2, strategy='ddp', max_epochs=3, logger=False,
                              enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                              **kw).fit(module)
            history = getattr(module.curated.rule, 'history', None)
            return dict(kept=module.kept, history=None if history is None else history.mean.tolist())
        results = {name: fit(name, use_distributed_sampler=False) for name in ('fiedler', 'ucb')}
        try: fit('fiedler')
        except RuntimeError as e: error = str(e)
        report(results=results, error=error)
        """, tmp_path)
    for name in ('fiedler', 'ucb'): check_ranks([r['results'][name] for r in ranks])
    assert all('use_distributed_sampler=False' in r['error'] for r in ranks)
