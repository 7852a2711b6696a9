"""Where a stream goes on: which checkpoint, and what must be in place before plugins and ``fit`` take over."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cl_plugins._lightning import callbacks_of
from cl_plugins.checkpoint_files import checkpoint_files, damage, newest_intact
from cl_plugins.stream_checkpoint import StreamCheckpoint
from cl_plugins.task import Stream

if TYPE_CHECKING:
    import pytorch_lightning as pl


def savers_of(trainer: pl.Trainer) -> list[StreamCheckpoint]:
    """The callbacks of a Trainer that save streams."""
    return [c for c in callbacks_of(trainer) if isinstance(c, StreamCheckpoint)]


def find_checkpoint(trainer: pl.Trainer, ckpt_path: str | Path) -> Path:
    """The checkpoint file that ``ckpt_path`` means; ``"last"`` is the newest one of this Trainer's folders.

    Raises:
        FileNotFoundError: saying where it was looked for.
        ValueError: for a damaged file, and when folders of several runs might be meant.
    """
    if str(ckpt_path) != "last":
        path = Path(ckpt_path)
        if not path.is_file():
            raise FileNotFoundError(f"`ckpt_path` must be a checkpoint file or 'last', got {str(ckpt_path)!r}")
        wrong = damage(path) if path in checkpoint_files(path.parent) else None
        if wrong is not None:
            raise ValueError(f"`ckpt_path` must be a whole checkpoint, got {str(path)!r}: {wrong}; use 'last'")
        return path
    for saver in savers_of(trainer):
        newest = newest_intact(saver.folder)
        if newest is not None:
            return newest
    given = [getattr(c, "dirpath", None) for c in trainer.checkpoint_callbacks]
    folders = {Path(d) for d in given if d} or _usual_folders(trainer)
    found = [p for folder in folders if folder.is_dir() for p in folder.rglob("*.ckpt")]
    if not found:
        raise FileNotFoundError(
            f"`ckpt_path='last'` found no .ckpt file in {', '.join(sorted(map(str, folders)))};"
            " give the Trainer a StreamCheckpoint, or leave `ckpt_path` out to start anew"
        )
    return max(found, key=lambda p: p.stat().st_mtime_ns)


def _usual_folders(trainer: pl.Trainer) -> set[Path]:
    """Where Lightning saves when no callback names a folder: this run's own, else the only one there is.

    Raises:
        ValueError: when several runs have left checkpoints, which may be of other experiments.
    """
    root = Path(trainer.default_root_dir)
    own, others = root / "checkpoints", []
    if trainer.loggers:
        logger = trainer.loggers[0]
        runs = Path(logger.save_dir or root) / str(logger.name)
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        own, others = runs / version / "checkpoints", [root / "checkpoints", *runs.glob("*/checkpoints")]
    else:
        others = list(root.glob("lightning_logs/*/checkpoints"))
    if any(own.rglob("*.ckpt")):
        return {own}
    held = sorted({folder for folder in others if any(folder.rglob("*.ckpt"))})
    if len(held) > 1:
        raise ValueError(
            "`ckpt_path='last'` must find the checkpoints of one run, got those of"
            f" {len(held)}: {', '.join(map(str, held))}; give the path of the file to go on from, or give the Trainer a"
            " StreamCheckpoint with a folder of its own"
        )
    return set(held) or {own, *others}


def say_where(trainer: pl.Trainer, path: Path, task: int, step: int) -> None:
    """Name the checkpoint that a stream goes on from, on the first process's standard error."""
    if trainer.global_rank == 0:
        print(f"resuming from {path} (task {task}, step {step})", file=sys.stderr, flush=True)


def load_own_weights(module: nn.Module, saved: dict[str, Tensor]) -> None:
    """Put back what the user built before the plugins grow: they may compute starting weights or cached features there.

    ``fit`` loads all of it once more, strictly, when the structure of the task is complete.
    """
    with torch.no_grad():
        for name, value in module.state_dict().items():
            known = None if name.startswith("plugins.") else saved.get(name)
            if isinstance(known, Tensor) and isinstance(value, Tensor) and known.shape == value.shape:
                value.copy_(known)


def restore_between(
    trainer: pl.Trainer, module: pl.LightningModule, stream: Stream, checkpoint: dict[str, Any], plugins: list[Any]
) -> None:
    """Put weights, callbacks and counters back, as they were when task ``checkpoint`` names was about to start."""
    for plugin in plugins:
        plugin.install(module)
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    if type(stream).__qualname__ in checkpoint:
        stateful: Any = stream  # between_tasks found a `state_dict`, which the protocol does not ask for
        stateful.load_state_dict(checkpoint[type(stream).__qualname__])
    for callback in callbacks_of(trainer):
        callback.on_load_checkpoint(trainer, module, checkpoint)
        if callback.state_key in checkpoint["callbacks"]:
            callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    trainer.fit_loop.load_state_dict(checkpoint["loops"]["fit_loop"])
    trainer.fit_loop.restarting = False  # the next task starts at its beginning
