"""Where a stream goes on: which checkpoint, and what must be in place before plugins and ``fit`` take over."""

from __future__ import annotations

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
    folders = {Path(d) for d in given if d}
    folders = folders or {Path(trainer.default_root_dir)}
    found = [p for folder in folders if folder.is_dir() for p in folder.rglob("*.ckpt")]
    if not found:
        raise FileNotFoundError(
            f"`ckpt_path='last'` found no .ckpt file in {', '.join(sorted(map(str, folders)))};"
            " give the Trainer a StreamCheckpoint, or leave `ckpt_path` out to start anew"
        )
    return max(found, key=lambda p: p.stat().st_mtime_ns)


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
