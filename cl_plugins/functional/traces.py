"""What happens inside tasks: accuracy traces with several evaluations per task.

A trace matrix has a row per evaluation and a column per task; task j ends at row ``l(j)`` (``learned_at``). More
evaluations can only lower a minimum, so values with different periods do not compare.

* ``min_accuracy``, ``worst_case_accuracy``, ``windowed_forgetting``, ``windowed_plasticity``, ``stability_gap``: De
  Lange, van de Ven and Tuytelaars 2023, arXiv:2205.13452. The largest rise starts at the running minimum; code that
  prunes on the running maximum reports too little plasticity.
* ``anytime_accuracy``: Koh et al. 2022, arXiv:2110.10031. ``learning_curve_area``: Chaudhry et al. 2019, A-GEM.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ._matrix import LearnedAt, NanPolicy, Table, as_double, check_choice, nan_like, read_matrix


def _minima(table: Table) -> tuple[Tensor, Tensor]:
    """Smallest accuracy after the end of each task ``(..., tasks)``, and which tasks have one."""
    after = table.row_index > table.learned  # (rows, tasks)
    table.check(table.cells, after)
    missing = table.cells.isnan()
    low = torch.where(after & ~missing, table.cells, torch.inf).amin(-2)
    low = torch.where(low.isinf(), torch.nan, low)
    if table.policy != "omit":
        low = torch.where((missing & after).any(-2), torch.nan, low)
    return low, table.old


def min_accuracy(
    matrix: Tensor, *, learned_at: LearnedAt = None, initial: Tensor | None = None, nan_policy: NanPolicy = "propagate"
) -> Tensor:
    """Mean over finished tasks of the smallest accuracy since the end of the task (min-ACC).

    Args:
        matrix: traces ``(..., evaluations, tasks)`` in [0, 1], NaN where not measured.
        learned_at: row at which each task ended, None or -1 for never; None for column j at row j.
        initial: accuracy before any training; not read here.
        nan_policy: what a cell that is read and missing does: ``"propagate"``, ``"omit"`` or ``"raise"``.

    Returns:
        ``(...)`` float64 in [0, 1], higher is better; NaN while no task is finished.

    Example:
        >>> min_accuracy(torch.tensor([[0.9, 0.1], [0.4, 0.5], [0.6, 0.8]]), learned_at=[0, 2])
        tensor(0.4000, dtype=torch.float64)
    """
    table = read_matrix(matrix, learned_at, initial, nan_policy)
    return table.mean(*_minima(table)) if table.rows else nan_like(table.cells)


def worst_case_accuracy(
    matrix: Tensor, *, learned_at: LearnedAt = None, initial: Tensor | None = None, nan_policy: NanPolicy = "propagate"
) -> Tensor:
    """``a_k/k + (1 - 1/k) * min-ACC``: the current task k now, all others at their worst since they ended (WC-ACC).

    The current task is the one whose end is next (at or after the last row), else the one that ended last. Arguments as
    for :func:`min_accuracy`.

    Example:
        >>> worst_case_accuracy(torch.tensor([[0.9, 0.1], [0.4, 0.5], [0.6, 0.8]]), learned_at=[0, 2])
        tensor(0.6000, dtype=torch.float64)
    """
    table = read_matrix(matrix, learned_at, initial, nan_policy)
    width, last = table.cells.shape[-1], as_double(matrix).shape[-2] - 1
    given = list(range(width)) if learned_at is None else [-1 if s is None else int(s) for s in learned_at]
    ends = {j: end for j, end in enumerate(given) if end >= 0}
    if not ends or not table.rows:
        return nan_like(table.cells)
    running = {j: end for j, end in ends.items() if end >= last}
    current = min(running, key=running.__getitem__) if running else max(ends, key=ends.__getitem__)
    count = sum(end <= ends[current] for end in ends.values())
    now = table.final[..., current]
    if count == 1:
        return now
    low, finished = _minima(table)
    others = finished & (torch.arange(width, device=finished.device) != current)
    return now / count + (1 - 1 / count) * table.mean(low, others)


def _windowed(matrix: Tensor, window: int, falls: bool, learned_at: LearnedAt, nan_policy: NanPolicy) -> Tensor:
    if window < 2:
        raise ValueError(f"`window` must hold at least 2 evaluations, got {window!r}")
    table = read_matrix(matrix, learned_at, None, nan_policy)
    missing = table.cells.isnan()
    seen = table.row_index >= table.learned
    table.check(table.cells, seen)
    largest = torch.zeros_like(table.cells[..., 0, :]) if table.rows else table.cells.sum(-2)
    for lag in range(1, min(window, table.rows)):
        change = table.cells[..., lag:, :] - table.cells[..., :-lag, :]
        change = -change if falls else change
        largest = torch.maximum(largest, change.nan_to_num(nan=0.0).amax(-2))
    if nan_policy != "omit":
        largest = torch.where((missing & seen).any(-2), torch.nan, largest)
    return table.mean(largest, ~missing.all(-2) | seen.any(0))


def windowed_forgetting(
    matrix: Tensor,
    window: int = 10,
    *,
    learned_at: LearnedAt = None,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Mean over tasks of the largest fall of accuracy inside any ``window`` consecutive evaluations (WF).

    Args:
        matrix: traces ``(..., evaluations, tasks)`` in [0, 1], NaN where not measured; rows before a task ended count.
        window: number of evaluations, at least 2.
        learned_at: row at which each task ended; cells missing from there on follow ``nan_policy``, others are skipped.
        nan_policy: ``"propagate"``, ``"omit"`` or ``"raise"``.

    Returns:
        ``(...)`` float64 in [0, 1], lower is better.

    Example:
        >>> windowed_forgetting(torch.tensor([[0.5], [0.2], [0.9]]))
        tensor(0.3000, dtype=torch.float64)
    """
    return _windowed(matrix, window, True, learned_at, nan_policy)


def windowed_plasticity(
    matrix: Tensor,
    window: int = 10,
    *,
    learned_at: LearnedAt = None,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Mean over tasks of the largest rise of accuracy inside any ``window`` consecutive evaluations (WP).

    Arguments as for :func:`windowed_forgetting`; higher is better.

    Example:
        >>> windowed_plasticity(torch.tensor([[0.5], [0.2], [0.9]]))
        tensor(0.7000, dtype=torch.float64)
    """
    return _windowed(matrix, window, False, learned_at, nan_policy)


class Gap(NamedTuple):
    """The dip of one task's accuracy after training moved to another task.

    Attributes:
        depth: accuracy at the switch minus the smallest one after it.
        min_step: evaluation with the smallest accuracy.
        recovery_steps: evaluations from the switch until its accuracy is reached again after the dip; NaN if never.
        residual: accuracy at the switch minus the last one.
    """

    depth: Tensor
    min_step: Tensor
    recovery_steps: Tensor
    residual: Tensor


def stability_gap(trace: Tensor, switch: int, horizon: int | None = None) -> Gap:
    """Depth and recovery of the dip after a task switch.

    Args:
        trace: accuracy of one task at each evaluation ``(evaluations,)``; evaluations that are NaN are skipped.
        switch: index of the last evaluation before training moved to another task.
        horizon: evaluations after the switch that count, None for all.

    Returns:
        A :class:`Gap` of float64 scalars; all NaN without an evaluation after the switch.

    Raises:
        ValueError: for a switch outside the trace.

    Example:
        >>> gap = stability_gap(torch.tensor([0.9, 0.5, 0.7, 0.9, 0.8]), switch=0)
        >>> [round(float(value), 2) for value in gap]
        [0.4, 1.0, 3.0, 0.1]
    """
    values = as_double(trace)
    if not 0 <= switch < len(values):
        raise ValueError(f"`switch` must be an index of the trace of {len(values)} evaluations, got {switch!r}")
    start = values[switch]
    after = values[switch + 1 :] if horizon is None else values[switch + 1 : switch + 1 + horizon]
    usable = (~after.isnan()).nonzero()[:, 0]
    undefined = torch.full_like(start, torch.nan)
    if not len(usable) or bool(start.isnan()):
        return Gap(undefined, undefined, undefined, undefined)
    low = usable[after[usable].argmin()]
    depth = start - after[low]
    back = (after[low:] >= start).nonzero()[:, 0]
    steps = torch.zeros_like(start) if bool(depth <= 0) else undefined
    if bool(depth > 0) and len(back):
        steps = (low + back[0] + 1).to(start.dtype)
    return Gap(depth, (switch + 1 + low).to(start.dtype), steps, start - after[usable[-1]])


def stability_gaps(matrix: Tensor, learned_at: LearnedAt = None) -> tuple[Gap, list[int]]:
    """The gaps of all old tasks after every switch, each followed until the next switch.

    Args:
        matrix: traces ``(evaluations, tasks)`` in [0, 1]; evaluations that are NaN are skipped.
        learned_at: row at which each task ended, None or -1 for never; None for column j at row j.

    Returns:
        A :class:`Gap` of ``(switches, tasks)`` float64, NaN for tasks that are not old at a switch and where
        nothing was measured; and the rows of the switches.

    Example:
        >>> gaps, switches = stability_gaps(torch.tensor([[0.9, 0.0], [0.5, 0.4], [0.8, 0.7]]), learned_at=[0, 2])
        >>> switches, [round(float(value[0, 0]), 2) for value in gaps]
        ([0], [0.4, 1.0, nan, 0.1])
    """
    cells = as_double(matrix)
    rows, width = cells.shape
    given = list(range(width)) if learned_at is None else [-1 if s is None else int(s) for s in learned_at]
    ends = torch.tensor([rows if end < 0 else end for end in given], dtype=torch.int64, device=cells.device)
    stops = sorted({end for end in ends.tolist() if end < rows - 1})
    parts = []
    for stop, last in zip(stops, [*stops[1:], rows - 1][: len(stops)], strict=True):
        start, after = cells[stop], cells[stop + 1 : last + 1]
        place = torch.arange(len(after), device=cells.device)[:, None]
        measured = ~after.isnan()
        low = after.nan_to_num(nan=torch.inf).argmin(0)
        depth = start - after.gather(0, low[None])[0]
        back = (after >= start) & (place >= low)
        steps = torch.where(back.any(0), back.int().argmax(0) + 1.0, torch.nan)
        steps = torch.where(depth <= 0, 0.0, steps)
        final = after.gather(0, torch.where(measured, place, -1).amax(0).clamp_min(0)[None])[0]
        undefined = (ends > stop) | start.isnan() | ~measured.any(0)
        values = (depth, (stop + 1 + low).double(), steps, start - final)
        parts.append(torch.stack([torch.where(undefined, torch.nan, value) for value in values]))
    table = torch.stack(parts, 1) if parts else cells.new_zeros(4, 0, width)
    return Gap(*table), stops


def anytime_accuracy(
    accuracy: Tensor,
    samples_seen: Tensor | None = None,
    period: int | None = None,
    *,
    rule: Literal["rectangle", "trapezoid"] = "rectangle",
) -> Tensor:
    """Area under the curve of accuracy over training samples (A_AUC).

    Args:
        accuracy: accuracy over the classes seen so far ``(..., evaluations)`` in [0, 1].
        samples_seen: training samples seen at each evaluation ``(evaluations,)``; None for evenly spaced evaluations.
        period: with ``"rectangle"``, only evaluations at positive multiples of it count; None for all but sample 0.
        rule: ``"rectangle"`` is the plain mean of the reference code, ``"trapezoid"`` integrates over uneven grids from
            the first to the last evaluation.

    Returns:
        ``(...)`` float64 in [0, 1], higher is better; NaN without an evaluation.

    Example:
        >>> anytime_accuracy(torch.tensor([0.1, 0.5, 0.7, 0.2]), torch.tensor([0, 100, 200, 250]), period=100)
        tensor(0.6000, dtype=torch.float64)
    """
    check_choice("rule", rule, ("rectangle", "trapezoid"))
    values = as_double(accuracy)
    count = values.shape[-1]
    seen = torch.arange(1, count + 1, device=values.device) if samples_seen is None else samples_seen.to(values.device)
    if seen.shape != (count,):
        raise ValueError(f"`samples_seen` must have one entry per evaluation ({count}), got {tuple(seen.shape)}")
    if rule == "rectangle":
        counts = (seen > 0) if period is None else (seen > 0) & (seen % period == 0)
        return values[..., counts].mean(-1)
    if count < 2:
        return values.mean(-1)
    grid = seen.double()
    return torch.trapezoid(values, grid, dim=-1) / (grid[-1] - grid[0])


def learning_curve_area(first_batches: Tensor, beta: int = 10) -> Tensor:
    """Mean over tasks of the accuracy after 0 to ``beta`` mini-batches of the task (LCA).

    Args:
        first_batches: accuracy after b mini-batches ``(..., tasks, batches)``, b from 0, in [0, 1].
        beta: last mini-batch that counts.

    Returns:
        ``(...)`` float64 in [0, 1], higher is better; NaN when the curves are shorter than ``beta + 1``.

    Example:
        >>> learning_curve_area(torch.tensor([[0.1, 0.3, 0.5], [0.2, 0.4, 0.6]]), beta=2)
        tensor(0.3500, dtype=torch.float64)
    """
    if beta < 0:
        raise ValueError(f"`beta` must be at least 0, got {beta!r}")
    curves = as_double(first_batches)
    if curves.shape[-1] <= beta:
        return nan_like(curves)
    return curves[..., : beta + 1].mean((-2, -1))
