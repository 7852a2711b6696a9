"""Ridge regression on the backbone's feature and a side network's."""

from __future__ import annotations

import pytest
import torch

from cl_plugins import Task
from cl_plugins.callbacks import CacheFeatures, RanPAC
from cl_plugins.features import feature
from tests._helpers import PlainModule, tiny_stream, tiny_vit
from tests._side import METHODS, images, started, train


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
