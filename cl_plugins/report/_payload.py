"""What the page's script needs to know about the runs, as small as it goes.

Counts travel as base64 of little-endian integers, the measured part of each row only, so that 1,000 x 1,000 tasks stay
near 1.4 MB; the page divides them itself and therefore shows exactly the accuracies of the metrics.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cl_plugins import functional
from cl_plugins.runs import Counts, Run

from ._drift import PREFIX, drift_payload
from ._inside import inside_payload
from ._measures import measures_for, multi_label_runs
from ._numbers import Group, TaskNumbers, band_of, class_order, steps_of, task_numbers

_MOST_POINTS = 400
_MOST_PANELS = 24
_LAST_CONFUSIONS = 60
_X_KEYS = ("x", "step", "steps", "epoch", "epochs")
_TEXT_KEYS = ("name", "task", "unit", "rows", "columns", "x_title", "y_title", "plugin")


def finite(values: Sequence[float]) -> list[float | None]:
    """Floats for JSON; undefined is null."""
    return [v if math.isfinite(v) else None for v in values]


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _packed(values: Counts) -> dict[str, Any]:
    """Non-negative integers and -1, as bytes of the narrowest type that holds them; its maximum stands for -1."""
    top = int(values.max(initial=0))
    kind = next((k for k in ("u1", "u2", "u4") if top < np.iinfo(k).max), None)
    if kind is None:
        return {"type": "list", "data": values.tolist()}
    coded = np.where(values < 0, np.iinfo(kind).max, values).astype(f"<{kind}")
    return {"type": kind, "data": base64.b64encode(coded.tobytes()).decode("ascii")}


def _cells(run: Run) -> dict[str, Any]:
    """The two count matrices: the measured head of each row, and the totals once per task when they never change."""
    measured = run.total >= 0
    rows, tasks = run.correct.shape
    last = tasks - np.argmax(measured[:, ::-1], axis=1) if tasks else np.zeros(rows, np.int64)
    lengths = np.where(measured.any(1), last, 0).astype(np.int64)
    head = np.arange(tasks)[None, :] < lengths[:, None]
    common = run.total.max(0, initial=-1)
    constant = bool((~measured | (run.total == common)).all())
    return {
        "lengths": lengths.tolist(),
        "correct": _packed(run.correct[head]),
        "total": _packed(common if constant else run.total[head]),
        "constant": constant,
    }


def _short(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _array(value: Any) -> np.ndarray[Any, Any] | None:
    """Numbers, lists and matrices of numbers, with NaN for null; None for anything else."""
    if isinstance(value, (str, bool, Mapping)) or value is None:
        return None
    try:
        array = np.asarray(value, dtype=np.float64)
    except (ValueError, TypeError, OverflowError):
        return None
    known = array.ndim > 0 or bool(np.isfinite(array))
    return array if known and array.ndim <= 2 and array.size > 0 else None


def _texts(value: Any) -> list[str]:
    return [str(v) for v in value] if isinstance(value, list) else []


def _panels(run: Run) -> list[dict[str, Any]]:
    """One panel per name: matrices alone, series and numbers of one name together."""
    panels: dict[tuple[str, str], dict[str, Any]] = {}
    for event in run.plug:
        name, task = event["name"], event.get("task")
        if name.startswith(PREFIX):
            continue
        for key, value in event.items():
            array = None if key in _X_KEYS or key in _TEXT_KEYS else _array(value)
            if array is None:
                continue
            plain = key in ("value", "values", "matrix", "series")
            if array.ndim == 2:
                panels[name, key] = {
                    "name": name if plain else f"{name}: {key}",
                    "unit": str(event.get("unit") or ""),
                    "task": task if isinstance(task, int) else None,
                    "shape": list(array.shape),
                    "matrix": [_short(v) for v in array.ravel()[: 1 << 18]],
                    "rows": _texts(event.get("rows")),
                    "columns": _texts(event.get("columns")),
                    "titles": [str(event.get("x_title") or "column"), str(event.get("y_title") or "row")],
                }
                continue
            kind = "points" if array.ndim == 0 else "lines"
            panel = panels.setdefault(
                (name, kind), {"name": name, "unit": str(event.get("unit") or ""), "kind": kind, "lines": []}
            )
            values = np.atleast_1d(array)
            keep = np.linspace(0, len(values) - 1, min(len(values), _MOST_POINTS)).round().astype(int)
            given = next((_array(event[k]) for k in _X_KEYS if k in event), None)
            axis = given if given is not None and given.shape == values.shape else np.arange(len(values))
            panel["x_title"] = next((k for k in _X_KEYS if k in event), "index")
            panel["lines"].append(
                {
                    "label": "" if plain else key,
                    "task": task if isinstance(task, int) else None,
                    "x": [_short(v) for v in axis[keep]],
                    "y": [_short(v) for v in values[keep]],
                }
            )
    ordered = [p for p in panels.values() if p.get("matrix") is None or len(p["matrix"]) == math.prod(p["shape"])]
    return sorted(ordered, key=lambda p: str(p["name"]))


def _cost(run: Run) -> list[dict[str, Any]]:
    """Cost by task: plain numbers only."""
    table = []
    for task, cost in sorted(run.cost.items()):
        line: dict[str, Any] = {"task": task}
        for key in ("train_seconds", "eval_seconds", "trainable", "peak_bytes"):
            value = cost.get(key)
            line[key] = value if isinstance(value, (int, float)) and math.isfinite(value) else None
        kinds = cost.get("parameters")
        amounts = kinds if isinstance(kinds, dict) else {"all": kinds}
        numbers = {str(k): v for k, v in amounts.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        line["parameters"] = sum(numbers.values()) if numbers else None
        line["kinds"] = numbers
        table.append(line)
    return table


def _numbers(numbers: TaskNumbers) -> dict[str, Any]:
    return {
        "learned": finite(numbers.learned),
        "final": finite(numbers.final),
        "forgotten": finite(numbers.forgotten),
        "waterfall": finite(numbers.waterfall),
        "waterfallRows": numbers.waterfall_rows,
        "curve": finite(numbers.curve),
        "curveRows": numbers.curve_rows,
        "before": finite(numbers.before) if any(map(math.isfinite, numbers.before)) else [],
        "initial": finite(numbers.initial) if any(map(math.isfinite, numbers.initial)) else [],
    }


def _confusions(run: Run) -> list[dict[str, Any]]:
    kept = [(after, table) for after, table in sorted(run.confusion.items()) if 0 < len(table) <= 100]
    return [
        {"after": after, "n": len(t), "counts": _packed(t.ravel()), "bias": _recency(after, t)}
        for after, t in kept[-_LAST_CONFUSIONS:]
    ]


def _recency(after: int, table: Counts) -> float | None:
    """Task recency bias over the tasks learned so far; None where it is undefined."""
    seen = [j for j in range(len(table)) if j <= after]
    old_and_new = torch.from_numpy(np.where(np.arange(len(table))[:, None] <= after, table, 0))
    return finite([float(functional.task_recency_bias(old_and_new, seen, range(len(table))))])[0] if seen else None


def order_numbers(runs: Sequence[Run]) -> list[int]:
    """The class order of each run, numbered from 0 within its scenario by order seed, then as they come."""
    seen: dict[str, dict[Any, int]] = {}

    def key(index: int) -> tuple[bool, float, int]:
        seed = runs[index].meta.get("order_seed")
        if isinstance(seed, (int, float)) and math.isfinite(seed):
            return False, float(seed), index
        return True, 0.0, index

    numbers = [0] * len(runs)
    for index in sorted(range(len(runs)), key=key):
        own = seen.setdefault(str(runs[index].meta.get("scenario") or ""), {})
        numbers[index] = own.setdefault(class_order(runs[index]), len(own))
    return numbers


def payload(
    runs: Sequence[Run], groups: Sequence[Group], values: Sequence[dict[str, float]], labels: Sequence[str]
) -> dict[str, Any]:
    """Everything the page's script shows."""
    content: list[dict[str, Any]] = []
    kinds = multi_label_runs(runs)
    numbers = [task_numbers(run, multi_label) for run, multi_label in zip(runs, kinds, strict=True)]
    orders = order_numbers(runs)
    names: dict[tuple[str, ...], int] = {}
    for index, run in enumerate(runs):
        own = tuple(task.name for task in run.tasks)
        content.append(
            {
                "label": labels[index],
                "group": next(k for k, g in enumerate(groups) if index in g.members),
                "names": names.setdefault(own, len(names)),
                "tasks": len(run.tasks),
                "rows": int(run.correct.shape[0]),
                "steps": steps_of(run),
                "learnedAt": run.learned_at,
                "cells": _cells(run),
                "multiLabel": kinds[index],
                "measures": {k: _known(values[index][k]) for k in measures_for(kinds[index])},
                "order": orders[index],
                **_numbers(numbers[index]),
                "cost": _cost(run),
                "inside": inside_payload(run, len(runs)),
                "panels": _panels(run)[:_MOST_PANELS],
                "drift": drift_payload(run),
                "confusions": _confusions(run),
                "alerts": [
                    {"text": str(a.get("text", "")), "task": a.get("task") if isinstance(a.get("task"), int) else None}
                    for a in run.alerts[-50:]
                ],
            }
        )
    return {
        "runs": content,
        "names": [list(own) for own in names],
        "groups": [
            {
                "label": g.label,
                "method": g.method,
                "members": g.members,
                "scenario": g.scenario,
                "slot": g.slot,
                "orders": len({class_order(runs[i]) for i in g.members}),
                "band": {
                    key: finite(values) if key != "rows" else values for key, values in band_of(g, numbers).items()
                },
            }
            for g in groups
        ],
    }
