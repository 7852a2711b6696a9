"""Side-tuning callbacks: open_clip towers, dense outputs, copies, checkpoints, resume."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.nn.functional import cross_entropy

from cl_plugins import fit_stream
from cl_plugins.adapters.hierarchical_side import HierarchicalFeatures
from cl_plugins.adapters.ladder import scheduled_gate
from cl_plugins.backbones import find_backbone, vit_glyph
from cl_plugins.callbacks import (
    CacheFeatures,
    FrozenBackbone,
    HierarchicalSideTuning,
    LadderSideTuning,
    LeanHierarchicalSideTuning,
)
from cl_plugins.heads import HIDDEN_LOGIT
from cl_plugins.targets import find_sites
from tests._helpers import PlainModule, quiet_trainer, tiny_stream, tiny_vit
from tests._side import ALL_METHODS, METHODS, PYRAMID, ClipModule, clip_tower, images, started, train

# open_clip, dense outputs, copies and checkpoints


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("batch_first", [True, False])
def test_open_clip_towers(name, batch_first):
    options = (
        {"layers": "none"}
        if name == "lst"
        else {"widths": (4, 4, 4, 8), "heads": (1, 2, 2, 2)}
        if name == "lean-hst"
        else {}
    )
    method = METHODS[name](regime="shared") if name not in ("lst", "lean-hst") else (
        LadderSideTuning(reduction=2, **options) if name == "lst" else LeanHierarchicalSideTuning(**options)
    )  # fmt: skip
    module = started(method, ClipModule(clip_tower(batch_first))).train()
    logits = module(images())
    assert (logits[:, 2:] == HIDDEN_LOGIT).all()
    cross_entropy(logits, torch.tensor([0, 1, 0])).backward()
    side = module.plugins["side"].active
    assert all(p.grad is not None for p in side.parameters() if p.numel() > 1)
    assert all(p.grad is None for p in module.tower.parameters())
    if name == "lst":
        bank = method.bank(module)
        bank.bypass = True
        module(images())
        feature = side(bank.taps.take(), torch.zeros(0)) @ module.tower.proj
        expected = F.linear(feature, module.classifier.weight, module.classifier.bias)
        torch.testing.assert_close(expected[:, :2], logits[:, :2])


@pytest.mark.parametrize("name", ALL_METHODS)
def test_towers_with_tokens_first_give_the_same(name):
    small = {"widths": (4, 4, 4, 8), "heads": (1, 2, 2, 2)}
    logits, gradients = [], []
    for batch_first in (True, False):
        module = ClipModule(clip_tower(batch_first))
        torch.nn.init.constant_(module.classifier.weight, 0.1)
        torch.nn.init.zeros_(module.classifier.bias)
        method = (HierarchicalSideTuning if name == "hst" else LeanHierarchicalSideTuning)(**small)
        started(method if "hst" in name else METHODS[name](), module).train()
        logits.append(module(images(5))[:, :2])
        logits[-1].square().sum().backward()
        gradients.append([p.grad for p in module.plugins["side"].parameters()])
    torch.testing.assert_close(logits[0], logits[1])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_dense_features_follow_timm():
    encoder = HierarchicalFeatures(vit_glyph(num_classes=0), widths=(16, 16, 32, 48), heads=(2, 2, 4, 4))
    maps = encoder.train()(torch.zeros(2, 3, 64, 64, requires_grad=True)[:, :, :32, :32])
    assert [m.shape[1] for m in maps] == encoder.feature_info.channels() == [16, 16, 32, 48]
    assert [32 // m.shape[2] for m in maps] == encoder.feature_info.reduction()
    sum(m.sum() for m in maps).backward()
    assert all(p.grad is None for p in encoder.model.parameters())
    assert encoder.side.embed[0].conv[0].weight.grad is not None
    with pytest.raises(ValueError, match="`registers` must be 0"):
        HierarchicalFeatures(vit_glyph(num_classes=0), registers=1)


@pytest.mark.parametrize("name", ALL_METHODS)
def test_state_restores_the_number_of_side_networks(name):
    module = PlainModule(tiny_vit(depth=4))
    train(module, ALL_METHODS[name](regime="per_task_dense"))
    fresh = started(ALL_METHODS[name](regime="per_task_dense"), PlainModule(tiny_vit(depth=4, seed=1)))
    fresh.load_state_dict(module.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(fresh.eval()(images()), module.eval()(images()))
    flags = [[p.requires_grad for p in m.plugins["side"].parameters()] for m in (fresh, module)]
    assert flags[0] == flags[1]
    fewer = started(ALL_METHODS[name](regime="per_task_dense"), PlainModule(tiny_vit(depth=4)))
    module.load_state_dict(fewer.state_dict(), strict=True)
    assert len(module.plugins["side"].sides) == len(module.plugins["side"].mix) == 1


@pytest.mark.parametrize("gate", ["linear", "hyperbolic"])
def test_scheduled_gates_are_saved_with_the_weights_that_were_trained_at_them(gate):
    def method(regime, warm_start=True):
        return METHODS["lst"](gate=gate, regime=regime, warm_start=warm_start)

    first, last = (0.1, 0.9) if gate == "linear" else (0.9, 0.5)
    module, fresh = PlainModule(tiny_vit(depth=4)), PlainModule(tiny_vit(depth=4, seed=1))
    train(module, method("per_task"))
    assert [side.scheduled.item() for side in module.plugins["side"].sides] == pytest.approx([last] * 3)
    method("per_task").install(fresh)
    fresh.load_state_dict(module.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(images()), module.eval()(images()))
    module = started(method("per_task"), tasks=1)
    module.plugins["side"].active.set_epoch(9, 10)
    copied = copy.deepcopy(module)
    started(method("per_task"), module, tasks=2)
    assert module.plugins["side"].active.scheduled.item() == pytest.approx(first)  # a warm start begins anew
    assert copied.plugins["side"].active.scheduled.item() != pytest.approx(first)
    assert "plugins.side.sides.0.scheduled" not in started(METHODS["lst"]()).state_dict()


def test_scheduled_gates_stay_where_the_first_session_left_them():
    module, seen = PlainModule(tiny_vit(depth=4)), []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if pl_module.plugins["side"].started > 1:
                seen.append(pl_module.plugins["side"].active.scheduled.item())

    train(module, METHODS["lst"](gate="linear", regime="first_session"), callbacks=[Watch()])
    assert seen == pytest.approx([0.9] * len(seen))
    assert seen
    assert scheduled_gate("linear", 5, 1) == 0.9  # a Trainer without max_epochs


@pytest.mark.parametrize("name", ["lst", "sherl", "hst"])
def test_base_names_stay_and_copies_work(name):
    method = HierarchicalSideTuning(**PYRAMID) if name == "hst" else METHODS[name]()
    module = tiny_vit(depth=4)
    names = set(module.state_dict())
    started(method, module)
    assert {n for n in module.state_dict() if not n.startswith("plugins.")} == names
    copied = copy.deepcopy(module).eval()
    with torch.no_grad():
        before = module.eval()(images())
        for parameter in module.parameters():
            parameter.zero_()
        assert torch.equal(copied(images()), before)  # the copy has side networks, taps and backbone of its own
    compiled = torch.compile(copied, backend="eager")
    torch.testing.assert_close(compiled(images()), before)


@pytest.mark.parametrize(
    ("cache", "gate"), [(None, "learnable"), ("memory", "learnable"), ("folder", "learnable"), (None, "linear")]
)
def test_resume_inside_a_task_equals_an_uninterrupted_run(tmp_path, cache, gate):
    def callbacks():
        folder = tmp_path / "cache" if cache == "folder" else None
        extra = [CacheFeatures(folder, progress=False)] if cache else []
        return [METHODS["lst"](regime="per_task", gate=gate), *extra]

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if pl_module.plugins["side"].started == 2 and trainer.current_epoch == 0:
                raise InterruptedError

    straight = PlainModule(tiny_vit(depth=4))
    fit_stream(quiet_trainer(callbacks=callbacks()), straight, tiny_stream())
    save = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1, save_on_train_epoch_end=True)
    trainer = quiet_trainer(callbacks=[*callbacks(), save, Stop()], enable_checkpointing=True)
    with pytest.raises(InterruptedError):
        fit_stream(trainer, PlainModule(tiny_vit(depth=4)), tiny_stream())
    resumed = PlainModule(tiny_vit(depth=4, seed=5))
    trainer = quiet_trainer(
        callbacks=[*callbacks(), ModelCheckpoint(tmp_path, save_last=True)], enable_checkpointing=True
    )
    fit_stream(trainer, resumed, tiny_stream(), ckpt_path="last")
    assert len(resumed.plugins["side"].sides) == 3
    for (name, a), (_, b) in zip(straight.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("method", [METHODS["lst"], FrozenBackbone])
def test_a_compiled_backbone_inside_the_module_trains_the_same(method):
    def run(compiled):
        vit = tiny_vit(depth=4)
        model = torch.compile(vit, backend="eager") if compiled else vit
        with torch.no_grad():
            model(images())  # hooks come after a first call
        module = PlainModule(model)
        result = train(module, method(), tiny_stream(2, n_per_class=8), max_epochs=1)
        return result.rows[-1].correct, {k.replace("._orig_mod", ""): v for k, v in module.state_dict().items()}

    torch._dynamo.reset()
    (correct, plain), (same, state) = run(False), run(True)
    assert correct == same
    torch.testing.assert_close(state, plain)


def test_the_backbone_is_found_inside_the_wrapper_of_a_compiled_one():
    module, clip = PlainModule(torch.compile(tiny_vit(), backend="eager")), ClipModule(clip_tower())
    assert find_backbone(module).model is find_backbone(module, "model").model is module.model._orig_mod
    assert find_sites(module, ["fc2"])[0].name == "model.blocks.0.mlp.fc2"
    clip.tower = torch.compile(clip.tower, backend="eager")
    assert find_backbone(clip).name == find_backbone(clip, "tower").name == "tower._orig_mod"
    assert find_backbone(module.model).model is find_backbone(module.model, "").model is module.model._orig_mod


@pytest.mark.slow
def test_dense_example_runs():
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(root / "examples" / "dense_features.py"), "--steps", "3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "intersection over union" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("name", METHODS)
def test_language_models_are_refused_with_the_reason(name):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=20
    )
    with pytest.raises(ValueError, match=r"found only the text transformer 'model'.*LoRA and MoRA take text"):
        METHODS[name]().install(LlamaForCausalLM(config))
