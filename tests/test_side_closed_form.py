"""Ridge regression on the backbone's feature and a side network's."""

from __future__ import annotations

import pytest
import torch

from cl_plugins import Task, fit_stream
from cl_plugins.callbacks import CacheFeatures, HierarchicalSideTuning, LadderSideTuning, RanPAC, Sherl, SideTuning
from cl_plugins.features import feature
from tests._helpers import PlainModule, quiet_trainer, tiny_stream, tiny_vit
from tests._side import METHODS, PYRAMID, images, started, train


def _features(module, head, x):
    bank = module.plugins["side"]
    with torch.no_grad():
        own = feature(module, head, x)
        bank.bypass = True
        base = feature(module, head, x)
        bank.bypass = False
        bank.taps.take()
    return torch.cat([own, base], 1)


@pytest.mark.parametrize("name", METHODS)
def test_ridge_reads_both_features(name):
    method, ridge, module = METHODS[name](regime="first_session"), RanPAC(0, 0.5, beside=True), tiny_vit(depth=4)
    started(method, module)
    ridge.install(module)
    module.eval()
    x, y = images(12), torch.arange(12) % 2
    ridge.fit_head(module, [(x[:5], y[:5]), (x[5:], y[5:])])
    f = _features(module, module.head, x).double()
    assert f.shape == (12, 32)
    weights = torch.linalg.solve(f.T @ f + 0.5 * torch.eye(32).double(), f.T @ torch.eye(2)[y].double())
    torch.testing.assert_close(module(x)[:, :2], (f @ weights).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_only_the_first_task_trains_the_side(cached):
    method, ridge = METHODS["lst"](regime="first_session"), RanPAC(64, beside=True)
    module, held = PlainModule(tiny_vit(depth=4)), []

    class Watch(type(method)):
        def on_task_end(self, trainer, pl_module, task):
            super().on_task_end(trainer, pl_module, task)
            held.append({k: v.clone() for k, v in self.bank(pl_module).sides.state_dict().items()})

    method.__class__ = Watch
    extra = [ridge, CacheFeatures(progress=False)] if cached else [ridge]
    result = train(module, method, tiny_stream(), callbacks=extra)
    assert all(torch.equal(v, held[2][k]) for k, v in held[0].items())
    closed = module.plugins["ranpac"]
    assert closed.dim == 32
    assert (closed.count == 16).all()
    assert result.average_accuracy > 0.4  # six classes, learned in order; chance is 0.17


def test_beside_needs_one_side_network_for_all_tasks():
    with pytest.raises(ValueError, match="`beside` must follow a side-tuning callback"):
        RanPAC(beside=True).install(tiny_vit())
    module = started(METHODS["lst"](regime="per_task"), tiny_vit(depth=4))
    with pytest.raises(ValueError, match="one side network for all tasks, got regime='per_task'"):
        RanPAC(beside=True).install(module)
    module, method, ridge = tiny_vit(depth=4), METHODS["lst"](regime="first_session"), RanPAC(beside=True)
    method.install(module)
    ridge.install(module)
    batches = [(images(), torch.zeros(3, dtype=torch.int64))]
    with pytest.raises(RuntimeError, match="the side networks must run before"):
        ridge.fit_head(module, batches)
    method.start_task(module, Task(0, (0, 1)))
    ridge.fit_head(module, batches)


def _stream_result(name, cached, first=False, depth=2, **options):
    method = METHODS[name](regime="first_session")
    callbacks = [method, RanPAC(64, depth=depth, beside=True, ridge=1.0)]
    if cached:
        callbacks.insert(0 if first else 2, CacheFeatures(progress=False))
    module = PlainModule(tiny_vit(depth=4))
    result = fit_stream(quiet_trainer(callbacks=callbacks), module, tiny_stream(n_tasks=2), **options)
    return result, module


@pytest.mark.parametrize("name", METHODS)
def test_deeper_blocks_are_read_from_the_cache(name):
    plain, module = _stream_result(name, False)
    stored, twin = _stream_result(name, True, first=name == "lst")
    assert twin.plugins["ranpac"].dim == 64  # side network, backbone, two blocks
    for key, value in module.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[key], value, rtol=1e-4, atol=1e-4)
    assert torch.equal(plain.correct, stored.correct)


def test_depth_alone_is_cached():
    states = []
    for callbacks in ([RanPAC(64, depth=3)], [RanPAC(64, depth=3), CacheFeatures(progress=False)]):
        module = PlainModule(tiny_vit(depth=4))
        fit_stream(quiet_trainer(callbacks=callbacks), module, tiny_stream(n_tasks=2))
        states.append(module.state_dict())
    torch.testing.assert_close(states[1]["plugins.ranpac.gram"], states[0]["plugins.ranpac.gram"])


@pytest.mark.parametrize("ridge_first", [False, True])
def test_depth_reads_the_backbone_and_nothing_else(ridge_first):
    """Not registers, not what SHERL runs through the last blocks, and blocks that no side network reads."""
    reference = tiny_vit(depth=4).eval()
    x, tokens = images(5), []
    handles = [reference.blocks[i].register_forward_hook(lambda *a: tokens.append(a[2][:, 0])) for i in (1, 2)]
    with torch.no_grad():
        reference(x)
    for handle in handles:
        handle.remove()
    expected = torch.cat([torch.nn.functional.layer_norm(t, (16,)) for t in tokens], 1)
    methods = {
        "sherl": Sherl(4, late=2),
        "short": LadderSideTuning(2, (0,)),
        "hst": HierarchicalSideTuning(**PYRAMID),
    }
    for name, method in methods.items():
        module, ridge = tiny_vit(depth=4), RanPAC(0, 1.0, depth=2)
        for callback in (ridge, method) if ridge_first else (method, ridge):
            callback.install(module)
        method.start_task(module, Task(0, (0, 1)))
        ridge.fit_head(module, [(x, torch.tensor([0, 1, 0, 1, 0]))])
        closed, seen = module.plugins["ranpac"], []
        closed.scores = lambda f, seen=seen, s=closed.scores: seen.append(f) or s(f)
        module.eval()(x)
        if name == "hst":  # its registers and norms change the tokens, which are still the class token's
            kept = []
            handle = module.blocks[2].register_forward_hook(lambda *a, kept=kept: kept.append(a[2]))
            module(x)
            handle.remove()
            expected_here = torch.nn.functional.layer_norm(kept[0][:, 0], (16,))
            torch.testing.assert_close(seen[-1][:, 32:], expected_here)
        else:
            torch.testing.assert_close(seen[0][:, 16:], expected)


def test_an_entry_is_filled_again_when_more_is_read_from_it(tmp_path):
    callbacks = [SideTuning(width=4, regime="first_session"), RanPAC(8, depth=1, beside=True), CacheFeatures(tmp_path)]
    callbacks[2].cache.progress = False
    filled, fill = [], callbacks[2].cache.fill
    callbacks[2].cache.fill = lambda key, *a, **k: filled.append((key.name, len(key.arrays))) or fill(key, *a, **k)
    stream = tiny_stream(n_tasks=2, train_transform=lambda x: x + 1)
    fit_stream(quiet_trainer(callbacks=callbacks), PlainModule(tiny_vit(depth=4)), stream)
    assert [n for name, n in filled if name == "features-0-v0"] == [2, 3]  # the distillation came before RanPAC
    assert [n for name, n in filled if name == "features-1-v0"] == [3]


def test_an_evaluation_before_the_first_task_reads_images():
    plain, _ = _stream_result("lst", False, evaluate_initial=True)
    stored, _ = _stream_result("lst", True, evaluate_initial=True)
    assert plain.initial.correct == stored.initial.correct
    assert torch.equal(plain.correct, stored.correct)
