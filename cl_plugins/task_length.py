"""How long a task is trained, where a method's paper counts steps, or gives each task epochs of its own.

A Trainer's ``max_steps`` counts over the whole stream and cannot say this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cl_plugins.plugin import ContinualCallback

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from cl_plugins.task import Stream, Task


class TaskLength(ContinualCallback):
    """Ends each task after a number of steps, or after a number of epochs of its own.

    WHEN: sets the Trainer's ``max_epochs`` before each task; with ``steps`` the data are gone through again and again,
    and the last epoch may end early.

    Args:
        steps: gradient steps per task; None for epochs.
        epochs: one number per task; empty for steps.

    Raises:
        ValueError: for both or neither, for numbers below 1; at the stream's start for another number of tasks.

    Example:
        >>> TaskLength(epochs=[2, 1]).epochs
        (2, 1)
    """

    training: ClassVar[Literal["required", "none", "neutral"]] = "neutral"

    def __init__(self, *, steps: int | None = None, epochs: Sequence[int] = ()) -> None:
        super().__init__()
        if (steps is None) == (not epochs):
            raise ValueError(f"`steps` or `epochs` must be given, one of them, got {steps!r} and {tuple(epochs)!r}")
        if min([*epochs, *([] if steps is None else [steps])]) < 1:
            raise ValueError(f"`steps` and `epochs` must be 1 or more, got {steps!r} and {tuple(epochs)!r}")
        self.steps, self.epochs = steps, tuple(epochs)
        self._stream: Stream | None = None
        self._batches = 1

    def on_stream_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stream: Stream) -> None:
        """Remember the stream."""
        if self.epochs and len(self.epochs) != len(stream.tasks):
            raise ValueError(f"`epochs` must hold {len(stream.tasks)} numbers, one per task, got {len(self.epochs)}")
        if self.steps is not None and trainer.accumulate_grad_batches != 1:
            raise ValueError(
                "`steps` must be used with accumulate_grad_batches=1, since batches are counted,"
                f" got {trainer.accumulate_grad_batches!r}"
            )
        self._stream = stream

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Say how many epochs the task may take."""
        super().on_task_start(trainer, pl_module, task)
        if self._stream is None:
            raise RuntimeError("`TaskLength` must know the stream before a task; train with fit_stream")
        if self.steps is None:
            trainer.fit_loop.max_epochs = self.epochs[task.index]
        else:
            self._batches = len(self._stream.train_dataloader())
            trainer.fit_loop.max_epochs = math.ceil(self.steps / self._batches)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after the last step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.steps is not None and trainer.current_epoch * self._batches + batch_idx + 1 >= self.steps:
            trainer.should_stop = True
