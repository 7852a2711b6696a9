"""Settings of the side-tuning recipes, compared on validation data; test data is never read.

    python benchmarks/side_settings.py split-digits --epochs 10
    python benchmarks/side_settings.py split-glyphs-100 --epochs 5 --only lst sherl

Each line is one run with one seed: average accuracy on the validation samples of all tasks after the last one.
split-digits holds out a fifth of its training samples, split-glyphs-100 has validation fonts of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
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


def callback(name: str, **options: Any) -> dict[str, Any]:
    return {"class": name, "init": options}


FIRST: dict[str, Any] = {"regime": "first_session"}
CACHE = callback("CacheFeatures", progress=False)
RIDGE = callback("RanPAC", beside=True)
LADDER: dict[str, Any] = {"reduction": 4, "layers": "quarter"}
CANDIDATES: dict[str, list[dict[str, Any]]] = {
    "ranpac": [callback("RanPAC")],
    "lst per task": [callback("LadderSideTuning", init="fisher", regime="per_task", **LADDER), CACHE],
    "lst first task, ridge": [callback("LadderSideTuning", init="fisher", **LADDER, **FIRST), RIDGE, CACHE],
    "lst first task, magnitude, ridge": [callback("LadderSideTuning", **LADDER, **FIRST), RIDGE, CACHE],
    "sherl per task": [callback("Sherl", reduction=4, regime="per_task"), CACHE],
    "sherl first task, ridge": [callback("Sherl", reduction=4, **FIRST), RIDGE, CACHE],
    "sherl first task, identity, ridge": [callback("Sherl", reduction=4, gate_init="identity", **FIRST), RIDGE, CACHE],
    "hst first task, ridge": [callback("HierarchicalSideTuning", **FIRST), RIDGE],
    "hst-lean per task": [callback("LeanHierarchicalSideTuning", regime="per_task"), CACHE],
    "hst-lean first task, ridge": [callback("LeanHierarchicalSideTuning", **FIRST), RIDGE, CACHE],
    "side-tuning per task": [callback("SideTuning", width=16), CACHE],
    "side-tuning first task, ridge": [callback("SideTuning", width=16, **FIRST), RIDGE, CACHE],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=["split-digits", "split-glyphs-100"])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of the settings' names")
    options = parser.parse_args()
    torch.set_num_threads(1)
    quiet_lightning()
    for name, callbacks in CANDIDATES.items():
        if not name.startswith(tuple(options.only)):
            continue
        started = time.process_time()
        held = {"validation_fraction": 0.2} if options.scenario == "split-digits" else {}
        stream = build_scenario(options.scenario, **held)
        stream.test = stream.validation  # what fit_stream evaluates on
        recipe = dataclasses.replace(load_recipe("lst", options.scenario), callbacks=callbacks)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=options.epochs,
            callbacks=build_callbacks(recipe),
            **QUIET,
        )
        result = fit_stream(trainer, build_module(recipe, stream), stream, seed=options.seed)
        seconds = time.process_time() - started
        print(f"{name:36s} {result.average_accuracy:.4f}  {seconds:6.0f} s", flush=True)


if __name__ == "__main__":
    main()
