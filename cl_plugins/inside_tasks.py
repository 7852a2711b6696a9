"""Evaluations inside tasks: their rows, and the numbers of continual evaluation that follow from them.

Matthias De Lange, Gido van de Ven and Tinne Tuytelaars, "Continual evaluation for lifelong learning: Identifying the
stability gap", ICLR 2023, arXiv 2205.13452: min-ACC, WC-ACC, windowed forgetting and plasticity, stability gap. The
formulas are in :mod:`cl_plugins.functional`. The trace they read has a row per evaluation, every `every` optimizer
steps and at the end of each task, where the evaluation behind the task's end stands for one at the same step.

More evaluations can only lower a minimum, so the period is part of every key and values with others do not compare.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cl_plugins import functional
from cl_plugins.task_sampling import finite_population_mean

DEFINITIONS = {
    "min_accuracy": "mean over finished tasks of the smallest accuracy since the end of the task (min-ACC)",
    "worst_case_accuracy": "a_k/k + (1 - 1/k) min-ACC, with a_k the newest task's accuracy (WC-ACC)",
    "windowed_forgetting": "mean over tasks of the largest fall inside a window of evaluations (WF)",
    "windowed_plasticity": "mean over tasks of the largest rise inside a window of evaluations (WP)",
    "stability_gap[depth]": "mean over old tasks and task switches of accuracy at the switch minus the lowest before"
    " the next switch; negative where it only rose",
    "stability_gap[recovered]": "where accuracy fell after a switch, the share that came back before the next switch",
    "stability_gap[recovery_steps]": "evaluations that this took, where it happened",
    "stability_gap[residual]": "mean of accuracy at the switch minus accuracy at the next switch",
    "anytime_average_accuracy": "plain mean, over the evaluations at every so many steps, of the mean accuracy over the"
    " tasks so far",
}


class Interval(NamedTuple):
    """An average and half the width of its 95 % interval: 0 when nothing was drawn, NaN when it cannot be told."""

    value: float
    half_width: float


@dataclass(frozen=True)
class InsideRow:
    """Counts of one evaluation inside a task.

    Attributes:
        step: optimizer steps since the stream began, ``trainer.global_step``.
        task: index of the task under way.
        old: number of columns learned before it.
        seen: number of columns with it.
        tasks: the columns that were evaluated, ascending.
        correct: correct predictions, one per entry of ``tasks``; predictions may name every class seen so far.
        total: samples, likewise.
        correct_in_task: correct when the choice is among the task's own classes, likewise.
        every: optimizer steps between evaluations.
        sampled: whether the old ones of ``tasks`` were drawn at random from all old tasks.
        end: behind the task's end, with what methods did there.
        seconds: duration of the evaluation; 0 where the counts are those of the stream's own evaluation.
    """

    step: int
    task: int
    old: int
    seen: int
    tasks: tuple[int, ...]
    correct: tuple[int, ...]
    total: tuple[int, ...]
    correct_in_task: tuple[int, ...]
    every: int
    sampled: bool = False
    end: bool = False
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, lists instead of tuples."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Any) -> InsideRow:
        """The inverse of :meth:`to_dict`; further keys are left out.

        Raises:
            ValueError: for anything that is no such row.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a row inside a task must be a mapping, got {type(values).__name__}")
        known: dict[str, Any] = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        try:
            plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
            row = cls(**plain)
        except TypeError as error:
            raise ValueError(f"a row inside a task must have all fields: {error}") from error
        counts = (row.tasks, row.correct, row.total, row.correct_in_task)
        whole = (row.step, row.task, row.old, row.seen, row.every)
        sound = (
            all(isinstance(line, tuple) and len(line) == len(row.tasks) for line in counts)
            and all(type(c) is int and 0 <= c < 2**53 for c in (*whole, *(c for line in counts for c in line)))
            and all(c <= n for c, n in zip(row.correct, row.total, strict=True))
            and list(row.tasks) == sorted(set(row.tasks))
            and row.every > 0
            and isinstance(row.sampled, bool)
            and isinstance(row.end, bool)
            and isinstance(row.seconds, (int, float))
        )
        if not sound:
            raise ValueError(
                f"a row inside a task must hold counts from 0 to their totals, below 2**53, got {known!r}"[:400]
            )
        return row

    @property
    def accuracy(self) -> dict[int, float]:
        """Accuracy by task; tasks without samples are left out."""
        return {t: c / n for t, c, n in zip(self.tasks, self.correct, self.total, strict=True) if n}

    @property
    def average(self) -> Interval:
        """Mean accuracy over the tasks so far, or over those listed when it is a fixed list.

        Where old tasks were drawn, half the 95 % t interval for a mean over a finite population belongs to it, with
        ``old - k`` tasks unseen; it is about the choice of tasks, not of samples.
        """
        accuracy = self.accuracy
        if not accuracy:
            return Interval(math.nan, math.nan)
        drawn = [a for t, a in accuracy.items() if t < self.old]
        rest = [a for t, a in accuracy.items() if t >= self.old]
        if not self.sampled or len(drawn) == self.old:
            return Interval(sum(accuracy.values()) / len(accuracy), 0.0)
        estimate = finite_population_mean(drawn, self.old)
        count = self.old + len(rest)
        half = math.nan if estimate.half_width is None else estimate.half_width
        return Interval((self.old * estimate.mean + sum(rest)) / count, self.old * half / count)

    @property
    def current(self) -> float:
        """Mean accuracy over the columns that the task under way teaches; NaN where none was evaluated."""
        values = [a for t, a in self.accuracy.items() if t >= self.old]
        return sum(values) / len(values) if values else math.nan


@dataclass
class InsideTasks:
    """All evaluations inside tasks of a stream.

    Args:
        rows: in the order in which they were made.
        n_tasks: number of columns; None takes it from the rows.
        window: evaluations in a window of windowed forgetting and plasticity.

    Example:
        >>> def row(step, task, correct, end=False):
        ...     n = len(correct)
        ...     return InsideRow(step, task, task, task + 1, tuple(range(n)), correct, (10,) * n, correct, 2, end=end)
        >>> inside = InsideTasks([row(2, 0, (9,)), row(2, 0, (9,), True), row(4, 1, (4, 5)), row(5, 1, (7, 8), True)])
        >>> inside.metrics()["min_accuracy@every=2"], inside.metrics()["stability_gap[depth]@every=2"]
        (0.4, 0.5)
    """

    rows: list[InsideRow] = field(default_factory=list)
    n_tasks: int | None = None
    window: int = 10

    @cached_property
    def trace(self) -> list[InsideRow]:
        """The rows that count: one at the step of its task's end gives way to the one behind the end."""
        ends = {(r.task, r.step) for r in self.rows if r.end}
        return [r for r in self.rows if r.end or (r.task, r.step) not in ends]

    @property
    def every(self) -> int | None:
        """Optimizer steps between evaluations; None without a row."""
        return self.rows[-1].every if self.rows else None

    @cached_property
    def columns(self) -> list[int]:
        """Tasks that were evaluated at least once."""
        return sorted({t for r in self.rows for t in r.tasks})

    @property
    def steps(self) -> Tensor:
        """Optimizer steps at each row of :attr:`trace` ``(rows,)`` int64."""
        return torch.tensor([r.step for r in self.trace], dtype=torch.int64)

    @cached_property
    def _counts(self) -> tuple[Tensor, Tensor]:
        """Correct and total ``(rows of the trace, columns)`` int64, 0 where not measured."""
        place = {t: k for k, t in enumerate(self.columns)}
        table = np.zeros((2, len(self.trace), len(place)), np.int64)
        for line, row in enumerate(self.trace):
            where = [place[t] for t in row.tasks]
            table[0, line, where], table[1, line, where] = row.correct, row.total
        return torch.from_numpy(table[0]), torch.from_numpy(table[1])

    @property
    def matrix(self) -> Tensor:
        """Accuracy ``(rows of the trace, columns)`` float64 in [0, 1], NaN where not measured."""
        return functional.accuracy_matrix(*self._counts)

    @cached_property
    def learned_at(self) -> list[int | None]:
        """Per column the row of :attr:`trace` behind the end of its task.

        Of a task under way the number of rows; None of one that is not begun, as with an open vocabulary.
        """
        ends = [(k, r.seen) for k, r in enumerate(self.trace) if r.end]
        begun = max((r.seen for r in self.trace), default=0)
        under_way = len(self.trace)
        return [next((k for k, seen in ends if t < seen), None if t >= begun else under_way) for t in self.columns]

    @property
    def nan_policy(self) -> str:
        """What a missing cell does: "omit" when old tasks were drawn, so that it is meant; else "propagate"."""
        return "omit" if any(r.sampled for r in self.rows) else "propagate"

    @property
    def anytime_average_accuracy(self) -> float:
        """Mean of the average accuracy over the evaluations at every so many steps; NaN without one."""
        grid = {(r.task, r.step) for r in self.rows if not r.end}
        values = [r.average.value for r in self.trace if (r.task, r.step) in grid]
        return float(functional.anytime_accuracy(torch.tensor(values, dtype=torch.float64)))

    @cached_property
    def _computed(self) -> tuple[dict[str, float | None], dict[str, str]]:
        from cl_plugins import metrics  # torchmetrics takes a while to start

        numbers: dict[str, float | None] = {}
        reasons: dict[str, str] = {}
        common: dict[str, Any] = {
            "learned_at": self.learned_at, "nan_policy": self.nan_policy, "every": self.every, "sync_on_compute": False,
        }  # fmt: skip
        n = len(self.columns) or None
        for metric in (
            metrics.MinAccuracy(n, **common),
            metrics.WorstCaseAccuracy(n, **common),
            metrics.WindowedForgetting(n, window=self.window, **common),
            metrics.WindowedPlasticity(n, window=self.window, **common),
            metrics.StabilityGap(n, **common),
        ):
            metric.update_rows(*self._counts)
            value = metric.compute()
            for key, part in (value if isinstance(value, dict) else {metric.key: value}).items():
                numbers[key] = float(part) if math.isfinite(float(part)) else None
                if numbers[key] is None:
                    reasons[key] = _no_dip(key, numbers) or metric.undefined or "no evaluation counts"
        key, anytime = f"anytime_average_accuracy@every={self.every}", self.anytime_average_accuracy
        numbers[key] = anytime if math.isfinite(anytime) else None
        if numbers[key] is None:
            reasons[key] = f"no task was as long as {self.every} steps, so no evaluation fell inside one"
        return numbers, reasons

    def metrics(self) -> dict[str, float | None]:
        """The numbers of continual evaluation by key; None where undefined; empty without a row."""
        return self._computed[0] if self.rows else {}

    def undefined(self) -> dict[str, str]:
        """Why numbers of :meth:`metrics` are None, by key."""
        return self._computed[1] if self.rows else {}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for ``result.json``."""
        numbers, reasons = self._computed if self.rows else ({}, {})
        rows = []
        for row in self.rows:
            value, half = (x if math.isfinite(x) else None for x in row.average)
            rows.append({**row.to_dict(), "average_accuracy": value, "half_width": half})
        return {
            "every_n_steps": self.every,
            "metrics": numbers,
            "undefined": reasons,
            "definitions": DEFINITIONS,
            "interval": "half_width: 95 % t interval for the mean over all old tasks from those drawn, without"
            " replacement; 0 where all were evaluated",
            "rows": rows,
        }


def _no_dip(key: str, numbers: dict[str, float | None]) -> str | None:
    """Why a recovery is undefined although dips are defined."""
    part = next((p for p in ("recovered", "recovery_steps") if f"[{p}" in key), None)
    if part is None or numbers.get(key.replace(part, "depth")) is None:
        return None
    fell = part == "recovery_steps" and numbers.get(key.replace(part, "recovered")) is not None
    return "no dip was recovered" if fell else "accuracy fell after no switch"


def sorted_rows(rows: Sequence[InsideRow]) -> list[InsideRow]:
    """One row per task, step and kind, the last one given, in the order of the stream."""
    return [row for _, row in sorted({(r.task, r.step, r.end): r for r in rows}.items())]
