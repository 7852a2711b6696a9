"""One benchmark run: a method's recipe on a scenario, with a run folder that other tools can read."""

from __future__ import annotations

import importlib
import inspect
import logging
import platform
import shutil
import sys
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

from cl_plugins._reading import read_text
from cl_plugins._text import parse_yaml
from cl_plugins.checkpoint_files import checkpoint_files, keep_newest, newest_intact
from cl_plugins.drift import DriftRow
from cl_plugins.failures import explained
from cl_plugins.inside_tasks import InsideRow
from cl_plugins.progress import StreamProgress
from cl_plugins.recipes import Recipe, load_recipe, with_options
from cl_plugins.result import StreamResult, write_text
from cl_plugins.runner import fit_stream
from cl_plugins.stream_state import StreamState, restore_result
from cl_plugins.task_length import TaskLength
from cl_plugins.workloads import build_module


def build_callbacks(recipe: Recipe, seed: int | None = None) -> list[Any]:
    """The recipe's callbacks, made anew.

    Args:
        recipe: which callbacks, with which arguments.
        seed: of the run; goes to callbacks with a fixed ``seed`` of their own that the recipe does not set, so that
            runs differ in what those draw, such as a random projection. A default of None already follows the run.
    """
    module = importlib.import_module("cl_plugins.callbacks")
    callbacks = []
    for entry in recipe.callbacks:
        kind, arguments = getattr(module, entry["class"]), dict(entry.get("init") or {})
        own = inspect.signature(kind).parameters.get("seed")
        if seed is not None and own is not None and own.default is not None:
            arguments.setdefault("seed", seed)
        callbacks.append(kind(**arguments))
    return callbacks


def folder_of(out: str | Path | None, method: str, scenario: str, seed: int) -> Path:
    """The folder of a run: ``out``, or one named after the run below ``runs``."""
    folder = Path(out) if out is not None else Path("runs") / f"{method}_{scenario}_seed{seed}"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`out` must be a folder, got the file {str(folder)!r}")
    return folder


def run_folder(out: str | Path | None, method: str, scenario: str, seed: int) -> Path:
    """The folder of a run; files of an earlier run in it are moved to ``previous-<n>``, so nothing is lost."""
    folder = folder_of(out, method, scenario, seed)
    folder.mkdir(parents=True, exist_ok=True)
    ours = [
        "result.json",
        "report.html",
        "checkpoints",
        "config.yaml",
        *(p.name for p in folder.glob("events.*.jsonl")),
    ]
    old = [folder / name for name in ours if (folder / name).exists()]
    if old:
        number = 1 + sum(1 for _ in folder.glob("previous-*"))
        previous = folder / f"previous-{number}"
        previous.mkdir()
        for path in old:
            shutil.move(path, previous / path.name)
    return folder


def _check_same(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than the run in ``folder`` began with."""
    theirs = parse_yaml(read_text(folder / "config.yaml"), repr(str(folder / "config.yaml")))
    mine = yaml.safe_load(yaml.safe_dump(dict(config)))
    if not isinstance(theirs, dict):
        raise ValueError(f"`resume` must find the settings of a run in {str(folder / 'config.yaml')!r}, got {theirs!r}")
    flat = [{**c, **{f"recipe.{k}": v for k, v in (c.get("recipe") or {}).items()}} for c in (theirs, mine)]
    changed = [
        f"{k} {flat[0].get(k)!r} there, {flat[1].get(k)!r} here"
        for k in dict.fromkeys([*flat[0], *flat[1]])
        if k != "recipe" and flat[0].get(k) != flat[1].get(k)
    ]
    if changed:
        raise ValueError(
            f"`resume` must go on with the same settings as the run in {str(folder)!r}, got {'; '.join(changed)};"
            " give the same options, or another `out`"
        )


def finished_result(folder: Path, stream: Any) -> StreamResult | None:
    """The result of a run that has its ``result.json``; None for one that is not finished."""
    newest = newest_intact(folder / "checkpoints") if (folder / "result.json").exists() else None
    if newest is None:
        return None
    state, checkpoint = StreamState.for_stream(stream).read(newest)
    result = StreamResult.for_stream(stream)
    restore_result(result, state)
    saved = checkpoint["callbacks"].get("ContinualEvaluation", {"rows": []})
    result.inside_tasks = [InsideRow.from_dict(row) for row in saved["rows"]]
    saved = checkpoint["callbacks"].get("DriftTracker", {"rows": []})
    result.drift = [DriftRow.from_dict(row) for row in saved["rows"]]
    return result


def inside_callbacks(every: int | None, tasks: int | None, samples: int | None, seed: int = 0) -> list[Any]:
    """The callback that evaluates inside tasks, when it is asked for.

    Args:
        every: after so many optimizer steps; None for no such evaluation.
        tasks: of the old tasks, draw so many each time; None takes all.
        samples: of each task, at most so many; None takes all.
        seed: of what is drawn.

    Raises:
        ValueError: for its options without a period, or out of range.
    """
    if every is None:
        given = [name for name, value in (("eval_tasks", tasks), ("eval_samples", samples)) if value is not None]
        if given:
            raise ValueError(f"`eval_every` must be given beside `{given[0]}`, got None; say after how many steps")
        return []
    kind = importlib.import_module("cl_plugins.callbacks").ContinualEvaluation
    return [kind(every, "seen" if tasks is None else tasks, samples, seed)]


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
    resume: bool = False,
    save_every_steps: int | None = None,
    save_every_minutes: float | None = None,
    eval_every: int | None = None,
    eval_tasks: int | None = None,
    eval_samples: int | None = None,
    eval_old: int | None = None,
    keep_checkpoints: bool = False,
    adapters: bool = False,
    drift: bool = False,
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
        resume: go on with the run in the folder where it was stopped, with the same numbers as if it had not been. The
            settings must be the same; a folder without a run starts one, and a finished run is left as it is.
        save_every_steps: save inside tasks, too, after so many optimizer steps; task ends are always saved.
        save_every_minutes: likewise after so many minutes.
        eval_every: also evaluate all tasks so far inside the tasks, after so many optimizer steps.
        eval_tasks: draw so many old tasks for each of these evaluations, for long streams; None takes all.
        eval_samples: of each task at most so many samples in these evaluations; None takes all.
        eval_old: after each task but the last evaluate so many old tasks, drawn by the seed, instead of all; see
            ``evaluate_old`` of :func:`cl_plugins.fit_stream` for what is undefined then.
        keep_checkpoints: leave both checkpoints when the run is finished, not the last one alone.
        adapters: write what the method owns as ``checkpoints/adapters.safetensors``, too.
        drift: measure features, calibration, task confusion and memory at each task end, by a ``DriftTracker``.

    Returns:
        The result; ``result.json``, ``report.html``, ``config.yaml`` and the run's events are in the folder.

    Raises:
        ValueError: for an unknown method, scenario or option, naming the nearest known one; for a resume with other
            settings.
        RunStopped: when the disk, the memory, a data worker or the numbers fail; it says what is saved.
        StreamStopped: behind the save on SIGTERM.
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
    callbacks = build_callbacks(recipe, seed)
    pl.seed_everything(seed, workers=True, verbose=False)
    module = build_module(recipe, stream)
    identity = {"method": method, "scenario": scenario, "seed": seed, "order_seed": order_seed}
    recipe_values = {**asdict(recipe), "callbacks": list(recipe.callbacks)}
    config = {**identity, "device": device, "data": dict(data or {}), "recipe": recipe_values}
    inside = inside_callbacks(eval_every, eval_tasks, eval_samples, seed)
    if inside:
        config["inside_tasks"] = {"eval_every": eval_every, "eval_tasks": eval_tasks, "eval_samples": eval_samples}
    if eval_old is not None:
        config["eval_old"] = eval_old
    drifts = [callbacks_module.DriftTracker()] if drift else []
    if drift:
        config["drift"] = True
    folder = folder_of(out, method, scenario, seed)
    resume = resume and (folder / "config.yaml").exists()
    if resume:
        _check_same(folder, config)
        finished = finished_result(folder, stream)
        if finished is not None:
            print(f"finished already: {folder / 'result.json'}", file=sys.stderr)
            return finished
    try:
        if not resume:
            run_folder(folder, method, scenario, seed)
            write_text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    except OSError as error:
        raise explained(error, folder / "checkpoints") or error from error
    saver = callbacks_module.StreamCheckpoint(
        folder / "checkpoints", save_every_steps, save_every_minutes, adapters=adapters
    )
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
        callbacks=[*callbacks, *lengths, *inside, *drifts, tracker, dashboard, bar, saver],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    started = time.perf_counter()
    open_vocabulary = bool(getattr(stream, "open_vocabulary", False))  # then tasks count before they are learned
    last = "last" if resume and checkpoint_files(saver.folder) else None
    try:
        result = fit_stream(
            trainer, module, stream, last, seed=seed, evaluate_initial=open_vocabulary,
            evaluate_future=open_vocabulary, evaluate_old=eval_old,
        )  # fmt: skip
    except (RuntimeError, OSError, FloatingPointError, MemoryError) as error:
        raise explained(error, saver.folder) or error from error
    _save(result, folder, identity, stream, trainer, recipe, recipe_values, time.perf_counter() - started)
    if not keep_checkpoints:
        keep_newest(saver.folder)
    return result


def _save(
    result: StreamResult,
    folder: Path,
    identity: Mapping[str, Any],
    stream: Any,
    trainer: pl.Trainer,
    recipe: Recipe,
    recipe_values: Mapping[str, Any],
    seconds: float,
) -> None:
    """Write ``result.json``, whole or not at all."""
    result.save(
        folder,
        **identity,
        class_order=list(stream.class_order),
        epochs=recipe.epochs,
        wall_seconds=seconds,
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
        recipe=recipe_values,
    )


def _installed(name: str) -> bool:
    """Whether a distribution is installed; the library itself may run from a checkout."""
    return any(d.name == name for d in distributions(name=name))
