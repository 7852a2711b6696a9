"""Precision, accumulation, clipping, checkpointing and compilation with every callback."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from benchmarks.composition import Module, stream
from benchmarks.options import OPTIONS, check
from benchmarks.processes import teams
from cl_plugins import fit_stream, start_task
from cl_plugins.adapters.hierarchical_side import Downsample
from cl_plugins.batches import to_device
from cl_plugins.callbacks import LoRA, NearestMean, RanPAC
from cl_plugins.closed_form import RidgeHead
from tests._helpers import quiet_trainer

QUICK = {
    ("LoRA", "bf16-true"),
    ("RanPAC", "bf16-true"),
    ("OVOR and NearestMean", "accumulation"),
    ("LadderSideTuning", "bf16-mixed"),
    ("OnePrompt", "checkpointing"),
    ("HierarchicalSideTuning", "checkpointing"),
    ("BalancedEMA", "clipping"),
    ("FrozenBackbone", "compile"),
}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        pytest.param(name, option, marks=() if (name, option) in QUICK else pytest.mark.slow)
        for name in teams()
        for option in OPTIONS
    ],
)
def test_option(name, option):
    outcome = check(name, option)
    if (name, option) == ("HierarchicalSideTuning", "checkpointing"):
        assert "`grad_checkpointing` must be off" in outcome
    else:
        assert outcome.startswith("yes")


@pytest.mark.gpu
@pytest.mark.parametrize("name", teams())
@pytest.mark.parametrize("option", [*OPTIONS, "16-mixed"])
def test_option_on_a_gpu(name, option):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    check(name, option, accelerator="gpu")


def test_half_precision_on_the_cpu_becomes_bfloat16():
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU"):
        trainer = pl.Trainer(accelerator="cpu", precision="16-mixed", logger=False, enable_checkpointing=False)
    assert trainer.precision == "bf16-mixed"


@pytest.mark.parametrize("kind", ["FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"])
def test_sharded_strategies_are_refused(kind):
    trainer = quiet_trainer(callbacks=[LoRA(2)])
    trainer.strategy.__class__ = type(kind, (type(trainer.strategy),), {})  # the real ones need GPUs to be made
    assert hasattr(pl.strategies, kind)  # Lightning still calls it so
    text = f"must leave whole weights on each process, got {kind}"
    with pytest.raises(ValueError, match=text):
        fit_stream(trainer, Module(), stream())
    with pytest.raises(ValueError, match=text):  # in a hand-written loop, too
        start_task(trainer, Module(), stream(), 0)


@pytest.mark.parametrize("method", [NearestMean, lambda: RanPAC(16)])
def test_sums_keep_their_precision(method):
    heads = []
    for precision in ("32-true", "bf16-true"):
        torch.manual_seed(0)
        module = Module()
        fit_stream(quiet_trainer(callbacks=[LoRA(2), method()], precision=precision), module, stream())
        assert module.model.head.weight.dtype == (torch.float32 if precision == "32-true" else torch.bfloat16)
        heads.append({k: v.dtype for k, v in module.plugins.named_buffers() if v.is_floating_point()})
    assert heads[0] == heads[1]


def test_converting_a_model_leaves_the_ridge_sums_alone():
    head = nn.Linear(3, 2)
    ridge = RidgeHead(head, projection=4, ridge=1.0)
    ridge.accumulate(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 2)
    before = {k: v.clone() for k, v in ridge.state_dict().items()}
    ridge.bfloat16().float().half()
    assert all(torch.equal(v, ridge.state_dict()[k]) and v.dtype == before[k].dtype for k, v in before.items())


def test_batches_take_the_dtype_of_the_weights():
    batch = {"x": torch.zeros(1), "y": torch.zeros(1, dtype=torch.int64), "names": ["a"]}
    moved = to_device(batch, torch.device("cpu"), nn.Linear(1, 1).bfloat16())
    assert moved["x"].dtype == torch.bfloat16
    assert moved["y"].dtype == torch.int64
    assert moved["names"] == ["a"]
    assert to_device(batch, torch.device("cpu"))["x"].dtype == torch.float32


def test_a_map_of_one_pixel_gets_a_gradient_in_bfloat16():
    layer = Downsample(8, 16).bfloat16()
    exact = Downsample(8, 16)
    exact.load_state_dict({k: v.float() for k, v in layer.state_dict().items()})
    x = torch.randn(8, 8, 1, 1, generator=torch.Generator().manual_seed(0))
    for _ in range(20):
        junk = [torch.full((n,), float("nan")) for n in (64, 256, 1024, 4096, 16384)]
        del junk  # memory that is free again holds NaN
        layer.zero_grad()
        out, grid = layer(x.bfloat16())
        out[:, :, 0].sum().backward()
        assert grid == (1, 1)
        assert torch.isfinite(layer.proj.weight.grad).all()
    torch.testing.assert_close(exact(x)[0], exact.norm(exact.proj(x).flatten(2).transpose(1, 2)))
