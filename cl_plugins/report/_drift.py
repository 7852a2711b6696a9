"""Charts of what a DriftTracker measured: the same place for the same quantity in every run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from cl_plugins.runs import Run

PREFIX = "drift/"
CHARTS = 6
_MOST_POINTS = 400
_MIB = 2.0**20


def _by_task(run: Run, name: str) -> dict[int, Mapping[str, Any]]:
    """Events of one quantity, by the task they were told after."""
    events = [e for e in run.plug if e["name"] == PREFIX + name]
    return {e["task"]: e for e in sorted(events, key=lambda e: str(e.get("task"))) if isinstance(e.get("task"), int)}


def _value(value: Any) -> float | None:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(f"{value:.6g}") if plain else None


def _spread(count: int) -> list[int]:
    """Numbers of at most 400 of ``count`` points, evenly."""
    if count <= _MOST_POINTS:
        return list(range(count))
    return sorted({round(k * (count - 1) / (_MOST_POINTS - 1)) for k in range(_MOST_POINTS)})


def _lines(
    run: Run, event: str, name: str, labels: Mapping[str, str], unit: str = "", scale: float = 1.0
) -> dict[str, Any] | None:
    """A line per field of the events; one that is 0 or missing everywhere is left out."""
    told = _by_task(run, event)
    kept = [sorted(told)[k] for k in _spread(len(told))]
    lines = []
    for field, label in labels.items():
        values = {task: _value(told[task].get(field)) for task in kept}
        points = {task: value / scale for task, value in values.items() if value is not None}
        if points and (scale == 1.0 or any(points.values())):
            lines += [{"label": label, "task": t, "x": [t], "y": [float(f"{y:.6g}")]} for t, y in points.items()]
    return {"name": name, "unit": unit, "kind": "points", "x_title": "after task", "lines": lines} if lines else None


def _calibration(run: Run) -> dict[str, Any] | None:
    """Change of the calibration error as a matrix, after task x task; the tasks that were probed only."""
    told = {}
    for after, event in _by_task(run, "calibration drift per task").items():
        tasks, values = event.get("x"), event.get("values")
        if isinstance(tasks, list) and isinstance(values, list) and len(tasks) == len(values):
            told[after] = {t: _value(v) for t, v in zip(tasks, values, strict=True) if isinstance(t, int)}
    columns = sorted({t for row in told.values() for t in row})
    rows = [sorted(told)[k] for k in _spread(len(told))]
    if not columns:
        return None
    return {
        "name": "Calibration drift: ECE now minus ECE when learned",
        "unit": "",
        "task": None,
        "shape": [len(rows), len(columns)],
        "matrix": [told[i].get(j) for i in rows for j in columns],
        "rows": [str(i) for i in rows],
        "columns": [str(j) for j in columns],
        "titles": ["task", "after task"],
        "signed": True,
    }


def drift_payload(run: Run) -> list[dict[str, Any] | None] | None:
    """The charts of a run, None in the place of one that it has nothing for; None for a run without a measurement."""
    one = {"value": ""}
    kinds = {"frozen": "frozen", "trained": "trained", "method": "method's own", "buffers": "buffers",
             "callbacks": "kept by callbacks"}  # fmt: skip
    shares = {
        "recency_pull": "old-task errors in the newest task",
        "task_error": "predicted as another task",
        "recency_bias": "recency bias",
    }
    charts = [
        _lines(run, "effective rank", "Effective rank of the features", one),
        _lines(run, "linear CKA", "Linear CKA of the features", {"first": "with the first task end",
                                                                 "previous": "with the one before"}),
        _lines(run, "task confusion", "Task confusion and recency", shares),
        _lines(run, "expected calibration error", "Calibration error (ECE) of the tasks so far", one),
        _calibration(run),
        _lines(run, "memory by kind", "Memory by kind", kinds, "MiB", _MIB),
    ]  # fmt: skip
    return charts if any(charts) else None
