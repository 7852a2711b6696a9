"""The measures of a report: names with their variant, definitions, and which stand where on streams of each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_plugins import functional
from cl_plugins.label_scores import LABEL_ACCURACY, LABEL_SCORES, LabelScores, of_label_accuracy
from cl_plugins.runs import Run


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
        "mAP of seen classes (mean over rows)",
        LABEL_SCORES["average_map"],
        lambda rows: sum(r.map for r in rows) / len(rows),
    ),
    "cf1": _label_measure("CF1 (last row)", LABEL_SCORES["cf1"], lambda rows: rows[-1].cf1),
    "of1": _label_measure("OF1 (last row)", LABEL_SCORES["of1"], lambda rows: rows[-1].of1),
}
"""Those of streams with several labels a sample, from the scores of each row."""
ALL_MEASURES = {**LABEL_MEASURES, **MEASURES}
OF_LABELS = {
    name: m._replace(
        name=of_label_accuracy(m.name),
        definition=m.definition.replace("accuracy", "label accuracy"),
        undefined=m.undefined.replace("accuracy", "label accuracy"),
    )
    for name, m in MEASURES.items()
}
"""The measures of the accuracy matrix where its counts are of labels."""
LABEL_NOTE = f"Label accuracy is {LABEL_ACCURACY}"
HEADLINE = (*list(MEASURES)[:5], "worst_task_accuracy")
_DOMAINS = ("average_accuracy", "transfer", "average_all_cells", "forgetting", "learning_accuracy")
TASK_KNOWN = ("average_accuracy_task_known",)


def says(run: Run, name: str) -> bool:
    """Whether the run's stream says so of itself."""
    stream = run.meta.get("stream")
    return isinstance(stream, Mapping) and stream.get(name) is True


def headline(runs: Sequence[Run], multi_label: bool = False) -> tuple[str, ...]:
    """Measures that stand at the top: multi-domain streams have Transfer and Average, others the worst task."""
    if multi_label:
        return (*LABEL_MEASURES, "average_accuracy", "forgetting")
    of_domains = bool(runs) and all(says(run, "open_vocabulary") for run in runs)
    known = bool(runs) and all(says(run, "task_known") for run in runs)
    return (TASK_KNOWN if known else ()) + (_DOMAINS if of_domains else HEADLINE)


def scenario_of(run: Run) -> str:
    """The scenario as runs are grouped by it."""
    return str(run.meta.get("scenario") or "")


def multi_label_runs(runs: Sequence[Run]) -> list[bool]:
    """Whether each run is of a stream with several labels a sample, by what any run of its scenario has measured.

    Runs of one scenario share their axes, so one that has no scores yet, or lost them, counts as the others do.
    """
    scenarios = {scenario_of(run) for run in runs if run.labels}
    return [scenario_of(run) in scenarios for run in runs]


def measures_for(multi_label: bool) -> dict[str, Measure]:
    """Every measure of streams of one kind, the ones that rank first."""
    return {**LABEL_MEASURES, **OF_LABELS} if multi_label else MEASURES


def ranking_measure(multi_label: bool) -> str:
    """Key of what methods are ordered and ranked by, and of what the charts over the stream show."""
    return "map" if multi_label else "average_accuracy"
