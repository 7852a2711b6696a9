"""Side networks under mixed precision and accumulated gradients; the FiLM merge."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from cl_plugins.adapters.alpha_side import AlphaSide
from cl_plugins.adapters.strided_conv import StridedConv
from cl_plugins.backbones import vit_glyph
from cl_plugins.callbacks import CacheFeatures
from cl_plugins.side_network import TapRecord
from tests._helpers import PlainModule, tiny_stream, tiny_vit
from tests._side import ALL_METHODS, METHODS, images, started, train


class _Sgd(PlainModule):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "lean-hst"])  # its batch norms see the smaller batches
def test_accumulated_gradients_equal_a_larger_batch(name):
    options = {"init": "magnitude"} if name == "lst" else {"distill_epochs": 0} if name == "side-tuning" else {}
    states = []
    for batch, accumulate in ((8, 1), (4, 2)):
        module = _Sgd(tiny_vit(depth=4))
        stream = tiny_stream(n_per_class=8, batch_size=batch)
        train(module, METHODS[name](regime="per_task", **options), stream, accumulate_grad_batches=accumulate)
        states.append(module.state_dict())
    moved = 0
    fresh = started(METHODS[name](regime="per_task", **options), _Sgd(tiny_vit(depth=4))).state_dict()
    for key, value in states[0].items():
        assert torch.allclose(value, states[1][key], rtol=1e-3, atol=1e-4), key
        moved += key.startswith("plugins.side.sides.0.") and not torch.equal(value, fresh[key])
    assert moved > 3


@pytest.mark.parametrize("name", ALL_METHODS)
def test_bfloat16_autocast_stays_near_float32(name):
    module = started(ALL_METHODS[name](regime="shared"), vit_glyph(num_classes=6)).train()
    x, y = images(6, 32), torch.tensor([0, 1, 0, 1, 0, 1])
    gradients = []
    for enabled in (False, True):
        twin = copy.deepcopy(module)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = twin(x)
            assert (logits.dtype == torch.bfloat16) == enabled
        cross_entropy(logits.float(), y).backward()
        bank = twin.plugins["side"]
        assert all(p.grad is None for n, p in twin.named_parameters() if n.startswith("blocks."))
        gradients.append(torch.cat([p.grad.flatten() for p in bank.active.parameters() if p.grad is not None]))
    assert gradients[1].dtype == torch.float32  # weights stay float32
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


@pytest.mark.parametrize("size", [1, 2, 5])
def test_strided_convolution_has_finite_gradients_in_bfloat16(size):
    x = images(8, size)
    for seed in range(8):
        torch.manual_seed(seed)
        layer = StridedConv(3, 8)
        plain = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        plain.load_state_dict(layer.state_dict())
        plain(x).square().sum().backward()
        junk = [torch.full((n,), float("nan"), dtype=torch.bfloat16) for n in (200, 1000, 5000)]
        del junk  # what memory may hold before
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", METHODS)  # in these images two of them reach maps of 1 x 1
def test_training_with_bf16_mixed_and_a_cache(name):
    module = PlainModule(tiny_vit(depth=4))
    method = METHODS[name](regime="per_task")
    result = train(module, method, tiny_stream(), callbacks=[CacheFeatures(progress=False)], precision="bf16-mixed")
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in module.parameters())
    assert result.average_accuracy > 0.3  # six classes; chance is 0.17


DTYPES = {"64-true": "float64", "bf16-true": "bfloat16"}


@pytest.mark.parametrize("precision", DTYPES)
def test_a_cache_is_of_the_dtype_that_fit_gives_the_module(tmp_path, precision):
    """A plugin reads features at a task's start, before `fit` converts the module for the first time."""

    ends = []
    for _ in range(2):
        module, seen = PlainModule(tiny_vit(depth=4)), []
        module.model.blocks[0].register_forward_hook(lambda block, args, out, seen=seen: seen.append(len(out)))
        callbacks = [CacheFeatures(tmp_path, progress=False)]
        method = METHODS["lst"](regime="per_task", init="fisher", fisher_samples=4)
        train(module, method, tiny_stream(), callbacks=callbacks, precision=precision)
        ends.append((module.state_dict(), sum(seen)))
    (first, filled), (second, read) = ends
    assert {v.dtype for n, v in first.items() if "blocks" in n} == {getattr(torch, DTYPES[precision])}
    # the Fisher information alone passes the backbone in the second run, and a few samples that are compared, twice
    assert read == 3 * 4 + 2 * 8 < filled
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_film_scales_and_shifts_and_begins_at_the_backbone():
    torch.manual_seed(0)
    side, record, base = AlphaSide(4, 4, "film"), TapRecord(image=images(2)), torch.randn(2, 4)
    assert torch.equal(side(record, base), base)
    torch.nn.init.normal_(side.film.weight)
    both = side.network(record.image) @ side.film.weight.T
    torch.testing.assert_close(side(record, base), base + base * both[:, :4] + both[:, 4:])
    side(record, base).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in side.film.parameters())
