"""Forgetting: how much accuracy old tasks have lost.

The word stands for several quantities that part as soon as accuracy rises after learning or zero-shot accuracy is good:

* ``forgetting(R)``: peak since learned minus now (Chaudhry et al. 2018, arXiv:1801.10112);
* ``forgetting(R, since="start")``: peak over all earlier rows, also before the task was learned;
* ``forgetting(R, clip=True)``: the peak may be the last row, so never negative;
* ``forgetting(R, peak="learned")``: accuracy right after learning minus now, the negative backward transfer;
* ``forgetting(R, normalize="peak")``: share of the peak that is lost.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ._matrix import LearnedAt, NanPolicy, Table, check_choice, masked_extreme, nan_like, read_matrix

Since: TypeAlias = Literal["learned", "start"]
Peak: TypeAlias = Literal["max", "learned"]
Reduction: TypeAlias = Literal["mean", "max", "none"]


def _peaks(table: Table, since: Since) -> Tensor:
    """Best earlier accuracy ``(..., rows, tasks)`` at each cell; -inf before anything was measured."""
    before_learning = table.row_index < table.learned  # (rows, tasks)
    missing = table.cells.isnan()
    ignored = missing | before_learning if since == "learned" else missing
    best = torch.where(ignored, -torch.inf, table.cells).cummax(-2).values
    if table.policy != "omit":
        evaluated = ~missing.all(-1, keepdim=True) | table.at_boundary
        hole = (missing & ~before_learning & evaluated).cumsum(-2) > 0
        best = torch.where(hole, torch.nan, best)
    first = torch.full_like(best[..., :1, :], -torch.inf)
    return torch.cat([first, best], dim=-2)[..., :-1, :]


def _per_task(
    table: Table, rows: Tensor, since: Since, peak: Peak, clip: bool, relative: bool
) -> tuple[Tensor, Tensor]:
    """Forgetting of each task at each of ``rows`` ``(..., len(rows), tasks)``, and which entries count."""
    now = table.cells[..., rows, :]
    best = table.diagonal[..., None, :].expand_as(now) if peak == "learned" else _peaks(table, since)[..., rows, :]
    best = torch.where(best.isinf(), torch.nan, best)
    lost = (best - now).clamp(min=0.0) if clip else best - now
    counts = (table.learned[None, :] < rows[:, None]).expand(now.shape)
    if relative:
        top = torch.maximum(best, now) if clip else best
        counts = counts & (top != 0)
        lost = lost / top
    return lost, counts


def _checked(since: Since, peak: Peak, normalize: Literal["peak"] | None, reduction: Reduction) -> None:
    check_choice("since", since, ("learned", "start"))
    check_choice("peak", peak, ("max", "learned"))
    check_choice("normalize", normalize, (None, "peak"))
    check_choice("reduction", reduction, ("mean", "max", "none"))


def forgetting(
    matrix: Tensor,
    *,
    learned_at: LearnedAt = None,
    initial: Tensor | None = None,
    since: Since = "learned",
    peak: Peak = "max",
    clip: bool = False,
    normalize: Literal["peak"] | None = None,
    reduction: Reduction = "mean",
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Earlier accuracy minus accuracy at the last row, over the tasks learned before it; lower is better.

    Args:
        matrix: accuracy ``(..., rows, tasks)`` in [0, 1], NaN where not measured.
        learned_at: row at which each column was learned, None or -1 for never; None for column j at row j.
        initial: accuracy before any training; no part of the peak.
        since: the peak runs over rows from ``"learned"`` on, or from the ``"start"`` (rows before learning that were
            not measured are skipped).
        peak: ``"max"`` takes the best earlier row, ``"learned"`` the row of learning.
        clip: count a task that improved as 0, which lets the peak be the last row.
        normalize: ``"peak"`` divides by the peak; tasks whose peak is 0 are left out.
        reduction: ``"mean"``, ``"max"`` (worst task) or ``"none"`` (a value per task, NaN for tasks that are not old).
        nan_policy: what a cell that is read and missing does: ``"propagate"``, ``"omit"`` or ``"raise"``.

    Returns:
        ``(...)`` float64 in [-1, 1], or ``(..., tasks)`` without reduction; NaN without an old task.

    Raises:
        ValueError: for an unknown choice, a wrong shape, percent, or a missing cell under ``nan_policy="raise"``.

    Example:
        >>> zero_shot = torch.tensor([[0.80, 0.93, 0.74], [0.72, 0.75, 0.99], [0.61, 0.67, 0.94]])
        >>> forgetting(zero_shot)
        tensor(0.1350, dtype=torch.float64)
        >>> forgetting(zero_shot, since="start")
        tensor(0.2250, dtype=torch.float64)
    """
    _checked(since, peak, normalize, reduction)
    table = read_matrix(matrix, learned_at, initial, nan_policy)
    if table.rows == 0:
        return torch.full_like(table.cells.sum(-2), torch.nan) if reduction == "none" else nan_like(table.cells)
    rows = torch.tensor([table.last], device=table.cells.device)
    lost, counts = _per_task(table, rows, since, peak, clip, normalize is not None)
    lost, counts = lost[..., 0, :], counts[..., 0, :]
    if reduction == "none":
        return torch.where(counts, lost, torch.nan)
    if reduction == "max":
        return masked_extreme(lost, counts, nan_policy, largest=True)
    return table.mean(lost, counts)


def forgetting_curve(
    matrix: Tensor,
    *,
    learned_at: LearnedAt = None,
    initial: Tensor | None = None,
    since: Since = "learned",
    peak: Peak = "max",
    clip: bool = False,
    normalize: Literal["peak"] | None = None,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Mean forgetting at each boundary ``(..., boundaries)``, NaN at the first. Arguments as for :func:`forgetting`.

    Example:
        >>> forgetting_curve(torch.tensor([[0.9, 0.3, 0.2], [0.7, 0.8, 0.2], [0.5, 0.6, 0.9]]))
        tensor([   nan, 0.2000, 0.3000], dtype=torch.float64)
    """
    _checked(since, peak, normalize, "mean")
    table = read_matrix(matrix, learned_at, initial, nan_policy)
    return table.mean(*_per_task(table, table.boundaries, since, peak, clip, normalize is not None))


def retention_waterfall(
    matrix: Tensor, *, learned_at: LearnedAt = None, initial: Tensor | None = None, nan_policy: NanPolicy = "propagate"
) -> Tensor:
    """From learned to final accuracy: the learning accuracy, then what each later step added to or took from it.

    Args:
        matrix: accuracy ``(..., rows, tasks)`` in [0, 1], NaN where not measured.
        learned_at: row at which each column was learned, None or -1 for never; None for column j at row j.
        initial: accuracy before any training; not read here.
        nan_policy: under ``"omit"`` a hole keeps the value before it; tasks without a first or last value are left out.

    Returns:
        ``(..., 1 + steps)`` float64 with one step for each boundary after the first, and for the last row when it is an
        extra evaluation. The entries sum to the average accuracy, the steps to ``(T-1)/T`` times backward transfer.

    Example:
        >>> retention_waterfall(torch.tensor([[0.9, 0.3, 0.2], [0.7, 0.8, 0.2], [0.5, 0.6, 0.9]]))
        tensor([ 0.8667, -0.0667, -0.1333], dtype=torch.float64)
    """
    table = read_matrix(matrix, learned_at, initial, nan_policy)
    if len(table.boundaries) == 0:
        return nan_like(table.cells)[..., None]
    stops = table.boundaries.tolist()
    stops += [table.last] if stops[-1] != table.last else []
    start = table.diagonal
    counts = table.seen
    if nan_policy == "omit":
        counts = counts & ~start.isnan() & ~table.final.isnan()
    level, parts = start, [table.mean(start, counts)]
    for stop in stops[1:]:
        now = table.cells[..., stop, :]
        now = torch.where(table.learned < stop, now, level)
        now = torch.where(now.isnan(), level, now) if nan_policy == "omit" else now
        parts.append(table.mean(now - level, counts))
        level = now
    return torch.stack(parts, dim=-1)
