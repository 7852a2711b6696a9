"""Keeps the accuracy matrix of a stream, logs it, and prints what was forgotten."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from matplotlib.figure import Figure

from cl_plugins.logger_figures import log_figure, takes_figures
from cl_plugins.metrics import AccuracyMatrix
from cl_plugins.plugin import ContinualCallback, Row
from cl_plugins.result import StreamResult
from cl_plugins.stream_state import finished_rows
from cl_plugins.task import Stream

if TYPE_CHECKING:
    import pytorch_lightning as pl

_DRAWN = 20


class ForgettingTracker(ContinualCallback):
    """Logs accuracy and forgetting over the stream, once per task, to every logger of the Trainer.

    WHEN: after each task's evaluation. Nothing happens per batch, so a step costs what it costs without the callback.
    The keys are ``cl/average_accuracy``, ``cl/average_incremental_accuracy``, ``cl/learning_accuracy``,
    ``cl/forgetting``, ``cl/backward_transfer`` and ``cl/current_accuracy``; undefined numbers are left out.
    Loggers that take figures (TensorBoard, W&B, MLflow) also get the accuracy matrix as ``cl/accuracy_matrix``: after
    each of the first 20 tasks, and at the end of a longer stream.

    Args:
        prefix: what the keys start with.
        figures: whether to draw the matrix for loggers that take figures.

    Example:
        >>> tracker = ForgettingTracker()
        >>> tracker.matrix is None  # until the stream starts
        True
    """

    training: ClassVar[Literal["required", "none", "neutral"]] = "neutral"

    def __init__(self, prefix: str = "cl/", figures: bool = True) -> None:
        super().__init__()
        self.prefix = prefix
        self.figures = figures
        self._result = StreamResult([])
        self.matrix: AccuracyMatrix | None = None
        """The accuracy matrix as a torchmetrics metric; ``matrix.compute()`` and ``matrix.plot()`` work at any time."""

    def on_stream_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stream: Stream) -> None:
        """Start an empty matrix with a column per task."""
        self._result = StreamResult.for_stream(stream)
        self.matrix = AccuracyMatrix(
            len(self._result.tasks), learned_at=self._result.learned_at, sync_on_compute=False
        )  # every process holds the counts of all
        for row in finished_rows(trainer):
            self._add(row)

    def on_row(self, trainer: pl.Trainer, pl_module: pl.LightningModule, row: Row) -> None:
        """Write the row and log the numbers that follow."""
        self._add(row)
        if row.after >= 0:
            for logger in trainer.loggers:
                logger.log_metrics(self.values(), step=trainer.global_step)
                logger.save()  # the fit is over, and a CSVLogger would keep the last row for a next one
            if row.after < _DRAWN:
                self._draw(trainer)

    def on_stream_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, result: StreamResult) -> None:
        """Draw the matrix of a long stream, once."""
        if len(result.rows) > _DRAWN:
            self._draw(trainer)

    def _draw(self, trainer: pl.Trainer) -> None:
        """Give the matrix as a figure to the loggers that take one."""
        takers = [g for g in trainer.loggers if takes_figures(g)] if self.figures and trainer.is_global_zero else []
        if not takers or self.matrix is None:
            return
        figure = Figure(figsize=(6.4, 5.6), layout="constrained")  # not pyplot's: no window, no global state
        _, axes = self.matrix.plot(ax=figure.subplots())
        axes.set_ylabel("after task")
        figure.colorbar(axes.images[0], ax=axes, label="accuracy")
        for logger in takers:
            log_figure(logger, f"{self.prefix}accuracy_matrix", figure, trainer.global_step)

    def _add(self, row: Row) -> None:
        assert self.matrix is not None
        correct = torch.tensor([-1 if c is None else c for c in row.correct])
        total = torch.tensor([-1 if c is None else c for c in row.total])
        self.matrix.update_row(row.after, correct, total)
        if row.after >= 0:
            self._result.add(row)

    def values(self) -> dict[str, float]:
        """The numbers after the latest task, by key; undefined ones are left out."""
        result = self._result
        current = [c for c, at in zip(result.accuracy_matrix[-1], result.learned_at or [], strict=True)
                   if at == result.rows[-1].after]  # fmt: skip
        named = {
            "average_accuracy": result.average_accuracy,
            "average_incremental_accuracy": result.average_incremental_accuracy,
            "learning_accuracy": result.learning_accuracy,
            "forgetting": result.forgetting,
            "backward_transfer": result.backward_transfer,
            "current_accuracy": float(torch.stack(current).mean()) if current else math.nan,
        }
        return {f"{self.prefix}{k}": v for k, v in named.items() if not math.isnan(v)}
