"""Passes that plugins make of their own see batches as the Trainer's loops do."""

from __future__ import annotations

import pytest
import torch

from cl_plugins import fit_stream
from cl_plugins.callbacks import RanPAC, SideTuning
from cl_plugins.scenarios import ClassIncremental
from tests._helpers import PlainModule, image_data, quiet_trainer, tiny_stream, tiny_vit
from tests._side import METHODS


def raw(x):
    return 40 * x + 128


def normalized(x):
    return (x - 128) / 40 if x.ndim == 4 else x


class InForward(PlainModule):
    def forward(self, x):
        return super().forward(normalized(x))


class InHook(PlainModule):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        assert self.trainer is not None  # hooks ask it whether the module trains
        return normalized(batch[0]), batch[1]


class HookedStream(ClassIncremental):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return normalized(batch[0]), batch[1]


def both(change):
    return {"train_transform": change, "eval_transform": change}


def stream(kind=ClassIncremental):
    options = {"batch_size": 8, "eval_batch_size": 7, "n_tasks": 3, **both(raw)}
    return kind(image_data(16), test=image_data(5, seed=1), **options)


METHOD = {
    "ranpac": lambda: RanPAC(projection=20),
    "side-tuning": lambda: SideTuning(width=4, regime="per_task"),
    "lst-fisher": lambda: METHODS["lst"](regime="per_task", init="fisher", fisher_samples=4),
}


@pytest.mark.parametrize("method", METHOD)
@pytest.mark.parametrize("where", ["module's hook", "stream's hook"])
def test_batches_pass_the_transfer_hooks(method, where):
    hooked = where == "module's hook"
    cases = [(InForward, ClassIncremental), (InHook, ClassIncremental) if hooked else (PlainModule, HookedStream)]
    ends = []
    for module_class, kind in cases:
        module = module_class(tiny_vit(depth=4))
        result = fit_stream(quiet_trainer(callbacks=[METHOD[method]()]), module, stream(kind))
        ends.append((module.state_dict(), result))
    (expected, first), (found, second) = ends
    assert first.correct.tolist() == second.correct.tolist()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, name=name: f"{name}: {m}")


def test_precision_of_the_run_stands_around_passes_of_plugins():
    kinds = []
    module = PlainModule(tiny_vit(depth=4))
    module.model.blocks[0].attn.qkv.register_forward_hook(lambda layer, args, out: kinds.append(out.dtype))
    method = SideTuning(width=4, regime="per_task")
    fit_stream(quiet_trainer(callbacks=[method], precision="bf16-mixed"), module, tiny_stream())
    assert set(kinds) == {torch.bfloat16}
