"""One benchmark run: a method's recipe on a scenario, with a run folder that other tools can read."""

from __future__ import annotations

import importlib
import logging
import platform
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import yaml

from cl_plugins.progress import StreamProgress
from cl_plugins.recipes import Recipe, load_recipe, with_options
from cl_plugins.result import StreamResult
from cl_plugins.runner import fit_stream
from cl_plugins.task_length import TaskLength
from cl_plugins.workloads import build_module


def build_callbacks(recipe: Recipe) -> list[Any]:
    """The recipe's callbacks, made anew."""
    module = importlib.import_module("cl_plugins.callbacks")
    return [getattr(module, c["class"])(**(c.get("init") or {})) for c in recipe.callbacks]


def run_folder(out: str | Path | None, method: str, scenario: str, seed: int) -> Path:
    """The folder of a run; files of an earlier run in it are moved to ``previous-<n>``, so nothing is lost."""
    folder = Path(out) if out is not None else Path("runs") / f"{method}_{scenario}_seed{seed}"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`out` must be a folder, got the file {str(folder)!r}")
    folder.mkdir(parents=True, exist_ok=True)
    ours = ["result.json", "report.html", "config.yaml", *(p.name for p in folder.glob("events.*.jsonl"))]
    old = [folder / name for name in ours if (folder / name).exists()]
    if old:
        number = 1 + sum(1 for _ in folder.glob("previous-*"))
        previous = folder / f"previous-{number}"
        previous.mkdir()
        for path in old:
            shutil.move(path, previous / path.name)
    return folder


def quiet_lightning() -> None:
    """Silence Lightning's notes on devices, workers and tips; errors still show."""
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (".*does not have many workers.*", ".*LeafSpec.*", ".*in eval mode at the start.*",
                    ".*The number of training batches.*", ".*GPU available but not used.*"):  # fmt: skip
        warnings.filterwarnings("ignore", message)


def run_benchmark(
    method: str,
    scenario: str,
    *,
    seed: int = 0,
    order_seed: int | None = None,
    epochs: int | None = None,
    device: str = "auto",
    out: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> StreamResult:
    """Train and evaluate a method on a scenario and write the run folder.

    Args:
        method: a recipe's name, such as ``"ovor"``.
        scenario: a registered stream's name, such as ``"split-digits"``.
        seed: of initialization and data order.
        order_seed: shuffles the classes over the tasks; None keeps the scenario's own order.
        epochs: per task, in place of the recipe's.
        device: "auto", "cpu", "cuda" or "mps".
        out: the run folder; ``runs/<method>_<scenario>_seed<seed>`` when None.
        options: settings of the recipe or arguments of its callbacks, in place of its own.
        data: arguments of the scenario, such as ``root`` of a data set on disk.
        progress: show a progress bar.

    Returns:
        The result; ``result.json``, ``report.html``, ``config.yaml`` and the run's events are in the folder.

    Raises:
        ValueError: for an unknown method, scenario or option, naming the nearest known one.
    """
    scenarios = importlib.import_module("cl_plugins.scenarios")
    callbacks_module = importlib.import_module("cl_plugins.callbacks")
    recipe = with_options(
        load_recipe(method, scenario),
        {**(options or {}), **({} if epochs is None else {"epochs": epochs, "epochs_per_task": (), "steps": None})},
    )
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise ValueError(f"`device` must be auto, cpu, cuda or mps, got {device!r}")
    quiet_lightning()
    stream = scenarios.build_scenario(
        scenario,
        **{"batch_size": recipe.batch_size, "order_seed": order_seed, "data_seed": seed, **recipe.data, **(data or {})},
    )
    if recipe.joint:
        stream = scenarios.Joint(stream)
    callbacks = build_callbacks(recipe)
    pl.seed_everything(seed, workers=True, verbose=False)
    module = build_module(recipe, stream)
    folder = run_folder(out, method, scenario, seed)
    identity = {"method": method, "scenario": scenario, "seed": seed, "order_seed": order_seed}
    config = {**identity, "device": device, "recipe": {**asdict(recipe), "callbacks": list(recipe.callbacks)}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    dashboard = callbacks_module.ForgettingDashboard(folder.parent, run_id=folder.name, meta=config)
    tracker = callbacks_module.ForgettingTracker()
    lengths = []
    if recipe.steps is not None or recipe.epochs_per_task:
        lengths.append(TaskLength(steps=recipe.steps, epochs=recipe.epochs_per_task))
    bar = StreamProgress(f"{method} on {scenario}", enabled=progress)
    trainer = pl.Trainer(
        max_epochs=recipe.epochs,
        accelerator={"auto": "auto", "cuda": "gpu"}.get(device, device),
        devices=1,
        gradient_clip_val=recipe.gradient_clip or None,
        callbacks=[*callbacks, *lengths, tracker, dashboard, bar],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    started = time.perf_counter()
    open_vocabulary = bool(getattr(stream, "open_vocabulary", False))  # then tasks count before they are learned
    result = fit_stream(
        trainer, module, stream, seed=seed, evaluate_initial=open_vocabulary, evaluate_future=open_vocabulary
    )
    result.save(
        folder,
        **identity,
        class_order=list(stream.class_order),
        epochs=recipe.epochs,
        wall_seconds=time.perf_counter() - started,
        hardware={
            "device": str(trainer.strategy.root_device),
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        },
        versions={
            "python": platform.python_version(),
            **{
                name: version(name)
                for name in ("torch", "pytorch-lightning", "timm", "open_clip_torch", "cl-plugins")
                if _installed(name)
            },
        },
        recipe=config["recipe"],
    )
    return result


def _installed(name: str) -> bool:
    """Whether a distribution is installed; the library itself may run from a checkout."""
    return any(d.name == name for d in distributions(name=name))


def summary_table(result: StreamResult) -> str:
    """The named numbers and the accuracy matrix, for a terminal."""
    names = {
        "transfer": "transfer (before learning)",
        "average": "average (all cells)",
        "last": "last (last row, all tasks)",
        "zero_shot": "zero-shot (before any training)",
        "average_accuracy": "average accuracy (last row)",
        "average_incremental_accuracy": "average incremental accuracy",
        "learning_accuracy": "learning accuracy",
        "forgetting": "forgetting (peak since learned)",
        "backward_transfer": "backward transfer",
        "average_accuracy_task_known": "average accuracy, task known",
    }
    lines = []
    if len(result.tasks) <= 12:
        matrix = result.accuracy_matrix
        lines.append(" " * 12 + "".join(f"{'T' + str(t.index):>7}" for t in result.tasks))
        for row, values in zip(result.rows, matrix, strict=True):
            cells = "".join("      ." if v != v else f"{float(v):7.3f}" for v in values)
            lines.append(f"after T{row.after:<5}{cells}")
        lines.append("")
    for key, value in result.metrics().items():
        lines.append(f"{names[key]:<34}{'undefined' if value is None else format(value, '.4f'):>9}")
    seconds = sum(result.train_seconds)
    lines.append(f"{'trainable parameters':<34}{result.trainable_parameters:>9,}")
    lines.append(f"{'seconds training / evaluating':<34}{seconds:>9.1f} / {result.eval_seconds:.1f}")
    return "\n".join(lines)
