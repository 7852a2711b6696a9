"""The numbers of a report: each one a metric of :mod:`cl_plugins.functional`, with the name of its variant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from cl_plugins import functional
from cl_plugins.comparison import compare_methods
from cl_plugins.runs import Run
from cl_plugins.stats import SeedSummary, summarize_seeds

from ._measures import (
    ALL_MEASURES,
    LABEL_MEASURES,
    MEASURES,
    TASK_KNOWN,
    multi_label_runs,
    ranking_measure,
    says,
    scenario_of,
)

UNDEFINED = "undefined"


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
    own_labels = says(run, "open_vocabulary") and says(run, "task_known")
    values = {}
    for name, measure in MEASURES.items():
        in_task = name in TASK_KNOWN or (own_labels and name in ("transfer", "average_all_cells"))
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


def task_numbers(run: Run, multi_label: bool = False) -> TaskNumbers:
    """What the charts of one run show beside its matrix; the curve over the stream is of what ranks."""
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
    if multi_label:
        curve_rows = sorted(after for after in run.labels if after < rows)
        curve = [run.labels[after].map for after in curve_rows]
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

    ``slot`` numbers the method among those of the page, so that it has one color and sign on all scenarios;
    ``multi_label`` says that the stream has several labels a sample.
    """

    method: str
    scenario: str
    members: list[int] = field(default_factory=list)
    slot: int = 0
    multi_label: bool = False

    @property
    def ranking(self) -> str:
        """Key of the measure that orders and ranks the methods of this scenario."""
        return ranking_measure(self.multi_label)

    @property
    def label(self) -> str:
        """Method and scenario in one line."""
        return f"{self.method} on {self.scenario}" if self.scenario else self.method


def group_runs(runs: Sequence[Run], values: Sequence[dict[str, float]]) -> list[Group]:
    """Runs by scenario and method; within a scenario the best by what ranks stands first, joint references last."""
    groups: dict[tuple[str, str], Group] = {}
    for index, (run, multi_label) in enumerate(zip(runs, multi_label_runs(runs), strict=True)):
        method, scenario = str(run.meta.get("method") or run.id), scenario_of(run)
        own = groups.setdefault((scenario, method), Group(method, scenario, multi_label=multi_label))
        own.members.append(index)

    def key(group: Group) -> tuple[str, bool, float, str]:
        summary = summarize(group, group.ranking, values)
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
    """Average accuracy, or mAP, after each task over the runs of a group: rows, mean, and half of the 95 % t interval.

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
    """Borda's mean rank of each method over runs with the same seeds and class order, by what ranks on their stream."""
    results = [
        {
            "method": str(run.meta.get("method") or run.id),
            "scenario": scenario_of(run),
            "seed": run.meta.get("seed"),
            "order_seed": run.meta.get("order_seed"),
            "class_order": [c for task in run.tasks for c in task.classes],
            "recipe": run.meta.get("recipe"),
            ranking_measure(multi_label): own[ranking_measure(multi_label)],
        }
        for run, own, multi_label in zip(runs, values, multi_label_runs(runs), strict=True)
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
    """Whether the run trained on all tasks at once: a reference, no method to rank."""
    recipe = run.meta.get("recipe")
    return isinstance(recipe, Mapping) and recipe.get("joint") is True


def steps_of(run: Run) -> int:
    """Number of tasks to train on; streams such as the joint one are evaluated on more."""
    stream = run.meta.get("stream")
    steps = stream.get("n_tasks") if isinstance(stream, Mapping) else None
    return steps if isinstance(steps, int) and steps > 0 else len(run.tasks)


def class_order(run: Run) -> tuple[int, ...]:
    """The classes in the order of their tasks; a joint run that has them in one task saw the same order as others."""
    return tuple(c for task in run.tasks for c in task.classes)


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
        if any(g.multi_label for g in of_scenario):
            notes.append(
                f"Accuracies{where} count labels, not images: an image with k labels of seen classes gets k guesses,"
                " its k highest scores. The matrix and forgetting follow this label accuracy; ranks, the order of"
                " methods and the charts over the stream follow mAP."
            )
            without = sum(not run.labels and run.correct.shape[0] > 0 for run in members)
            if without:
                notes.append(f"{without} of {len(members)} runs{where} have no mAP recorded and are not ranked.")
        lengths = {int(run.correct.shape[0]) for run in members if not is_reference(run)}
        if len(lengths) > 1:
            notes.append(f"The runs{where} stand at different tasks: {', '.join(map(str, sorted(lengths)))} are done.")
    return notes
