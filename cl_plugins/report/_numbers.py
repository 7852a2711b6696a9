"""The numbers of a report: each one a metric of :mod:`cl_plugins.functional`, with the name of its variant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_plugins import functional
from cl_plugins.comparison import compare_methods
from cl_plugins.label_scores import LABEL_SCORES, LabelScores
from cl_plugins.runs import Run
from cl_plugins.stats import SeedSummary, summarize_seeds

UNDEFINED = "undefined"


class Measure(NamedTuple):
    """A metric with its full name, which way is better, and what it is in words."""

    name: str
    better: str
    definition: str
    undefined: str
    compute: Callable[..., Tensor]


def _average_all_cells(matrix: Tensor, **options: Any) -> Tensor:
    scores = functional.mtil_scores(matrix, **options)
    return torch.where(scores["transfer"].isnan(), torch.nan, scores["average"])  # a joint run has no such average


MEASURES: dict[str, Measure] = {
    "average_accuracy": Measure(
        "average accuracy (last row)",
        "higher",
        "mean over the tasks learned so far of the accuracy at the last evaluation",
        "nothing was evaluated, or a learned task was not",
        functional.average_accuracy,
    ),
    "average_incremental_accuracy": Measure(
        "average incremental accuracy (mean over rows)",
        "higher",
        "mean over the evaluations after each task of the average accuracy at that time",
        "nothing was evaluated, or a learned task was not",
        partial(functional.average_incremental_accuracy, every_row=True),
    ),
    "forgetting": Measure(
        "forgetting (peak since learned)",
        "lower",
        "mean over old tasks of the best accuracy since the task was learned minus the accuracy now; negative when old"
        " tasks improved",
        "there is no old task yet, or a learned task was not evaluated",
        functional.forgetting,
    ),
    "backward_transfer": Measure(
        "backward transfer (final - learned)",
        "higher",
        "mean over old tasks of the accuracy now minus the accuracy right after the task was learned",
        "there is no old task yet, or a learned task was not evaluated",
        functional.backward_transfer,
    ),
    "learning_accuracy": Measure(
        "learning accuracy (plasticity)",
        "higher",
        "mean over tasks of the accuracy right after the task was learned",
        "a task was not evaluated right after it was learned",
        functional.learning_accuracy,
    ),
    "stability": Measure(
        "stability (old tasks, last row)",
        "higher",
        "mean over old tasks of the accuracy at the last evaluation",
        "there is no old task yet, or a learned task was not evaluated",
        functional.stability,
    ),
    "worst_task_accuracy": Measure(
        "worst task accuracy (last row)",
        "higher",
        "smallest accuracy of a learned task at the last evaluation",
        "nothing was evaluated, or a learned task was not",
        functional.worst_task_accuracy,
    ),
    "forward_transfer": Measure(
        "forward transfer (before learning - initial row)",
        "higher",
        "mean over tasks after the first of the accuracy just before the task was learned minus the accuracy before any"
        " training",
        "the initial row or the accuracy just before learning was not measured",
        functional.forward_transfer,
    ),
    "transfer": Measure(
        "transfer (before learning, column first)",
        "higher",
        "mean over tasks after the first of the accuracy at the evaluations before the task was learned; the"
        " evaluation before any training is not in it",
        "a task was not evaluated before it was learned",
        functional.transfer_accuracy,
    ),
    "average_all_cells": Measure(
        "average (all cells)",
        "higher",
        "mean of all cells of the matrix, tasks not learned yet included; the evaluation before any training is not in"
        " it",
        "a task was not evaluated before it was learned",
        _average_all_cells,
    ),
    "average_accuracy_task_known": Measure(
        "average accuracy (task known)",
        "higher",
        "average accuracy when the choice is among the classes of the image's own task",
        "nothing was evaluated, or a learned task was not",
        functional.average_accuracy,
    ),
}


def _label_measure(name: str, definition: str, compute: Callable[[Sequence[LabelScores]], float]) -> Measure:
    why = "the stream has one label a sample, no seen class occurs, or the scores are not numbers"
    return Measure(name, "higher", definition, why, lambda rows: torch.tensor(compute(rows), dtype=torch.float64))


LABEL_MEASURES: dict[str, Measure] = {
    "map": _label_measure("mAP of seen classes (last row)", LABEL_SCORES["map"], lambda rows: rows[-1].map),
    "average_map": _label_measure(
        "mAP (mean over rows)", LABEL_SCORES["average_map"], lambda rows: sum(r.map for r in rows) / len(rows)
    ),
    "cf1": _label_measure("CF1 (last row)", LABEL_SCORES["cf1"], lambda rows: rows[-1].cf1),
    "of1": _label_measure("OF1 (last row)", LABEL_SCORES["of1"], lambda rows: rows[-1].of1),
}
"""Those of streams with several labels a sample, from the scores of each row."""
ALL_MEASURES = {**LABEL_MEASURES, **MEASURES}
HEADLINE = (*list(MEASURES)[:5], "worst_task_accuracy")
_DOMAINS = ("average_accuracy", "transfer", "average_all_cells", "forgetting", "learning_accuracy")
_TASK_KNOWN = ("average_accuracy_task_known",)


def _says(run: Run, name: str) -> bool:
    stream = run.meta.get("stream")
    return isinstance(stream, Mapping) and stream.get(name) is True


def headline(runs: Sequence[Run]) -> tuple[str, ...]:
    """Measures that stand at the top: multi-domain streams have Transfer and Average, others the worst task."""
    if runs and all(run.labels for run in runs):
        return (*LABEL_MEASURES, "average_accuracy", "forgetting")
    of_domains = bool(runs) and all(_says(run, "open_vocabulary") for run in runs)
    known = bool(runs) and all(_says(run, "task_known") for run in runs)
    return (_TASK_KNOWN if known else ()) + (_DOMAINS if of_domains else HEADLINE)


def number(value: float | None, digits: int = 3) -> str:
    """A fraction as text; the word "undefined" for NaN and None, never a number.

    Example:
        >>> number(0.8125), number(float("nan")), number(-0.0001)
        ('0.812', 'undefined', '0.000')
    """
    if value is None or not math.isfinite(value):
        return UNDEFINED
    text = f"{value:.{digits}f}"
    return text[1:] if text.startswith("-") and float(text) == 0 else text


def quantity(value: float | None) -> str:
    """A count or an amount as text.

    Example:
        >>> quantity(1234567), quantity(12.345), quantity(None)
        ('1,234,567', '12.3', 'undefined')
    """
    if value is None or not math.isfinite(value):
        return UNDEFINED
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.1f}"


def learned_rows(run: Run) -> list[int | None] | None:
    """``learned_at`` for the metrics; None when every task was learned at the row of its own number."""
    return None if run.learned_at == list(range(len(run.tasks))) else run.learned_at


def measures_of(run: Run) -> dict[str, float]:
    """Every measure of a run; NaN where it is undefined.

    Streams of domains with label sets of their own (MTIL) choose among the task's own classes for Transfer and Average.
    """
    if run.accuracy_matrix.shape[0] == 0:
        return dict.fromkeys(ALL_MEASURES, math.nan)
    plain = run.accuracy_matrix, run.initial_accuracy
    known = run.accuracy_matrix_task_known, run.initial_accuracy_task_known
    own_labels = _says(run, "open_vocabulary") and _says(run, "task_known")
    values = {}
    for name, measure in MEASURES.items():
        in_task = name in _TASK_KNOWN or (own_labels and name in ("transfer", "average_all_cells"))
        matrix, initial = known if in_task else plain
        values[name] = float(measure.compute(matrix, learned_at=learned_rows(run), initial=initial))
    rows = [run.labels[after] for after in sorted(run.labels)]
    whole = len(rows) == run.accuracy_matrix.shape[0]  # a row without scores leaves them undefined
    values |= {name: float(m.compute(rows)) if whole else math.nan for name, m in LABEL_MEASURES.items()}
    return values


@dataclass
class TaskNumbers:
    """Per-task numbers of a run; NaN where undefined."""

    learned: list[float]
    final: list[float]
    forgotten: list[float]
    waterfall: list[float]
    waterfall_rows: list[int]
    curve: list[float]
    curve_rows: list[int]
    before: list[float]
    initial: list[float]


def task_numbers(run: Run) -> TaskNumbers:
    """What the charts of one run show beside its matrix."""
    matrix, learned_at = run.accuracy_matrix, learned_rows(run)
    rows, tasks = matrix.shape
    if rows == 0:
        nothing = [math.nan] * tasks
        return TaskNumbers(nothing, nothing, nothing, [], [], [], [], nothing, _initial(run))
    at = [step if step is not None and step < rows else None for step in run.learned_at]
    learned = [math.nan if step is None else float(matrix[step, j]) for j, step in enumerate(at)]
    final = [math.nan if step is None else float(matrix[-1, j]) for j, step in enumerate(at)]
    forgotten = functional.forgetting(matrix, learned_at=learned_at, reduction="none").tolist()
    stops = sorted({step for step in at if step is not None})
    waterfall = functional.retention_waterfall(matrix, learned_at=learned_at).tolist()
    extra = [rows - 1] if stops and stops[-1] != rows - 1 else []
    curve = functional.accuracy_curve(matrix, learned_at=learned_at, every_row=True).tolist()
    measured = (~matrix.isnan()).any(1).nonzero()[:, 0].tolist()
    curve_rows = sorted({*stops, *(row for row in measured if stops and row > stops[0])})
    before = [_mean_before(matrix[:, j], step) for j, step in enumerate(at)]
    return TaskNumbers(
        learned, final, forgotten, waterfall, (stops + extra)[1:], curve, curve_rows, before, _initial(run)
    )


def _initial(run: Run) -> list[float]:
    accuracy = run.initial_accuracy
    return [math.nan] * len(run.tasks) if accuracy is None else [float(a) for a in accuracy]


def _mean_before(column: Tensor, step: int | None) -> float:
    """Mean of a task's accuracy over the evaluations before it was learned: its part of the transfer score."""
    return float(column[:step].mean()) if step else math.nan


@dataclass
class Group:
    """Runs of one method on one scenario: the replicates of one another.

    ``slot`` numbers the method among those of the page, so that it has one color and sign on all scenarios.
    """

    method: str
    scenario: str
    members: list[int] = field(default_factory=list)
    slot: int = 0

    @property
    def label(self) -> str:
        """Method and scenario in one line."""
        return f"{self.method} on {self.scenario}" if self.scenario else self.method


def group_runs(runs: Sequence[Run], values: Sequence[dict[str, float]]) -> list[Group]:
    """Runs by scenario and method; within a scenario the most accurate method stands first, upper bounds last."""
    groups: dict[tuple[str, str], Group] = {}
    for index, run in enumerate(runs):
        method, scenario = str(run.meta.get("method") or run.id), str(run.meta.get("scenario") or "")
        groups.setdefault((scenario, method), Group(method, scenario)).members.append(index)

    def key(group: Group) -> tuple[str, bool, float, str]:
        summary = summarize(group, "average_accuracy", values)
        last = all(is_reference(runs[i]) for i in group.members)
        return group.scenario, last, math.inf if summary is None else -summary.mean, group.method

    ordered = sorted(groups.values(), key=key)
    slots = {method: n for n, method in enumerate(dict.fromkeys(g.method for g in ordered))}
    for group in ordered:
        group.slot = slots[group.method]
    return ordered


def summarize(group: Group, measure: str, values: Sequence[dict[str, float]]) -> SeedSummary | None:
    """Mean and interval over the runs of a group in which the measure is defined; None when it is in none."""
    defined = [v for v in (values[i].get(measure, math.nan) for i in group.members) if math.isfinite(v)]
    return summarize_seeds(defined) if defined else None


def band_of(group: Group, numbers: Sequence[TaskNumbers]) -> dict[str, list[float]]:
    """Average accuracy after each task over the runs of a group: rows, mean, and half of the 95 % t interval.

    A row counts when it is defined in every run; the half width is NaN below three runs.
    """
    curves = [dict(zip(numbers[i].curve_rows, numbers[i].curve, strict=True)) for i in group.members]
    band: dict[str, list[float]] = {"rows": [], "mean": [], "half": []}
    for row in sorted(set.intersection(*(set(curve) for curve in curves))):
        values = [curve[row] for curve in curves]
        if all(math.isfinite(v) for v in values):
            summary = summarize_seeds(values)
            band["rows"].append(row)
            band["mean"].append(summary.mean)
            band["half"].append(math.nan if summary.half_width is None else summary.half_width)
    return band


def mean_ranks(runs: Sequence[Run], values: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Borda's mean rank of each method by average accuracy, over runs with the same seeds and class order."""
    results = [
        {
            "method": str(run.meta.get("method") or run.id),
            "scenario": str(run.meta.get("scenario") or ""),
            "seed": run.meta.get("seed"),
            "order_seed": run.meta.get("order_seed"),
            "class_order": [c for task in run.tasks for c in task.classes],
            "recipe": run.meta.get("recipe"),
            "average_accuracy": own["average_accuracy"],
        }
        for run, own in zip(runs, values, strict=True)
    ]
    comparison = compare_methods(results)
    return {str(r["method"]): comparison.mean_rank(str(r["method"])) for r in results}


def cost_of(run: Run) -> dict[str, float]:
    """Training seconds and trainable parameters of a whole run; NaN where they were not recorded."""
    seconds = [c["train_seconds"] for c in run.cost.values() if isinstance(c.get("train_seconds"), (int, float))]
    trainable = [c["trainable"] for c in run.cost.values() if isinstance(c.get("trainable"), (int, float))]
    return {
        "train_seconds": float(sum(seconds)) if seconds else math.nan,
        "trainable": float(max(trainable)) if trainable else math.nan,
    }


def is_reference(run: Run) -> bool:
    """Whether the run trained on all tasks at once: an upper bound, not a method to rank."""
    recipe = run.meta.get("recipe")
    return isinstance(recipe, Mapping) and recipe.get("joint") is True


def steps_of(run: Run) -> int:
    """Number of tasks to train on; streams such as the joint one are evaluated on more."""
    stream = run.meta.get("stream")
    steps = stream.get("n_tasks") if isinstance(stream, Mapping) else None
    return steps if isinstance(steps, int) and steps > 0 else len(run.tasks)


def class_order(run: Run) -> tuple[tuple[int, ...], ...]:
    """The classes of the tasks, in order."""
    return tuple(task.classes for task in run.tasks)


def warnings_of(runs: Sequence[Run], groups: Sequence[Group]) -> list[str]:
    """What a reader must know before comparing the numbers."""
    notes = []
    for scenario in sorted({g.scenario for g in groups}):
        of_scenario = [g for g in groups if g.scenario == scenario]
        orders = {g.method: {class_order(runs[i]) for i in g.members} for g in of_scenario}
        different = set().union(*orders.values())
        where = f" of {scenario}" if scenario else ""
        if len(different) > 1:
            unpaired = len({frozenset(o) for o in orders.values()}) > 1
            more = " The methods did not see the same orders, so compare them with care." if unpaired else ""
            notes.append(f"The runs{where} follow {len(different)} different class orders.{more}")
        few = [f"{g.method} ({len(g.members)})" for g in of_scenario if len(g.members) < 3]
        if few and len(runs) > 1:
            notes.append(f"Fewer than 3 runs, so no interval{where}: {', '.join(few)}.")
        members = [runs[i] for g in of_scenario for i in g.members]
        if any(run.labels for run in members):
            notes.append(
                f"Accuracies{where} count labels, not images: an image with k labels of seen classes gets k guesses,"
                " its k highest scores. Forgetting, the matrix and ranks follow them; mAP, CF1 and OF1 count otherwise."
            )
        lengths = {int(run.correct.shape[0]) for run in members if not is_reference(run)}
        if len(lengths) > 1:
            notes.append(f"The runs{where} stand at different tasks: {', '.join(map(str, sorted(lengths)))} are done.")
    return notes
