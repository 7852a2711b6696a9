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


@pytest.mark.ddp
@pytest.mark.parametrize(
    ("name", "cache"),
    [("lst", "folder"), ("lst", "none"), ("sherl", "memory"), ("side-tuning", "none")],
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
