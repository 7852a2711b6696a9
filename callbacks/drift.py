"""Measures how features and confidences drift between task ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from cl_plugins import functional
from cl_plugins.drift import DriftRow, drift_events, recency_of_row, size_by_kind
from cl_plugins.drift_probe import read_probe
from cl_plugins.evaluation import Predict, default_predict, evaluation_tasks, seen_classes, taught_columns
from cl_plugins.plugin import ContinualCallback, Row, plugins_of
from cl_plugins.result import StreamResult
from cl_plugins.stream_state import same_randomness, stream_predict

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from cl_plugins.task import Stream

_CONFIDENCE, _CORRECT = 0, 1


class DriftTracker(ContinualCallback):
    """Effective rank, CKA, calibration, task confusion and memory at each task end, for report and result.

    WHEN: after each task's evaluation, in one pass over a fixed probe set. Training is what it is without the callback,
    to the last bit: nothing happens per batch, and the random generators go on where they stood.

    Args:
        probe: number of test samples, spread over all tasks of the stream (over 20 of them where there are more), the
            first ones of each; or a list of batches of your own, whose tasks are then not told apart.
        every: ``"task"``, or a number k for every k-th task and the last one.
        bins: equal bins of the calibration error; 15 as in Guo et al. 2017.
        head: dotted path of the classifier whose input is the feature, where it cannot be told.

    Note:
        The ECE of few samples is biased upward; a task gets ``probe / tasks`` of them. Compare values of equal numbers.

    Example:
        >>> tracker = DriftTracker(probe=256)
        >>> tracker.rows
        []
    """

    training: ClassVar[Literal["required", "none", "neutral"]] = "neutral"

    def __init__(
        self,
        probe: int | Sequence[Any] = 1024,
        every: Literal["task"] | int = "task",
        bins: int = 15,
        head: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(probe, int) and probe < 2:
            raise ValueError(f"`probe` must be at least 2 samples, got {probe!r}")
        if not isinstance(probe, int) and (isinstance(probe, str) or not isinstance(probe, Sequence) or not probe):
            raise ValueError(f"`probe` must be a number of samples or a list of batches, got {probe!r}")
        if every != "task" and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ValueError(f"`every` must be 'task' or a number of tasks of at least 1, got {every!r}")
        if bins < 1:
            raise ValueError(f"`bins` must be at least 1, got {bins!r}")
        self.probe = probe
        self.every = 1 if every == "task" else int(every)
        self.bins = bins
        self.head = head
        self.rows: list[DriftRow] = []
        """The measurements so far."""
        self._first: Tensor | None = None
        self._previous: Tensor | None = None
        self._stream: Stream | None = None
        self._trained: set[int] = set()

    def on_stream_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stream: Stream) -> None:
        """Begin without a measurement; a resume loads those there are."""
        self._stream, self.rows, self._first, self._previous = stream, [], None, None

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Any) -> None:
        """Forget what the last task trained."""
        super().on_task_start(trainer, pl_module, task)
        self._trained = set()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember what this task trains."""
        super().on_train_start(trainer, pl_module)
        self._trained = {id(p) for p in pl_module.parameters() if p.requires_grad}

    def on_row(self, trainer: pl.Trainer, pl_module: pl.LightningModule, row: Row) -> None:
        """Measure."""
        stream = self._stream
        if stream is None or row.after < 0:
            return
        if (row.after + 1) % self.every and row.after + 1 < len(stream.tasks):
            return
        with same_randomness(), torch.no_grad():
            self.rows.append(self._measure(trainer, pl_module, stream, row))

    def on_stream_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, result: StreamResult) -> None:
        """Put the measurements into the result."""
        result.drift = list(self.rows)

    def state_dict(self) -> dict[str, Any]:
        """The measurements and the two sets of features that later ones are compared with."""
        features = {"first": self._first, "previous": self._previous}
        kept = {k: v for k, v in features.items() if v is not None}
        return {"rows": [row.to_dict() for row in self.rows], "features": kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the measurements of a checkpoint."""
        self.rows = [DriftRow.from_dict(row) for row in state_dict["rows"]]
        self._first, self._previous = (state_dict["features"].get(k) for k in ("first", "previous"))

    def report_events(self, module: nn.Module) -> list[dict[str, Any]]:
        """The latest measurement, as charts of the report."""
        return drift_events(self.rows[-1]) if self.rows else []

    # the measurement

    def _measure(self, trainer: pl.Trainer, module: pl.LightningModule, stream: Stream, row: Row) -> DriftRow:
        tasks = evaluation_tasks(stream)
        taught = taught_columns(stream, row.after)
        before, count = taught.start, taught.stop
        learned = [t.index for t in tasks if t.index < count]
        undefined: dict[str, str] = {}
        seen, predict = seen_classes(stream, row.after), self._predict(trainer, stream)
        features, judged, reason = read_probe(trainer, module, stream, self.probe, predict, seen, self.head)
        numbers: dict[str, Any] = {"effective_rank": None, "cka_first": None, "cka_previous": None}
        if features is None:
            undefined |= dict.fromkeys(numbers, reason)
        else:
            numbers["effective_rank"] = functional.effective_rank(features)
            self._first = features if self._first is None else self._first
            numbers["cka_first"] = functional.linear_cka(features, self._first).clamp(max=1.0)  # rounding
            if self._previous is None:
                undefined["cka_previous"] = "the first measurement has none before it"
            else:
                numbers["cka_previous"] = functional.linear_cka(features, self._previous).clamp(max=1.0)
            self._previous = features
        of_learned = {k: v for k, v in judged.items() if k < count}
        errors = {k: self._error(v) for k, v in of_learned.items() if k >= 0 and len(v)}
        pooled = [v for v in of_learned.values() if len(v)]
        numbers["calibration_error"] = self._error(torch.cat(pooled)) if pooled else None
        if not pooled:
            undefined["calibration_error"] = "the labels name no single class per sample"
        numbers |= recency_of_row(row, learned, [j for j in learned if j >= before])
        for name in ("task_error", "recency_bias", "recency_pull"):
            if numbers[name] is None:
                second = "before the second task, or without an error on an old task"
                undefined[name] = second if row.confusion else "tasks share classes, or too many tasks for a table"
        drift = {}
        learned_at = StreamResult.for_stream(stream).learned_at or []
        for j, now in errors.items():
            at = next((r.task_calibration_error for r in self.rows if r.after == learned_at[j]), {})
            if j in at:
                drift[j] = now - at[j]
        methods = [p.state_dict() for p in plugins_of(trainer) if p.training != "neutral"]
        counts, sizes = size_by_kind(module, self._trained, methods)
        plain = {k: None if v is None or math.isnan(v) else float(v) for k, v in numbers.items()}
        for name, value in plain.items():
            if value is None:
                undefined.setdefault(name, "the features are constant")
        n = len(features) if features is not None else sum(map(len, judged.values()))
        return DriftRow(
            row.after, n, **plain, task_calibration_error=errors, calibration_drift=drift, parameters=counts,
            bytes=sizes, undefined=undefined,
        )  # fmt: skip

    def _error(self, judged: Tensor) -> float:
        return float(functional.expected_calibration_error(judged[:, _CONFIDENCE], judged[:, _CORRECT], self.bins))

    def _predict(self, trainer: pl.Trainer, stream: Stream) -> Predict:
        """How the stream's own evaluation predicts."""
        own: Predict = getattr(stream, "predict", default_predict)
        predict = stream_predict(trainer, stream)
        if predict == own:
            for plugin in plugins_of(trainer):
                predict = plugin.predictor(predict)
        return predict
