"""Backward and forward transfer.

* ``backward_transfer``: mean over old tasks of ``R[last, j] - R[l(j), j]`` (Lopez-Paz and Ranzato 2017,
  arXiv:1706.08840); with ``scheme="running"`` at every boundary (Diaz-Rodriguez et al. 2018, arXiv:1810.13166);
* ``forward_transfer``: mean over tasks after the first of ``R[prev(j), j] - initial[j]`` (Lopez-Paz and Ranzato 2017);
  with ``scheme="triangle"`` all cells before learning, without a baseline (Diaz-Rodriguez et al. 2018);
* ``mtil_scores``: transfer, average and last of multi-domain task-incremental learning (Zheng et al. 2023).
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ._matrix import LearnedAt, NanPolicy, check_choice, nan_like, read_matrix
from .forgetting import forgetting_curve

BackwardScheme: TypeAlias = Literal["final", "running"]
ForwardScheme: TypeAlias = Literal["previous", "triangle"]


def backward_transfer(
    matrix: Tensor,
    *,
    learned_at: LearnedAt = None,
    initial: Tensor | None = None,
    scheme: BackwardScheme = "final",
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """What later training did to tasks learned before: accuracy minus accuracy right after learning.

    Args:
        matrix: accuracy ``(..., rows, tasks)`` in [0, 1], NaN where not measured.
        learned_at: row at which each column was learned, None or -1 for never; None for column j at row j.
        initial: accuracy before any training; not read here.
        scheme: ``"final"`` compares the last row, ``"running"`` averages over all boundaries and their old tasks.
        nan_policy: what a cell that is read and missing does: ``"propagate"``, ``"omit"`` or ``"raise"``.

    Returns:
        ``(...)`` float64 in [-1, 1], higher is better; NaN without an old task.

    Example:
        >>> backward_transfer(torch.tensor([[0.9, 0.3, 0.2], [0.7, 0.8, 0.2], [0.5, 0.6, 0.9]]))
        tensor(-0.3000, dtype=torch.float64)
    """
    check_choice("scheme", scheme, ("final", "running"))
    table = read_matrix(matrix, learned_at, initial, nan_policy)
    if table.rows == 0:
        return nan_like(table.cells)
    if scheme == "final":
        return table.mean(table.final - table.diagonal, table.old)
    change = table.cells - table.diagonal[..., None, :]
    return table.mean_cells(change, table.at_boundary & (table.learned < table.row_index))


def backward_transfer_curve(
    matrix: Tensor, *, learned_at: LearnedAt = None, initial: Tensor | None = None, nan_policy: NanPolicy = "propagate"
) -> Tensor:
    """Backward transfer at each boundary ``(..., boundaries)``, NaN at the first.

    Example:
        >>> backward_transfer_curve(torch.tensor([[0.9, 0.3, 0.2], [0.7, 0.8, 0.2], [0.5, 0.6, 0.9]]))
        tensor([    nan, -0.2000, -0.3000], dtype=torch.float64)
    """
    return -forgetting_curve(matrix, learned_at=learned_at, initial=initial, peak="learned", nan_policy=nan_policy)


def positive_backward_transfer(
    matrix: Tensor, *, learned_at: LearnedAt = None, initial: Tensor | None = None, nan_policy: NanPolicy = "propagate"
) -> Tensor:
    """``max(BWT, 0)`` of the running backward transfer (BWT+), in [0, 1]; NaN without an old task.

    Example:
        >>> positive_backward_transfer(torch.tensor([[0.6, 0.4], [0.7, 0.8]]))
        tensor(0.1000, dtype=torch.float64)
    """
    value = backward_transfer(matrix, learned_at=learned_at, initial=initial, scheme="running", nan_policy=nan_policy)
    return value.clamp(min=0.0)


def remembering(
    matrix: Tensor, *, learned_at: LearnedAt = None, initial: Tensor | None = None, nan_policy: NanPolicy = "propagate"
) -> Tensor:
    """``1 - abs(min(BWT, 0))`` of the running backward transfer (REM), in [0, 1]; NaN without an old task.

    Example:
        >>> remembering(torch.tensor([[0.9, 0.4], [0.7, 0.8]]))
        tensor(0.8000, dtype=torch.float64)
    """
    value = backward_transfer(matrix, learned_at=learned_at, initial=initial, scheme="running", nan_policy=nan_policy)
    return 1.0 + value.clamp(max=0.0)


def forward_transfer(
    matrix: Tensor,
    *,
    learned_at: LearnedAt = None,
    initial: Tensor | None = None,
    scheme: ForwardScheme = "previous",
    baseline: Literal["initial"] | None = "initial",
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """What earlier tasks did for a task before it was learned.

    Args:
        matrix: accuracy ``(..., rows, tasks)`` in [0, 1], NaN where not measured.
        learned_at: row at which each column was learned, None or -1 for never; None for column j at row j.
        initial: accuracy before any training ``(..., tasks)``; undefined without it unless ``baseline=None``.
        scheme: ``"previous"`` reads the boundary before learning, ``"triangle"`` all boundaries before it,
            without a baseline.
        baseline: ``"initial"`` subtracts the initial row, None subtracts nothing (zero-shot accuracy of the next task).
        nan_policy: what a cell that is read and missing does: ``"propagate"``, ``"omit"`` or ``"raise"``.

    Returns:
        ``(...)`` float64 in [-1, 1], higher is better; NaN with one task, without an initial row, or when a task
        was not evaluated before it was learned.

    Example:
        >>> matrix = torch.tensor([[0.9, 0.3], [0.7, 0.8]])
        >>> forward_transfer(matrix, initial=torch.tensor([0.1, 0.1]))
        tensor(0.2000, dtype=torch.float64)
        >>> forward_transfer(matrix)
        tensor(nan, dtype=torch.float64)
    """
    check_choice("scheme", scheme, ("previous", "triangle"))
    check_choice("baseline", baseline, ("initial", None))
    table = read_matrix(matrix, learned_at, initial, nan_policy)
    if scheme == "triangle":
        return table.mean_cells(table.cells, table.at_boundary & (table.row_index < table.learned) & table.seen)
    if table.rows == 0 or (baseline == "initial" and table.initial is None):
        return nan_like(table.cells)
    gain = table.at(table.previous)
    if baseline == "initial" and table.initial is not None:
        gain = gain - table.initial
    return table.mean(gain, table.previous >= 0)


def transfer_accuracy(
    matrix: Tensor,
    *,
    learned_at: LearnedAt = None,
    initial: Tensor | None = None,
    order: Literal["column", "row"] = "column",
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Zero-shot accuracy on tasks before they are learned, in [0, 1], higher is better.

    Args:
        matrix: accuracy ``(..., rows, tasks)`` in [0, 1], NaN where not measured; every row counts.
        learned_at: row at which each column was learned, None or -1 for never; None for column j at row j.
        initial: accuracy before any training; no part of the mean.
        order: ``"column"`` averages over rows within each task first, ``"row"`` over tasks within each row first.
        nan_policy: what a cell that is read and missing does: ``"propagate"``, ``"omit"`` or ``"raise"``.

    Example:
        >>> transfer_accuracy(torch.tensor([[0.9, 0.3, 0.2], [0.7, 0.8, 0.4], [0.5, 0.6, 0.9]]))
        tensor(0.3000, dtype=torch.float64)
    """
    check_choice("order", order, ("column", "row"))
    table = read_matrix(matrix, learned_at, initial, nan_policy)
    mask = table.row_index < table.learned  # (rows, tasks)
    table.check(table.cells, mask)
    values = table.cells
    if order == "column":
        values, mask = values.mT, mask.mT
    inner = table.mean(values, mask)
    counts = mask.any(-1).expand(inner.shape)
    if nan_policy == "omit":
        counts = counts & ~inner.isnan()
    return table.mean(inner, counts)


def mtil_scores(
    matrix: Tensor, *, learned_at: LearnedAt = None, initial: Tensor | None = None, nan_policy: NanPolicy = "propagate"
) -> dict[str, Tensor]:
    """The three scores of multi-domain streams (MTIL, X-TAIL), each in [0, 1], higher is better.

    Returns:
        ``"transfer"`` as :func:`transfer_accuracy`, ``"average"`` over all cells given, ``"last"`` over all columns of
        the last row; the initial row is in none of them.

    Example:
        >>> scores = mtil_scores(torch.tensor([[0.9, 0.3], [0.7, 0.8]]))
        >>> {name: round(float(value), 3) for name, value in scores.items()}
        {'transfer': 0.3, 'average': 0.675, 'last': 0.75}
    """
    table = read_matrix(matrix, learned_at, initial, nan_policy)
    every = torch.ones_like(table.seen)
    return {
        "transfer": transfer_accuracy(matrix, learned_at=learned_at, initial=initial, nan_policy=nan_policy),
        "average": table.mean_cells(table.cells, every.expand(table.rows, -1)),
        "last": table.mean(table.final, every) if table.rows else nan_like(table.cells),
    }
