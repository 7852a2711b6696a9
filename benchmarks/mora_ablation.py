"""MoRA's settings on xtail-glyphs, one at a time: Transfer, Average, Last and forgetting of each.

What acts in training (temperature, experts per token, normalization) is trained anew; the threshold acts in evaluation
alone, so several are evaluated after every task of the same run.

    python benchmarks/mora_ablation.py --out mora_ablation.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from cl_plugins.benchmark import build_callbacks, quiet_lightning
from cl_plugins.callbacks import MoRA
from cl_plugins.evaluation import evaluate_tasks
from cl_plugins.plugin import ContinualCallback, Row
from cl_plugins.recipes import load_recipe, with_options
from cl_plugins.runner import fit_stream
from cl_plugins.scenarios import TaskStream, build_scenario
from cl_plugins.workloads import build_module

SCENARIO = "xtail-glyphs"
TRAINED: dict[str, dict[str, Any]] = {
    "recipe": {},
    "temperature 0.1": {"temperature": 0.1},
    "top_k 4": {"top_k": 4},
    "score_norm cosine": {"score_norm": "cosine"},
    "top_k 64": {"top_k": 64},
    "temperature 1": {"temperature": 1.0},
    "score_norm none": {"score_norm": "none"},
    "temperature 0.03": {"temperature": 0.03},
    "k_schedule per_task": {"k_schedule": "per_task"},
    "new_key_init orthogonal_to_old": {"new_key_init": "orthogonal_to_old"},
    "visual tower alone": {"targets": r".*\.visual\..*(in_proj|out_proj|c_fc|c_proj)"},
}
EVALUATED = [("absolute", 0.0), ("absolute", 0.2), ("absolute", 0.4), ("sqrt_r", 0.4), ("sqrt_r", 0.8)]


class Thresholds(ContinualCallback):
    """Evaluates with further thresholds after every task."""

    training = "neutral"

    def __init__(self, method: MoRA, stream: TaskStream) -> None:
        super().__init__()
        self.method, self.stream = method, stream
        self.rows: dict[tuple[str, float], list[Row]] = {setting: [] for setting in EVALUATED}

    def on_row(self, trainer: pl.Trainer, pl_module: Any, row: Row) -> None:
        """Evaluate anew with each setting and set the run's own back."""
        if row.after < 0:
            return
        banks = self.method.banks(pl_module).values()
        own = {bank: bank.options for bank in banks}
        for (mode, threshold), rows in self.rows.items():
            for bank, options in own.items():
                bank.options = replace(options, delta_mode=mode, threshold=threshold)
            pl_module.net.forget()
            rows.append(evaluate_tasks(pl_module, self.stream, row.after, trainer=trainer, future=True))
        for bank, options in own.items():
            bank.options = options
        pl_module.net.forget()


def train(options: Mapping[str, Any], seed: int, sweep: bool, split: str) -> dict[str, dict[str, float | None]]:
    """The metrics of one run, and of its further thresholds."""
    recipe = with_options(load_recipe("mora", SCENARIO), options)
    stream = build_scenario(SCENARIO, batch_size=recipe.batch_size, order_seed=seed, data_seed=seed, **recipe.data)
    if split == "validation":
        assert stream.validation is not None
        stream.test = stream.validation
    pl.seed_everything(seed, verbose=False)
    module = build_module(recipe, stream)
    (method,) = build_callbacks(recipe)
    thresholds = Thresholds(method, stream)
    trainer = pl.Trainer(
        max_epochs=recipe.epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
        callbacks=[method, *([thresholds] if sweep else [])], enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    result = fit_stream(trainer, module, stream, seed=seed, evaluate_initial=True, evaluate_future=True)
    found = {"": result.metrics()}
    for (mode, threshold), rows in thresholds.rows.items() if sweep else ():
        result.rows[:] = rows
        found[f"threshold {threshold:g}, {mode}"] = result.metrics()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(TRAINED), help="settings to train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--out", type=Path, default=Path("mora_ablation.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    quiet_lightning()
    table = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.only:
        for further, metrics in train(TRAINED[name], options.seed, name == "recipe", options.split).items():
            table[further or name] = metrics
            numbers = "".join(
                f"{key} {float('nan') if metrics[key] is None else metrics[key]:.3f}  "
                for key in ("transfer", "zero_shot", "average", "last", "learning_accuracy", "forgetting")
            )
            print(f"{further or name:<34}{numbers}", flush=True)
        options.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
