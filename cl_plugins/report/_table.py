"""The table of methods as plain text: CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence

from cl_plugins.runs import Run

from ._measures import LABEL_MEASURES, measures_for
from ._numbers import UNDEFINED, Group, cost_of, is_reference, mean_ranks, number, quantity, summarize

COLUMNS = (
    *LABEL_MEASURES,
    "average_accuracy",
    "average_incremental_accuracy",
    "learning_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "transfer",
    "average_all_cells",
)
OPTIONAL = (*LABEL_MEASURES, "forward_transfer", "transfer", "average_all_cells")
"""Left out where only references have them or none, as in streams that are evaluated on learned tasks alone."""
_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
}


def cell(group: Group, measure: str, values: Sequence[dict[str, float]]) -> str:
    """Mean ± half of the 95 % t interval; the mean alone below three runs."""
    summary = summarize(group, measure, values)
    if summary is None:
        return UNDEFINED
    interval = "" if summary.half_width is None else f" ± {number(summary.half_width)}"
    part = "" if summary.n == len(group.members) else f" ({summary.n} of {len(group.members)})"
    return f"{number(summary.mean)}{interval}{part}"


def _mean(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return sum(finite) / len(finite) if finite else math.nan


def tables(runs: Sequence[Run], groups: Sequence[Group], values: Sequence[dict[str, float]]) -> list[list[list[str]]]:
    """The methods as text cells, the heading first: a table for each kind of stream, so that no column mixes two."""
    kinds = sorted({group.multi_label for group in groups})
    return [_lines(runs, [g for g in groups if g.multi_label == kind], values) for kind in kinds]


def _lines(runs: Sequence[Run], groups: Sequence[Group], values: Sequence[dict[str, float]]) -> list[list[str]]:
    """Heading and one line a method of groups of one kind."""
    ranks = mean_ranks(runs, values)
    own = [values[i] for g in groups for i in g.members if not is_reference(runs[i])]
    columns = [c for c in COLUMNS if c not in OPTIONAL or any(math.isfinite(v[c]) for v in own)]
    names = [measures_for(groups[0].multi_label)[c].name for c in columns]
    heading = ["method", "scenario", "n", "mean rank (Borda)", *names]
    lines = [[*heading, "training seconds (mean)", "trainable parameters (max over tasks)"]]
    for group in groups:
        costs = [cost_of(runs[i]) for i in group.members]
        lines.append(
            [
                group.method,
                group.scenario,
                str(len(group.members)),
                "not ranked" if (rank := ranks[group.method]) is None else f"{rank:.2f}",
                *(cell(group, c, values) for c in columns),
                quantity(_mean([c["train_seconds"] for c in costs])),
                quantity(_mean([c["trainable"] for c in costs])),
            ]
        )
    return lines


def as_csv(lines: Sequence[Sequence[str]]) -> str:
    """Comma-separated; a leading ``=``, ``+`` or ``@`` gets an apostrophe, so that no spreadsheet runs it."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([f"'{c}" if c[:1] in "=+@" and c else c for c in x] for x in lines)
    return file.getvalue()


def as_markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; names are escaped, so they stay text."""
    safe = [[re.sub(r"([\\`*_<>|\[\]])", r"\\\1", " ".join(c.split())) for c in line] for line in lines]
    rule = "|" + " --- |" * len(safe[0])
    head, *body = ("| " + " | ".join(line) + " |" for line in safe)
    return "\n".join([head, rule, *body]) + "\n"


def as_latex(lines: Sequence[Sequence[str]]) -> str:
    """A LaTeX tabular; special characters are escaped."""
    safe = [["".join(_LATEX.get(ch, ch) for ch in " ".join(c.split())) for c in line] for line in lines]
    head, *body = (" & ".join(line) + r" \\" for line in safe)
    columns = "ll" + "r" * (len(safe[0]) - 2)
    rule = r"\hline"
    return "\n".join([rf"\begin{{tabular}}{{{columns}}}", rule, head, rule, *body, rule, r"\end{tabular}"])
