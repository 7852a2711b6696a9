"""What ForgettingTracker, ForgettingDashboard and its run store cost, as a share of training a tiny ViT.

Both callbacks stand in one ordinary run of ``fit_stream`` at default settings. Two figures, in CPU time:

* Side by side: their hooks of training batches are called in every other step and left out in the steps between, in the
  order with, without, without, with. A step lasts from the start of its batch to the start of the next one. Reported is
  the ratio within each pair of neighbors, median with quartiles, and the same ratio of two steps that both go without,
  which shows what the measurement itself can tell apart.
* By a clock around each hook: the time inside the hooks of batches as a share of a step, and the hooks at the ends of
  tasks (rows, events, the report) per task.

The share of a step should be under one percent.

    python benchmarks/dashboard_overhead.py                   # about a minute
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks._common import QUIET
from cl_plugins import fit_stream
from cl_plugins.backbones import create_backbone
from cl_plugins.benchmark import quiet_lightning
from cl_plugins.callbacks import ForgettingDashboard, ForgettingTracker
from cl_plugins.recipes import load_recipe
from cl_plugins.scenarios import ClassIncremental
from cl_plugins.workloads import ImageClassifier

_ORDER = (True, False, False, True, False, False)  # two pairs with and without, then one without and without


class Steps(pl.Callback):
    """Stands first: says which steps have the hooks, and how long each step took."""

    def __init__(self) -> None:
        self.on, self._at, self._before = True, 0, 0.0
        self.blocks: list[list[float]] = []

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A block does not reach over the end of an epoch."""
        self._at = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the time of the step before and set the switch for this one."""
        now, place = time.process_time(), self._at % len(_ORDER)
        if self._at:
            if self._at % len(_ORDER) == 1:
                self.blocks.append([])
            self.blocks[-1].append(now - self._before)
        self.on, self._before, self._at = _ORDER[place], now, self._at + 1

    def ratios(self) -> tuple[list[float], list[float]]:
        """Of each whole block: with over without, and without over without."""
        whole = [b for b in self.blocks if len(b) == len(_ORDER)]
        return [r for b in whole for r in (b[0] / b[1], b[3] / b[2])], [b[4] / b[5] for b in whole]


def timed(callback: pl.Callback, steps: Steps, spent: dict[str, float], calls: dict[str, int]) -> pl.Callback:
    """The callback with a clock around each of its hooks; those of batches follow the switch."""

    def clocked(name: str, hook: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not steps.on and _of_batches(name):
                return None
            started = time.process_time()
            try:
                return hook(*args, **kwargs)
            finally:
                spent[name] += time.process_time() - started
                calls[name] += 1

        return run

    for name in dir(type(callback)):
        if name.startswith("on_") or name in ("setup", "teardown"):
            setattr(callback, name, clocked(name, getattr(callback, name)))
    return callback


def _of_batches(name: str) -> bool:
    return any(part in name for part in ("batch", "zero_grad", "optimizer", "backward"))


def _spread(values: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)], "pairs": len(values)}


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--backbone", default="vit_glyph")
    parser.add_argument("--tasks", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_lightning()
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    stream = ClassIncremental("digits", n_tasks=options.tasks, batch_size=options.batch_size)
    module = ImageClassifier(create_backbone(options.backbone, 10), load_recipe("finetune"))
    steps = Steps()
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [timed(c, steps, spent, calls) for c in (ForgettingTracker(), ForgettingDashboard(folder))]
        trainer = pl.Trainer(accelerator="cpu", max_epochs=options.epochs, callbacks=[steps, *callbacks], **QUIET)
        fit_stream(trainer, module, stream)
    every = [second for block in steps.blocks for second in block]
    step = statistics.median(every)
    inside = {name: value for name, value in spent.items() if _of_batches(name)}
    # each hook of the two callbacks was called once in a step that had them
    per_step = sum(value / (calls[name] / len(callbacks)) for name, value in inside.items())
    beside, nothing = steps.ratios()
    told = {
        "steps": len(every),
        "step_ms": 1e3 * step,
        "with_over_without": _spread(beside),
        "without_over_without": _spread(nothing),
        "hooks_per_step_us": 1e6 * per_step,
        "share_of_a_step_percent": 100 * per_step / step,
        "hooks_at_task_ends_ms_per_task": 1e3 * (sum(spent.values()) - sum(inside.values())) / options.tasks,
        "hooks_ms": {k: 1e3 * v for k, v in sorted(spent.items(), key=lambda kv: -kv[1])[:6]},
    }
    print(json.dumps(json.loads(json.dumps(told), parse_float=lambda text: round(float(text), 4)), indent=1))


if __name__ == "__main__":
    main()
