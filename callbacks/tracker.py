"""Keeps the accuracy matrix of a stream, logs it, and prints what was forgotten."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from cl_plugins.metrics import AccuracyMatrix

from cl_plugins import functional
from cl_plugins.plugin import ContinualCallback, Row
from cl_plugins.task import Stream

if TYPE_CHECKING:
    import pytorch_lightning as pl


class ForgettingTracker(ContinualCallback):
    """Logs accuracy and forgetting over the stream, once per task, to every logger of the Trainer.

    WHEN: after each task's evaluation. Nothing happens per batch, so a step costs what it costs without the callback.
    The keys are ``cl/average_accuracy``, ``cl/average_incremental_accuracy``, ``cl/learning_accuracy``,
    ``cl/forgetting``, ``cl/backward_transfer`` and ``cl/current_accuracy``; undefined numbers are left out.

    Args:
        prefix: what the keys start with.

    Example:
        >>> tracker = ForgettingTracker()
        >>> tracker.matrix is None  # until the stream starts
        True
    """

    training: ClassVar[Literal["required", "none", "neutral"]] = "neutral"

    def __init__(self, prefix: str = "cl/") -> None:
        super().__init__()
        self.prefix = prefix
        self.matrix: AccuracyMatrix | None = None
        """The accuracy matrix as a torchmetrics metric; ``matrix.compute()`` and ``matrix.plot()`` work at any time."""

    def on_stream_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stream: Stream) -> None:
        """Start an empty matrix with a column per task."""
        self.matrix = AccuracyMatrix(len(stream.tasks))

    def on_row(self, trainer: pl.Trainer, pl_module: pl.LightningModule, row: Row) -> None:
        """Write the row and log the numbers that follow."""
        assert self.matrix is not None
        correct = torch.tensor([-1 if c is None else c for c in row.correct])
        total = torch.tensor([-1 if c is None else c for c in row.total])
        self.matrix.update_row(row.after, correct, total)
        if row.after < 0:
            return
        values = self.values(row.after)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def values(self, after: int) -> dict[str, float]:
        """The numbers after task ``after``, by key; undefined ones are left out."""
        assert self.matrix is not None
        matrix = self.matrix.compute()[: after + 1]
        named: dict[str, Any] = {
            "average_accuracy": functional.average_accuracy(matrix),
            "average_incremental_accuracy": functional.average_incremental_accuracy(matrix),
            "learning_accuracy": functional.learning_accuracy(matrix),
            "forgetting": functional.forgetting(matrix),
            "backward_transfer": functional.backward_transfer(matrix),
            "current_accuracy": matrix[after, after],
        }
        return {f"{self.prefix}{k}": float(v) for k, v in named.items() if not torch.isnan(torch.as_tensor(v))}
