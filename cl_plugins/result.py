"""What training over a stream gives: the accuracy matrix as counts, and the numbers that follow from it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cl_plugins import functional
from cl_plugins.drift import DriftRow
from cl_plugins.evaluation import evaluation_tasks, learned_after
from cl_plugins.inside_tasks import InsideRow, InsideTasks
from cl_plugins.label_scores import LABEL_SCORES, THRESHOLD
from cl_plugins.plugin import Row
from cl_plugins.task import Stream, Task

if TYPE_CHECKING:
    import pandas as pd


_DOMAIN_SCORES = {
    "transfer": "per task the mean accuracy before it was learned, then the mean over tasks after the first",
    "average": "mean of all cells of the matrix, those before learning included",
    "last": "mean over all tasks of the last row",
    "zero_shot": "mean over tasks after the first of the accuracy before any training, in none of the others",
}


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the whole new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write ``value`` as JSON by :func:`write_text`."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _number(value: Tensor | float) -> float | None:
    """A float for JSON; undefined is null there."""
    number = float(value)
    return number if math.isfinite(number) else None


_CELLS = ("correct", "total", "correct_in_task")  # the order of Row.cells
MOST_CONFUSED = 100
"""Tasks up to which the confusions of every row are kept; those of a longer stream would grow with its cube."""


@dataclass
class StreamResult:
    """Accuracy of every task after every task, as integer counts.

    Attributes:
        tasks: the stream's tasks.
        rows: one evaluation after each task that was finished.
        initial: the evaluation before any training, when it was asked for.
        stream: what the stream is (name, seeds, class order), as plain values.
        train_seconds: time in ``fit``, per task.
        trainable_parameters: number of parameters that the last task trained.
        learned_at: row after which a column counts as learned; None for row j and column j.
        inside_tasks: evaluations inside tasks, of a :class:`~cl_plugins.callbacks.ContinualEvaluation`.
        drift: measurements at task ends, of a :class:`~cl_plugins.callbacks.DriftTracker`.

    Example:
        >>> row = Row(0, (9, None), (10, None), (10, None), ((10, 0), (0, 0)), 0.1)
        >>> result = StreamResult([Task(0, (0, 1)), Task(1, (2, 3))], [row])
        >>> result.average_accuracy
        0.9
    """

    tasks: list[Task]
    rows: list[Row] = field(default_factory=list)
    initial: Row | None = None
    stream: dict[str, Any] = field(default_factory=dict)
    train_seconds: list[float] = field(default_factory=list)
    trainable_parameters: int = 0
    learned_at: list[int] | None = None
    inside_tasks: list[InsideRow] = field(default_factory=list)
    drift: list[DriftRow] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Append a row; past :data:`MOST_CONFUSED` tasks only the newest keeps its ``tasks ** 2`` confusions."""
        if self.rows and len(self.tasks) > MOST_CONFUSED:
            self.rows[-1] = replace(self.rows[-1], confusion=())
        self.rows.append(row)

    @classmethod
    def for_stream(cls, stream: Stream) -> StreamResult:
        """An empty result with a column for each task that ``stream`` is evaluated on."""
        columns = evaluation_tasks(stream)
        steps = range(len(stream.tasks))
        learned_at = [next(k for k in steps if learned_after(stream, k) > j) for j in range(len(columns))]
        return cls(list(columns), stream=stream.provenance(), learned_at=learned_at)

    def _counts(self, name: str) -> Tensor:
        if not self.rows:
            return torch.zeros(0, len(self.tasks), dtype=torch.int64)
        return torch.stack([row.cells for row in self.rows])[:, _CELLS.index(name)]

    @property
    def correct(self) -> Tensor:
        """Correct predictions ``(rows, tasks)`` int64, -1 where not measured."""
        return self._counts("correct")

    @property
    def total(self) -> Tensor:
        """Test samples ``(rows, tasks)`` int64, -1 where not measured."""
        return self._counts("total")

    def _ratio(self, name: str) -> Tensor:
        correct, total = self._counts(name).double(), self.total.double()
        return torch.where(total > 0, correct / total, torch.nan)

    @property
    def accuracy_matrix(self) -> Tensor:
        """Accuracy ``(rows, tasks)`` float64 in [0, 1], NaN where not measured; row i is after task i."""
        return self._ratio("correct")

    @property
    def accuracy_matrix_task_known(self) -> Tensor:
        """The same when the task of each sample is given and the choice is among its classes."""
        return self._ratio("correct_in_task")

    @property
    def average_accuracy(self) -> float:
        """Mean over tasks of the accuracy after the last task (A_last)."""
        return float(functional.average_accuracy(self.accuracy_matrix, learned_at=self.learned_at))

    @property
    def average_incremental_accuracy(self) -> float:
        """Mean over steps of the average accuracy at that step."""
        # a row is written after each task, also where the stream is tested on one set and learns no further column
        matrix, learned_at = self.accuracy_matrix, self.learned_at
        return float(functional.average_incremental_accuracy(matrix, learned_at=learned_at, every_row=True))

    @property
    def learning_accuracy(self) -> float:
        """Mean over tasks of the accuracy right after the task was learned."""
        return float(functional.learning_accuracy(self.accuracy_matrix, learned_at=self.learned_at))

    @property
    def forgetting(self) -> float:
        """Mean over old tasks of best accuracy since learned minus final accuracy; NaN with one task."""
        return float(functional.forgetting(self.accuracy_matrix, learned_at=self.learned_at))

    @property
    def backward_transfer(self) -> float:
        """Mean over old tasks of final accuracy minus accuracy right after learning; NaN with one task."""
        return float(functional.backward_transfer(self.accuracy_matrix, learned_at=self.learned_at))

    @property
    def inside(self) -> InsideTasks:
        """The evaluations inside tasks with min-ACC, WC-ACC, windowed forgetting and plasticity, the stability gap."""
        return InsideTasks(list(self.inside_tasks), len(self.tasks))

    @property
    def eval_seconds(self) -> float:
        """Time spent evaluating."""
        return sum(row.seconds for row in self.rows)

    @property
    def domain_scores(self) -> dict[str, float]:
        """Transfer, Average and Last of a stream with an open vocabulary (X-TAIL, MTIL), and its zero-shot accuracy.

        From the choice among the task's own classes where the stream evaluates with the task known. NaN where a cell
        is missing; empty for other streams. :meth:`to_dict` says what each of them is.
        """
        if not self.stream.get("open_vocabulary"):
            return {}
        known = bool(self.stream.get("task_known"))
        matrix = self.accuracy_matrix_task_known if known else self.accuracy_matrix
        scores = {k: float(v) for k, v in functional.mtil_scores(matrix, learned_at=self.learned_at).items()}
        if self.initial is not None:
            before = StreamResult(self.tasks, [self.initial])
            row = before.accuracy_matrix_task_known if known else before.accuracy_matrix
            learned_at = self.learned_at or list(range(len(self.tasks)))
            scores["zero_shot"] = float(row[0, torch.tensor(learned_at) > 0].mean())
        return scores

    @property
    def label_scores(self) -> dict[str, float]:
        """MAP, CF1 and OF1 of a multi-label stream after the last task, and the mean of the mAP over tasks.

        NaN where a number is undefined; :meth:`to_dict` says why. Empty for other streams.
        """
        found = [row.labels for row in self.rows if row.labels is not None]
        if not found:
            return {}
        maps = torch.tensor([scores.map for scores in found], dtype=torch.float64)
        values = (found[-1].map, float(maps.mean()), found[-1].cf1, found[-1].of1)
        return dict(zip(LABEL_SCORES, values, strict=True))

    def _label_rows(self) -> dict[str, Any]:
        """What :meth:`to_dict` tells of a multi-label stream, per row."""
        found = [(row.after, row.labels) for row in self.rows if row.labels is not None]
        if not found:
            return {}
        rows = [
            {
                "after": after,
                "map": _number(scores.map),
                "cf1": _number(scores.cf1),
                "of1": _number(scores.of1),
                "classes": list(scores.classes),
                "average_precision": list(scores.average_precision),
                "true_positives": list(scores.true_positives),
                "predicted": list(scores.predicted),
                "present": list(scores.present),
                **({"undefined": scores.undefined} if scores.undefined else {}),
            }
            for after, scores in found
        ]
        return {"multilabel": {"threshold": THRESHOLD, "rows": rows}}

    def metrics(self) -> dict[str, float | None]:
        """The named numbers; None where a number is undefined."""
        return {
            **{name: _number(value) for name, value in self.label_scores.items()},
            **{name: _number(value) for name, value in self.domain_scores.items()},
            "average_accuracy": _number(self.average_accuracy),
            "average_incremental_accuracy": _number(self.average_incremental_accuracy),
            "learning_accuracy": _number(self.learning_accuracy),
            "forgetting": _number(self.forgetting),
            "backward_transfer": _number(self.backward_transfer),
            "average_accuracy_task_known": _number(
                functional.average_accuracy(self.accuracy_matrix_task_known, learned_at=self.learned_at)
            ),
        }

    def to_frame(self) -> pd.DataFrame:
        """The matrix as a pandas table: rows "after <task>", columns the tasks' names."""
        import pandas as pd

        names = [t.name for t in self.tasks]
        index = [f"after task {row.after}" for row in self.rows]
        frame: pd.DataFrame = pd.DataFrame(self.accuracy_matrix.numpy(), index=index, columns=names)
        return frame

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; fractions, never percent."""
        return {
            **self.metrics(),
            "definitions": {
                **{name: LABEL_SCORES[name] for name in self.label_scores},
                **{name: _DOMAIN_SCORES[name] for name in self.domain_scores},
                "average_accuracy": "mean over tasks of the last row",
                "average_incremental_accuracy": "mean over rows of the mean over tasks seen so far",
                "learning_accuracy": "mean over tasks of the accuracy right after learning the task",
                "forgetting": "mean over old tasks of peak accuracy since learned minus final accuracy",
                "backward_transfer": "mean over old tasks of final accuracy minus accuracy right after learning",
                "average_accuracy_task_known": "average_accuracy with the choice among the task's own classes",
            },
            "accuracy_matrix": [[_number(c) for c in row] for row in self.accuracy_matrix],
            "accuracy_matrix_task_known": [[_number(c) for c in row] for row in self.accuracy_matrix_task_known],
            **self._label_rows(),
            "learned_at": self.learned_at or list(range(len(self.tasks))),
            "correct": [list(row.correct) for row in self.rows],
            "total": [list(row.total) for row in self.rows],
            "task_confusion": [[list(line) for line in row.confusion] for row in self.rows[-1:]],
            "tasks": [{"index": t.index, "name": t.name, "classes": list(t.classes)} for t in self.tasks],
            "stream": self.stream,
            "trainable_parameters": self.trainable_parameters,
            "train_seconds": sum(self.train_seconds),
            "train_seconds_per_task": self.train_seconds,
            "eval_seconds": self.eval_seconds,
            **({"inside_tasks": self.inside.to_dict()} if self.inside_tasks else {}),
            **({"drift": [row.to_dict() for row in self.drift]} if self.drift else {}),
        }

    def save(self, path: str | Path, **extra: Any) -> Path:
        """Write :meth:`to_dict` and ``extra`` as JSON, in one piece or not at all.

        Args:
            path: a ``.json`` file, or a folder that gets ``result.json``.
            **extra: further plain values, such as the method's name and the seed.

        Returns:
            The file.
        """
        target = Path(path)
        target = target if target.suffix == ".json" else target / "result.json"
        write_json(target, {**extra, **self.to_dict()})
        return target
