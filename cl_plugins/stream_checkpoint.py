"""Saves a stream inside its tasks, between them, and when the process is told to end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cl_plugins._lightning import Checkpoint, callbacks_of, datamodule_of
from cl_plugins.adapter_export import check_owned, export_adapters
from cl_plugins.checkpoint_files import publish
from cl_plugins.plugin import plugins_of

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from cl_plugins.task import Stream

KIND = "cl_plugins.between_tasks"
"""Key that marks a checkpoint written between two tasks."""


class StreamStopped(SystemExit):
    """The process was told to end; the stream is saved. Uncaught, it ends Python quietly with status 143."""

    def __init__(self, text: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.text = text

    def __str__(self) -> str:
        return self.text


class StreamCheckpoint(Checkpoint):
    """Saves everything that a stream needs to go on as if it had never been stopped.

    WHEN: at the end of each task, behind its evaluation, so that nothing is evaluated twice; inside a task every so
    many optimizer steps or minutes, behind all that callbacks and module do at the end of the batch; and once when
    SIGTERM arrives, as from Slurm or a spot instance: then the process ends with status 143. What falls on an epoch's
    last step waits until the next epoch begins, behind the validation, or until the task's evaluation is done. Resume
    with ``fit_stream(..., ckpt_path="last")``.

    Args:
        folder: of the checkpoints, two at a time; created when missing.
        every_n_steps: also save inside tasks, after so many optimizer steps; None does not.
        every_n_minutes: also save inside tasks when so much time has passed since the last save; None does not.
        keep: how many checkpoints stay, 2 or more, so that a good one is left when the newest is damaged.
        adapters: also write what the methods own as ``adapters.safetensors`` in the folder, at each task's end; see
            :func:`cl_plugins.adapter_export.load_adapters`.

    Note:
        A checkpoint holds the weights with the grown structure, optimizers, schedulers, GradScaler, the position in
        the stream and in the data, the random states, the rows of the accuracy matrix and the state of every callback.
        Inside tasks it is an ordinary Lightning checkpoint; both kinds load with ``weights_only=True``.

    Raises:
        ValueError: for a period of 0 or less, or ``keep`` below 2; when training starts, for ``adapters`` beside
            methods that train the model itself.
        OSError: while saving, when the disk is full or read-only; it says which checkpoint is still good.

    Example:
        >>> StreamCheckpoint("runs/a/checkpoints", every_n_steps=100).dirpath
        'runs/a/checkpoints'
    """

    def __init__(
        self,
        folder: str | Path,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
        keep: int = 2,
        adapters: bool = False,
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("every_n_minutes", every_n_minutes)):
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be above 0, or None for no saving inside tasks, got {value!r}")
        if keep < 2:
            raise ValueError(f"`keep` must be 2 or more, so that one is left when another is damaged, got {keep!r}")
        self.folder = Path(folder)
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.keep = keep
        self.adapters = adapters
        self.last: Path | None = None
        """The file that was written last by this object."""
        self._told_to_stop = False
        self._waiting = False
        self._step = 0
        self._saved_at = time.monotonic()

    @property
    def dirpath(self) -> str:
        """Where Lightning and ``ckpt_path="last"`` look."""
        return str(self.folder)

    # the signal

    def _handler(self, number: int, frame: Any) -> None:
        self._told_to_stop = True

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Remember a SIGTERM for the next moment at which saving is possible."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def _must_stop(self, trainer: pl.Trainer) -> bool:
        if trainer.world_size == 1:
            return self._told_to_stop
        return trainer.strategy.reduce_boolean_decision(self._told_to_stop, all=False)

    def _stop(self, task: int) -> None:
        raise StreamStopped(f"told to end by SIGTERM in task {task}; everything is saved in {self.last}")

    # saving

    def _publish(self, trainer: pl.Trainer, task: int, write: Any) -> None:
        self.last = self._write(lambda: publish(self.folder, task, trainer.global_step, write, self.keep))
        self._saved_at = time.monotonic()

    def _write(self, write: Callable[[], Path]) -> Path:
        try:
            return write()
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            kept = f"{self.last} is still good" if self.last else "earlier checkpoints, if any, are still good"
            raise OSError(
                f"the checkpoint in {str(self.folder)!r} could not be written: {error};"
                f" {kept}; make room or give another folder, then resume with ckpt_path='last' (cl-bench: --resume)"
            ) from error

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signal over from Lightning, which would end training without saving."""
        if self.adapters:
            check_owned(pl_module, plugins_of(trainer))
        self._step, self._waiting = trainer.global_step, False
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) != self._handler:
            signal.signal(signal.SIGTERM, self._handler)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time; only behind an optimizer step, since collected gradients are not saved."""
        step = trainer.global_step
        if step == self._step:
            return
        self._step = step
        due = self.every_n_steps is not None and step % self.every_n_steps == 0
        if self.every_n_minutes is not None:
            late = time.monotonic() - self._saved_at >= 60 * self.every_n_minutes
            due = due or bool(trainer.strategy.broadcast(late))
        stop = self._must_stop(trainer)
        if not (due or stop):
            return
        if trainer.is_last_batch or trainer.should_stop:
            self._waiting = True  # resumed from here, Lightning would leave out what belongs to the epoch's end
        else:
            _behind_the_module(pl_module, lambda: self._save(trainer, stop))

    def save_before_epoch(self, trainer: pl.Trainer) -> None:
        """Save what waits, before anything has been told that an epoch begins; StreamState calls it, on every process.

        Epoch 0 has nothing to save: the task before is saved behind its evaluation.
        """
        stop = trainer.current_epoch > 0 and self._must_stop(trainer)
        if not (self._waiting or stop):
            return
        self._waiting = False
        progress = trainer.fit_loop.epoch_progress
        counts = (progress.total, progress.current)
        for count in counts:
            count.ready -= 1  # Lightning has counted the epoch already; a resumed run counts it itself
        try:
            self._save(trainer, stop)
        finally:
            for count in counts:
                count.ready += 1

    def _save(self, trainer: pl.Trainer, stop: bool) -> None:
        self.save_inside(trainer)
        if stop:
            self._stop(int(getattr(datamodule_of(trainer), "task", 0)))

    def save_inside(self, trainer: pl.Trainer) -> None:
        """Save inside a task, on every process.

        Raises:
            FloatingPointError: when the loss has become NaN, rather than replacing a good checkpoint.
        """
        for callback in callbacks_of(trainer):
            check = getattr(callback, "raise_if_not_finite", None)
            if check is not None:
                check(trainer)
        task = int(getattr(datamodule_of(trainer), "task", 0))
        if trainer.world_size > 1:
            shared = self.folder / ".stream-shared.tmp"
            trainer.save_checkpoint(shared, weights_only=False)
            if trainer.is_global_zero:
                self._publish(trainer, task, shared.replace)
            trainer.strategy.barrier()
            return
        self._publish(trainer, task, partial(trainer.save_checkpoint, weights_only=False))

    def save_between(self, trainer: pl.Trainer, module: pl.LightningModule, stream: Stream, task: int) -> None:
        """Save behind a task's evaluation, before task ``task``; then end if SIGTERM has come."""
        checkpoint = between_tasks(trainer, module, stream)  # on every process, since each has random states of its own
        if trainer.is_global_zero:
            if self.adapters:  # first: a run that is killed in between writes them once more
                self._write(lambda: export_adapters(module, plugins_of(trainer), self.folder / "adapters.safetensors"))
            self._publish(trainer, task, lambda path: torch.save(checkpoint, path))
        trainer.strategy.barrier()
        if task < len(stream.tasks) and self._must_stop(trainer):
            self._stop(task)


def _behind_the_module(module: pl.LightningModule, save: Callable[[], None]) -> None:
    """Save behind the module's own ``on_train_batch_end``, once: Lightning calls it last, by its name."""
    name = "on_train_batch_end"
    own, assigned = module.on_train_batch_end, module.__dict__.get(name)

    def then_save(*arguments: Any) -> None:
        del module.__dict__[name]
        if assigned is not None:  # a user may have put a hook on the object itself
            module.__dict__[name] = assigned
        own(*arguments)
        save()

    module.__dict__[name] = then_save


def between_tasks(trainer: pl.Trainer, module: pl.LightningModule, stream: Stream) -> dict[str, Any]:
    """A checkpoint without optimizers, which the next task builds anew; keys as in Lightning's. On every process."""
    callbacks = callbacks_of(trainer)
    loops = trainer.fit_loop.state_dict()
    loops["state_dict"] = {}  # the finished task's loader
    checkpoint: dict[str, Any] = {
        KIND: True,
        "epoch": 0,
        "global_step": trainer.global_step,
        "pytorch-lightning_version": version("pytorch-lightning"),
        "state_dict": module.state_dict(),
        "loops": {"fit_loop": loops},
        "callbacks": {c.state_key: state for c in callbacks if (state := c.state_dict())},
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    if hasattr(stream, "state_dict"):
        checkpoint[type(stream).__qualname__] = stream.state_dict()
    for callback in callbacks:
        callback.on_save_checkpoint(trainer, module, checkpoint)
    module.on_save_checkpoint(checkpoint)
    return checkpoint
