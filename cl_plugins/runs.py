"""Runs on disk: read what :class:`RunWriter` wrote, whatever state the run was left in.

=========  ===========================================================================================================
kind       fields
=========  ===========================================================================================================
run        method, scenario, seed, order_seed, versions, ...: all become :attr:`Run.meta`; ``from_task`` says where this
           start of the run began, what earlier files hold of that task and later ones no longer counts
task       index, name, classes, class_names, learned_at (row in which the task was learned; null = never)
row        after (-1 = before any training), correct, total (integers per task, null = not measured), correct_in_task
conf       after, counts (true task x predicted task)
cost       task, any of train_seconds, eval_seconds, parameters (number or object by kind), trainable, peak_bytes
plug       name ("plugin/quantity"), value (number, list or matrix), optional unit, task, x, rows, columns
alert      text, task
end        status ("finished" or "failed"), error
=========  ===========================================================================================================

Other kinds are kept in :attr:`Run.other`. Counts, never ratios, so that merging over processes is exact: rows of
several ranks are added. Within a rank a later row for the same task replaces the earlier one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_plugins.inside_tasks import InsideRow
from cl_plugins.label_scores import LabelScores, scores_from_event
from cl_plugins.run_writer import SCHEMA, RunWriter, check_run_id, event_files

__all__ = ["SCHEMA", "Run", "RunTask", "RunWriter", "check_run_id", "read_run", "read_runs"]

Counts = NDArray[np.int64]
_MOST_TASKS = 10_000
_ENVELOPE = ("schema", "kind", "time")


@dataclass(frozen=True)
class RunTask:
    """A task as the events name it; names are text of any kind, never markup or paths."""

    index: int
    name: str
    classes: tuple[int, ...] = ()
    class_names: tuple[str, ...] = ()


@dataclass
class Run:
    """One run, as far as it was recorded.

    Attributes:
        id: name of the run, its folder's name.
        path: the folder.
        meta: what the run says of itself: method, scenario, seed, order_seed, versions, ...
        tasks: the stream's tasks.
        correct: correct predictions ``(rows, tasks)`` int64, -1 where not measured; row i is after task i.
        total: test samples ``(rows, tasks)`` int64, -1 where not measured.
        initial: correct and total ``(2, tasks)`` before any training, or None.
        correct_in_task: as ``correct``, when the choice is among the task's own classes.
        initial_in_task: as ``initial``, likewise.
        learned_at: per task the row in which it was learned, None if it never was.
        plug: events of the methods, the newest for each name and task.
        confusion: true task x predicted task, by row.
        cost: cost events merged by task.
        labels: mAP, CF1 and OF1 of multi-label evaluations, by row.
        inside: evaluations inside tasks, in order.
        alerts: alert events.
        other: events of kinds this version does not know.
        ended: "finished", "failed", or None for a run that goes on or was killed.
        problems: what could not be read, in words.
    """

    id: str
    path: Path | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    tasks: list[RunTask] = field(default_factory=list)
    correct: Counts = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    total: Counts = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    initial: Counts | None = None
    correct_in_task: Counts = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    initial_in_task: Counts | None = None
    learned_at: list[int | None] = field(default_factory=list)
    plug: list[dict[str, Any]] = field(default_factory=list)
    confusion: dict[int, Counts] = field(default_factory=dict)
    cost: dict[int, dict[str, Any]] = field(default_factory=dict)
    labels: dict[int, LabelScores] = field(default_factory=dict)
    inside: list[InsideRow] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    other: list[dict[str, Any]] = field(default_factory=list)
    ended: str | None = None
    error: str = ""
    started: float | None = None
    updated: float | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def accuracy_matrix(self) -> Tensor:
        """Accuracy ``(rows, tasks)`` float64 in [0, 1], NaN where not measured."""
        return _ratio(self.correct, self.total)

    @property
    def initial_accuracy(self) -> Tensor | None:
        """Accuracy per task ``(tasks,)`` before any training, or None."""
        return None if self.initial is None else _ratio(self.initial[0], self.initial[1])

    @property
    def accuracy_matrix_task_known(self) -> Tensor:
        """The same as ``accuracy_matrix`` when the task of each sample is given."""
        if self.correct_in_task.shape != self.total.shape:
            return _ratio(np.full_like(self.total, -1), np.full_like(self.total, -1))
        return _ratio(self.correct_in_task, np.where(self.correct_in_task < 0, -1, self.total))

    @property
    def initial_accuracy_task_known(self) -> Tensor | None:
        """The same as ``initial_accuracy`` when the task of each sample is given."""
        if self.initial is None or self.initial_in_task is None:
            return None
        return _ratio(self.initial_in_task, np.where(self.initial_in_task < 0, -1, self.initial[1]))


def _ratio(correct: Counts, total: Counts) -> Tensor:
    counts = torch.from_numpy(total).double()
    return torch.where(counts > 0, torch.from_numpy(correct).double() / counts, torch.nan)


def _is_index(value: Any, low: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < _MOST_TASKS


def _whole(text: str) -> int | float:
    """An integer, or a float where it has more digits than any count: sums and logarithms cannot take such integers."""
    return int(text) if len(text) <= 20 else float(text)


def _lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """Events of a file; a torn last line is dropped, other damage is reported."""
    damaged, newer = 0, 0
    content = path.read_bytes()
    *lines, _torn = content.split(b"\n")
    for line in lines:
        if not line.strip():
            continue
        try:
            event = json.loads(line, parse_int=_whole)
        except (ValueError, RecursionError):
            damaged += 1
            continue
        if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
            damaged += 1
            continue
        schema = event.get("schema", SCHEMA)
        newer = max(newer, schema if isinstance(schema, int) else 0)
        yield event
    if damaged:
        problems.append(f"{path.name}: {damaged} damaged line{'s' * (damaged > 1)} left out")
    if newer > SCHEMA:
        problems.append(
            f"{path.name} was written in event format {newer}, this version of cl-plugins reads format {SCHEMA};"
            " what it understands is shown; update cl-plugins to see everything"
        )


def _counts(row: dict[str, Any], width: int) -> Counts | None:
    """Correct, total and correct in task ``(3, width)`` of a row event, -1 where not measured; None when malformed."""
    table = np.full((3, width), -1, np.int64)
    for line, key in enumerate(("correct", "total", "correct_in_task")):
        values = row.get(key)
        if values is None and line == 2:
            continue  # written by versions before it was recorded
        if not isinstance(values, list) or len(values) > width:
            return None
        if not all(v is None or (isinstance(v, int) and 0 <= v < 1 << 62) for v in values):
            return None
        table[line, : len(values)] = [-1 if v is None else v for v in values]
    table[:, (table[:2] < 0).any(0)] = -1
    if (table[[0, 2]] > table[1]).any():
        return None
    return table


class _Reader:
    """Folds a run's events, in the order they were written, into a :class:`Run`."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rows: dict[tuple[int, int], dict[str, Any]] = {}  # by (rank, after)
        self.tasks: dict[int, dict[str, Any]] = {}
        self.plug: dict[tuple[str, Any], dict[str, Any]] = {}
        self.inside: dict[tuple[int, int, bool], InsideRow] = {}
        self.malformed = 0

    def restart(self, first: int, rank: int) -> None:
        """Forget what an earlier start recorded of task ``first`` and later ones."""
        stale = [k for k in self.rows if k[0] == rank and (k[1] >= first or first == 0)]
        for key in stale:
            del self.rows[key]
        if rank > 0:
            return
        self.plug = {k: v for k, v in self.plug.items() if isinstance(k[1], int) and k[1] < first}
        self.run.cost = {k: v for k, v in self.run.cost.items() if k < first}
        self.run.confusion = {k: v for k, v in self.run.confusion.items() if k < first}
        self.inside = {k: v for k, v in self.inside.items() if k[0] < first}
        self.run.alerts = [a for a in self.run.alerts if _is_index(a.get("task")) and a["task"] < first]
        if first == 0:
            self.tasks, self.run.meta, self.run.other = {}, {}, []

    def add(self, event: dict[str, Any], rank: int) -> None:
        """Take one event."""
        run, kind = self.run, event["kind"]
        moment = event.get("time")
        if isinstance(moment, (int, float)) and not isinstance(moment, bool):
            run.started = moment if run.started is None else min(run.started, moment)
            run.updated = moment if run.updated is None else max(run.updated, moment)
        fields = {k: v for k, v in event.items() if k not in _ENVELOPE}
        if kind == "run":
            first = fields.pop("from_task", None)
            if _is_index(first):
                self.restart(first, rank)
            run.meta.update(fields)
            run.ended, run.error = None, ""
        elif kind == "task" and _is_index(fields.get("index")):
            self.tasks[fields["index"]] = {**self.tasks.get(fields["index"], {}), **fields}
        elif kind == "row" and _is_index(fields.get("after"), -1):
            self.rows[rank, fields["after"]] = fields
        elif kind == "conf" and _is_index(fields.get("after"), -1):
            try:
                table = np.asarray(fields.get("counts"), dtype=np.int64)
            except (ValueError, TypeError, OverflowError):
                table = np.zeros(0, np.int64)
            if table.ndim == 2 and table.shape[0] == table.shape[1] and (table >= 0).all():
                run.confusion[fields["after"]] = table
        elif kind == "cost" and _is_index(fields.get("task"), -1):
            run.cost.setdefault(fields["task"], {}).update(fields)
        elif kind == "plug" and isinstance(fields.get("name"), str):
            task = fields.get("task")
            self.plug[fields["name"], task if isinstance(task, (int, str)) else None] = fields
        elif kind == "mid":
            self.add_inside(fields)
        elif kind == "alert":
            run.alerts.append(fields)
        elif kind == "end":
            run.ended, run.error = str(fields.get("status", "finished")), str(fields.get("error") or "")
        elif kind != "segment":
            run.other.append(event)

    def add_inside(self, fields: dict[str, Any]) -> None:
        """Take an evaluation inside a task; a later one at the same step wins."""
        try:
            row = InsideRow.from_dict(fields)
        except ValueError:
            self.malformed += 1
            return
        if max((row.task, row.seen, *row.tasks)) <= _MOST_TASKS:
            self.inside[row.task, row.step, row.end] = row

    def finish(self) -> Run:
        """Build the tasks and the matrices."""
        run = self.run
        run.inside = [row for _, row in sorted(self.inside.items())]
        if self.malformed:
            run.problems.append(f"{self.malformed} evaluations inside tasks are malformed and left out")
        run.plug = list(self.plug.values())
        lists = [len(v) for row in self.rows.values() for v in (row.get("correct"),) if isinstance(v, list)]
        width = max([0, *(i + 1 for i in self.tasks), *(n for n in lists if n <= _MOST_TASKS)])
        for index in range(width):
            told = self.tasks.get(index, {})
            classes = told.get("classes")
            names = told.get("class_names")
            run.tasks.append(
                RunTask(
                    index,
                    str(told.get("name") or f"task {index}"),
                    tuple(c for c in classes if isinstance(c, int)) if isinstance(classes, list) else (),
                    tuple(map(str, names)) if isinstance(names, list) else (),
                )
            )
            learned = told.get("learned_at", index)
            run.learned_at.append(learned if _is_index(learned) else None)
        height = 1 + max((after for _, after in self.rows), default=-1)
        table = np.full((3, height + 1, width), -1, np.int64)  # the last line is the initial row
        for (_, after), row in sorted(self.rows.items()):
            counts = _counts(row, width)
            if counts is None:
                run.problems.append(f"the row after task {after} is malformed and left out")
                continue
            scores = scores_from_event(row["labels"]) if "labels" in row else None
            if scores is not None and after >= 0:
                run.labels[after] = scores
            elif "labels" in row and scores is None:
                run.problems.append(f"the label scores after task {after} are malformed and left out")
            line = table[:, after]
            table[:, after] = np.where(counts < 0, line, np.where(line < 0, counts, line + counts))
        run.correct, run.total, run.correct_in_task = table[0, :height], table[1, :height], table[2, :height]
        if any(after < 0 for _, after in self.rows):
            run.initial, run.initial_in_task = table[:2, height], table[2, height]
        return run


def read_run(path: str | Path) -> Run:
    """Read one run.

    Args:
        path: the run's folder.

    Raises:
        FileNotFoundError: when there is no event file in it.
    """
    folder = Path(path)
    files = event_files(folder)
    if not files:
        raise FileNotFoundError(f"`path` must be a run's folder with events.*.jsonl, found none in {str(folder)!r}")
    run = Run(folder.resolve().name, folder)
    reader = _Reader(run)
    for rank, _, file in files:
        for event in _lines(file, run.problems):
            reader.add(event, rank)
    return reader.finish()


def run_folders(root: Path) -> list[Path]:
    """Folders below ``root`` that hold events, sorted, without those moved to ``previous-*``."""
    folders = {path.parent for path in root.rglob("events.*.jsonl") if event_files(path.parent)}
    return sorted(f for f in folders if not any(p.startswith("previous-") for p in f.relative_to(root).parts))


def read_runs(root: str | Path) -> list[Run]:
    """Read every run below a folder, at any depth, except those moved to ``previous-*``.

    Args:
        root: the folder of the runs, or a single run's folder.

    Returns:
        The runs in the order of their folders' names; none for an empty folder.

    Raises:
        FileNotFoundError: when there is no such folder.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise FileNotFoundError(f"`root` must be a folder of runs, got {str(folder)!r}")
    return [read_run(f) for f in run_folders(folder)]
