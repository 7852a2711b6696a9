"""Accuracy inside tasks: a line per evaluated task over optimizer steps, task ends as rules, the deepest dip marked."""

from __future__ import annotations

from typing import Any

import numpy as np
from bokeh.models import BasicTicker, NumeralTickFormatter

from cl_plugins import functional
from cl_plugins.inside_tasks import InsideRow, InsideTasks
from cl_plugins.runs import Run

from ._figures import ACCENT, _figure, _mark, _segments, _source

_MOST_POINTS = 60_000
"""Of all runs of a page together; beyond it evaluations are left out, evenly."""


def inside_figure() -> Any:
    """The chart, over empty sources."""
    plot = _figure("inside", 430, "optimizer steps", "accuracy", tools="pan,box_zoom,wheel_zoom,reset,save")
    plot.xaxis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0, desired_num_ticks=10)
    plot.xaxis.formatter = NumeralTickFormatter(format="0,0")
    _segments(plot, "diagonal", line_dash="dashed", line_width=1)
    plot.varea(
        "x", "low", "high", source=_source("x", "low", "high"), name="bands", fill_color="#5b6672", fill_alpha=0.2
    )
    plot.multi_line(
        "xs", "ys", source=_source("xs", "ys", "color", "dash", "width"), name="lines", line_color="color",
        line_dash="dash", line_width="width",
    )  # fmt: skip
    plot.line("x", "y", source=_source("x", "y"), name="line", line_width=3)
    plot.text(
        "x", "y", text="text", text_color="color", source=_source("x", "y", "text", "color"), name="labels",
        text_align="center", text_baseline="top", text_font_size="11px",
    )  # fmt: skip
    _mark(plot, "line")
    _segments(plot, "dip", line_color=ACCENT, line_width=2)
    plot.scatter(
        "x", "y", source=_source("x", "y"), name="dip_point", marker="inverted_triangle", size=13, color=ACCENT
    )
    return plot


def _kept(rows: list[InsideRow], budget: int, always: set[int]) -> list[int]:
    """Numbers of the rows that fit: the ends of tasks, those in ``always``, and others evenly spaced."""
    points = sum(len(r.tasks) for r in rows)
    if points <= budget:
        return list(range(len(rows)))
    count = max(2, budget * len(rows) // points)
    spaced = np.linspace(0, len(rows) - 1, count).round().astype(int).tolist()
    ends = [k for k, r in enumerate(rows) if r.end]
    return sorted({*spaced, *always, *(ends if len(ends) <= count else [])})


def _dips(inside: InsideTasks) -> dict[str, Any] | None:
    """The deepest dip of an old task after a switch: where it began, where it was lowest, when it was back."""
    rows, matrix = inside.trace, inside.matrix
    gaps, stops = functional.stability_gaps(matrix, inside.learned_at)
    depths = gaps.depth.nan_to_num(nan=0.0)
    if not depths.numel() or float(depths.max()) <= 0:
        return None
    switch, place = divmod(int(depths.argmax()), depths.shape[1])
    stop, low, back = stops[switch], int(gaps.min_step[switch, place]), float(gaps.recovery_steps[switch, place])
    return {
        "task": inside.columns[place], "depth": float(depths[switch, place]), "from": stop, "at": low,
        "level": float(matrix[stop, place]), "low": float(matrix[low, place]), "while": rows[low].task,
        "back": rows[stop + int(back)].step - rows[stop].step if back == back else None,
    }  # fmt: skip


def inside_payload(run: Run, n_runs: int) -> dict[str, Any] | None:
    """What the chart of a run shows; None without an evaluation inside its tasks."""
    if not run.inside:
        return None
    inside = InsideTasks(run.inside, len(run.tasks))
    rows = inside.trace
    dip = _dips(inside)
    kept = _kept(rows, _MOST_POINTS // max(n_runs, 1), set() if dip is None else {dip["from"], dip["at"]})
    place = {k: n for n, k in enumerate(kept)}
    lines: dict[int, tuple[list[int], list[float]]] = {}
    for n, k in enumerate(kept):
        for task, value in rows[k].accuracy.items():
            own = lines.setdefault(task, ([], []))
            own[0].append(n)
            own[1].append(float(f"{value:.5g}"))
    averages = [rows[k].average for k in kept]
    numbers, reasons = inside.metrics(), inside.undefined()
    return {
        "every": inside.every,
        "steps": [rows[k].step for k in kept],
        "tasks": [rows[k].task for k in kept],
        "ends": [[r.step, r.task] for r in rows if r.end],
        "lines": [{"task": t, "k": ks, "y": ys} for t, (ks, ys) in sorted(lines.items())],
        "average": [_short(a.value) for a in averages],
        "half": [_short(a.half_width) for a in averages],
        "sampled": any(r.sampled for r in rows),
        "whole": len(kept) == len(rows),
        "dip": None if dip is None else {**dip, "from": place[dip["from"]], "at": place[dip["at"]]},
        "numbers": [[key, value, reasons.get(key, "")] for key, value in numbers.items()],
    }


def _short(value: float) -> float | None:
    return float(f"{value:.5g}") if value == value else None
