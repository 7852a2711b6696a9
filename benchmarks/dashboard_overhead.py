"""What ForgettingTracker, ForgettingDashboard and its run store cost, as a share of training a tiny ViT.

Every hook of both callbacks is timed inside one ordinary run of ``fit_stream`` at default settings, so nothing else
is in the figure: hooks of training batches as a share of the time in ``fit``, and hooks at the ends of tasks (rows,
events, the report) per task.

    python benchmarks/dashboard_overhead.py
"""

from __future__ import annotations

import argparse
import json
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


def timed(callback: pl.Callback, spent: dict[str, float], calls: dict[str, int]) -> pl.Callback:
    """The callback with a clock around each of its hooks."""

    def clocked(name: str, hook: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return hook(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - started
                calls[name] += 1

        return run

    for name in dir(type(callback)):
        if name.startswith("on_") or name in ("setup", "teardown"):
            setattr(callback, name, clocked(name, getattr(callback, name)))
    return callback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--backbone", default="vit_glyph")
    parser.add_argument("--tasks", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_lightning()
    spent: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    stream = ClassIncremental("digits", n_tasks=options.tasks, batch_size=options.batch_size)
    module = ImageClassifier(create_backbone(options.backbone, 10), load_recipe("finetune"))
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [timed(c, spent, calls) for c in (ForgettingTracker(), ForgettingDashboard(folder))]
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=options.epochs,
            callbacks=callbacks,
            **QUIET,
        )
        result = fit_stream(trainer, module, stream)
    training = sum(result.train_seconds)
    inside = {k: v for k, v in spent.items() if "batch" in k or "zero_grad" in k or "optimizer" in k or "backward" in k}
    steps = max((calls[k] for k in inside), default=0) // 2
    told = {
        "steps": steps,
        "training_seconds": training,
        "step_ms": 1e3 * training / max(steps, 1),
        "hooks_per_step_us": 1e6 * sum(inside.values()) / max(steps, 1),
        "share_of_a_step_percent": 100 * sum(inside.values()) / training,
        "other_hooks_ms_per_task": 1e3 * (sum(spent.values()) - sum(inside.values())) / options.tasks,
        "share_of_everything_percent": 100 * sum(spent.values()) / training,
        "hooks_ms": {k: 1e3 * v for k, v in sorted(spent.items(), key=lambda kv: -kv[1])[:6]},
    }
    print(json.dumps(told, indent=1, default=lambda v: round(v, 4)))


if __name__ == "__main__":
    main()
