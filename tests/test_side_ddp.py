"""Side networks and their cache with two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests._helpers import run_script

SCRIPT = """
import sys
from pathlib import Path
import torch
from pytorch_lightning.strategies import DDPStrategy
from cl_plugins import fit_stream
from cl_plugins.callbacks import CacheFeatures
from tests._helpers import PlainModule, quiet_trainer, tiny_stream, tiny_vit
from tests._side import METHODS


class Plain(PlainModule):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


name, cache, processes, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
options = {"lst": {"layers": "none", "init": "magnitude"}}.get(name, {})
method = METHODS[name](regime="per_task", **options)
strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=False) if processes == 2 else "auto"
cached = CacheFeatures(None if cache == "memory" else out / "cache", progress=False)
filled, fill = [], cached.cache.fill
cached.cache.fill = lambda key, *args, **kwargs: filled.append(key.name) or fill(key, *args, **kwargs)
callbacks = [method] if cache == "none" else [method, cached]
trainer = quiet_trainer(max_epochs=2, callbacks=callbacks, devices=processes, strategy=strategy)
module = Plain(tiny_vit(depth=4))
stream = tiny_stream(n_per_class=8, batch_size=8 // processes, n_tasks=2)
result = fit_stream(trainer, module, stream, seed=1)
state = {k: v.cpu() for k, v in module.state_dict().items()}
torch.save({"state": state, "correct": result.correct, "filled": torch.tensor(len(filled))},
           out / f"{processes}-rank{trainer.global_rank}.pt")
"""


def _run(tmp_path: Path, name: str, cache: str, processes: int) -> list[dict]:
    run_script(SCRIPT, tmp_path, name, cache, processes, tmp_path)
    return [torch.load(tmp_path / f"{processes}-rank{r}.pt", weights_only=True) for r in range(processes)]


OTHERS = [("lst", "none"), ("sherl", "memory"), ("side-tuning", "none")]

HALVES = """
import sys
from pathlib import Path
import numpy as np
import torch
from pytorch_lightning.strategies import DDPStrategy
from cl_plugins import fit_stream
from cl_plugins.scenarios.sampler import TaskSampler
from tests._helpers import PlainModule, quiet_trainer, tiny_stream, tiny_vit
from tests._side import ALL_METHODS


class Plain(PlainModule):
    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Halves(TaskSampler):
    "What two processes see in their batches of 4, one batch after the other."

    def share(self):
        order = super().share()
        return np.concatenate([order[i : i + 8][r::2] for i in range(0, len(order), 8) for r in (0, 1)])


name, regime, processes, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4])
torch.manual_seed(0)
options = {"strategy": DDPStrategy(process_group_backend="gloo")} if processes == 2 else {"accumulate_grad_batches": 2}
stream = tiny_stream(n_per_class=8, batch_size=4, n_tasks=2)
if processes == 1:
    plain = stream.train_dataloader

    def halves():
        loader = plain()
        loader.sampler.__class__ = Halves
        return loader

    stream.train_dataloader = halves
trainer = quiet_trainer(
    max_epochs=2, callbacks=[ALL_METHODS[name](regime=regime)], devices=processes, precision="64-true", **options
)
module = Plain(tiny_vit(depth=4)).double()
before = {k: v.clone() for k, v in module.state_dict().items()}
fit_stream(trainer, module, stream, seed=1)
state = {k: v.detach().cpu() for k, v in module.state_dict().items()}
weights = {k: v.detach().cpu() for k, v in module.named_parameters()}
torch.save({"state": state, "weights": weights, "steps": trainer.global_step, "before": before},
           out / f"{processes}-rank{trainer.global_rank}.pt")
"""


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "regime"),
    [
        ("hst", "per_task"),
        ("lean-hst", "per_task"),
    ],
)
def test_batch_statistics_of_two_processes_equal_two_halves_of_one_batch(tmp_path, name, regime):
    """Each process normalizes by its own half, so one process that takes the halves in turn must end at its weights.

    Not so where running statistics, which are the first process's own, act in training: in later tasks of a shared side
    network, and in the earlier side networks that "per_task_dense" reads.
    """
    runs = {}
    for processes in (2, 1):
        run_script(HALVES, tmp_path, name, regime, processes, tmp_path)
        files = [tmp_path / f"{processes}-rank{r}.pt" for r in range(processes)]
        runs[processes] = [torch.load(f, weights_only=True) for f in files]
    (alone,), (first, second) = runs[1], runs[2]
    assert alone["steps"] == first["steps"] == 12  # three steps in each of two epochs of two tasks
    for key, value in first["state"].items():  # running statistics, routing and temperatures as well
        assert torch.equal(value, second["state"][key]), key
    for key, value in alone["weights"].items():
        assert torch.allclose(first["weights"][key], value, rtol=1e-9, atol=1e-11), key
    moved = [k for k, v in alone["weights"].items() if k in alone["before"] and not torch.equal(v, alone["before"][k])]
    assert sorted(moved) == ["model.head.bias", "model.head.weight"]  # the backbone stays as it was


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("name", "cache"),
    [("lst", "folder"), *(pytest.param(*a, marks=pytest.mark.slow) for a in OTHERS)],
)
def test_two_processes_equal_one_with_the_same_batch(tmp_path, name, cache):
    first, second = _run(tmp_path, name, cache, 2)
    if cache == "folder":
        assert first["filled"] > 0
        assert second["filled"] == 0  # it waited and read the first one's files
        for path in (tmp_path / "cache").iterdir():
            path.unlink()
    (alone,) = _run(tmp_path, name, cache, 1)
    assert any("sides.1." in key for key in alone["state"])
    for key, value in alone["state"].items():
        assert torch.equal(first["state"][key], second["state"][key]), key
        assert torch.allclose(first["state"][key], value, rtol=1e-3, atol=1e-4), key
