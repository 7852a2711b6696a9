"""OVOR's head epochs: features computed anew in each, read from `CacheFeatures`, or collected once; side by side.

    python benchmarks/head_phase.py split-digits --seeds 0 1 2
    python benchmarks/head_phase.py split-glyphs-100 --seeds 0

Seconds are processor time of training alone, all tasks together, of the same seed in turn; evaluation is not counted.
The bundled streams have no augmentation, so all three see the same features.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks._common import QUIET
from cl_plugins import fit_stream
from cl_plugins.benchmark import build_callbacks, quiet_lightning
from cl_plugins.recipes import load_recipe
from cl_plugins.scenarios import build_scenario
from cl_plugins.workloads import build_module

VARIANTS = ("each epoch", "CacheFeatures", "refresh_features=False")


class _Clock(pl.Callback):
    """Processor seconds inside training."""

    seconds = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._began = time.process_time()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds += time.process_time() - self._began


def train(scenario: str, variant: str, seed: int) -> tuple[float, float]:
    """Seconds of training and average accuracy of one run."""
    stream = build_scenario(scenario, seed=seed)
    recipe = load_recipe("ovor", scenario)
    given = next(c for c in recipe.callbacks if c["class"] == "OVOR")
    method: dict[str, Any] = {"class": "OVOR", "init": dict(given["init"])}
    others: list[dict[str, Any]] = []
    if variant == "CacheFeatures":
        others = [{"class": "CacheFeatures", "init": {"progress": False}}]
    elif variant == "refresh_features=False":
        method["init"]["refresh_features"] = False
    recipe = dataclasses.replace(recipe, callbacks=(method, *others))
    clock = _Clock()
    torch.manual_seed(seed)
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=recipe.epochs, callbacks=[*build_callbacks(recipe), clock], **QUIET
    )
    result = fit_stream(trainer, build_module(recipe, stream), stream, seed=seed)
    return clock.seconds, result.average_accuracy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=["split-digits", "split-glyphs-100"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_lightning()
    runs: dict[str, list[tuple[float, float]]] = {v: [] for v in VARIANTS}
    for seed in options.seeds:
        for variant in VARIANTS:
            runs[variant].append(train(options.scenario, variant, seed))
            seconds, accuracy = runs[variant][-1]
            print(f"seed {seed}  {variant:24s} {seconds:7.1f} s  {accuracy:.4f}", flush=True)
    print(f"\n| head epochs on {options.scenario} | seconds | relative | accuracy |\n|---|---|---|---|")
    for variant, rows in runs.items():
        ratio = statistics.median(s / e for (s, _), (e, _) in zip(rows, runs["each epoch"], strict=True))
        seconds, accuracy = (statistics.mean(column) for column in zip(*rows, strict=True))
        print(f"| {variant} | {seconds:.1f} | {ratio:.2f} | {accuracy:.4f} |")


if __name__ == "__main__":
    main()
