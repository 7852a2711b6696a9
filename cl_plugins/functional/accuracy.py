"""Accuracy of a stream, from its accuracy matrix (rows: evaluations, columns: tasks; NaN: not measured).

    ACC   = mean over tasks seen of R[last, j]                            average_accuracy
    AIA   = mean over boundaries i of ACC at i                            average_incremental_accuracy
    A     = mean of all cells with a boundary row and a task seen there   accuracy_over_time (Diaz-Rodriguez et al., 2018)
    LA    = mean over tasks seen of R[l(j), j]                            learning_accuracy (Riemer et al., 2019)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ._matrix import LearnedAt, NanPolicy, at_learning, mark, masked_mean


def _row_accuracy(matrix: Tensor, learned_at: LearnedAt, nan_policy: NanPolicy, weights: Tensor | None) -> Tensor:
    """Accuracy over the tasks seen at each row, ``(..., rows)``."""
    marked = mark(matrix, learned_at)
    if weights is None:
        return masked_mean(marked.values, marked.seen, nan_policy)
    sizes = torch.as_tensor(weights, dtype=torch.float64, device=marked.values.device)
    counted = marked.seen & ~marked.values.isnan() if nan_policy == "omit" else marked.seen
    total = torch.where(counted, marked.values * sizes, torch.zeros_like(marked.values)).sum(-1)
    return total / (counted * sizes).sum(-1)


def average_accuracy(
    matrix: Tensor,
    *,
    learned_at: LearnedAt = None,
    average: Literal["macro", "micro"] = "macro",
    n_test: Tensor | None = None,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Mean over the tasks seen of the accuracy at the last row (ACC, "last", A_B).

    Args:
        matrix: ``(..., rows, tasks)`` in [0, 1].
        learned_at: row at which each task was learned, None in it for never; None for row j and task j.
        average: "macro" weighs tasks equally, "micro" by their number of test samples.
        n_test: test samples ``(tasks,)``, for "micro".
        nan_policy: for a missing cell that counts: "propagate" gives NaN, "omit" leaves it out, "raise" refuses.

    Returns:
        ``(...)`` float64 in [0, 1], higher is better; NaN when nothing was learned.

    Raises:
        ValueError: for faulty arguments.

    Example:
        >>> average_accuracy(torch.tensor([[0.9, 0.0], [0.6, 0.8]]))
        tensor(0.7000, dtype=torch.float64)
    """
    return accuracy_curve(matrix, learned_at=learned_at, average=average, n_test=n_test, nan_policy=nan_policy)[..., -1]


def accuracy_curve(
    matrix: Tensor,
    *,
    learned_at: LearnedAt = None,
    average: Literal["macro", "micro"] = "macro",
    n_test: Tensor | None = None,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """:func:`average_accuracy` at every row, ``(..., rows)``."""
    if average not in ("macro", "micro"):
        raise ValueError(f"`average` must be macro or micro, got {average!r}")
    if average == "micro" and n_test is None:
        raise ValueError("`n_test` must be given for average='micro', got None")
    return _row_accuracy(matrix, learned_at, nan_policy, n_test if average == "micro" else None)


def average_incremental_accuracy(
    matrix: Tensor,
    *,
    learned_at: LearnedAt = None,
    average: Literal["macro", "micro"] = "macro",
    n_test: Tensor | None = None,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Mean over the rows at which a task was learned of the accuracy over the tasks seen there (AIA, iCaRL).

    Args and returns as :func:`average_accuracy`.

    Example:
        >>> average_incremental_accuracy(torch.tensor([[0.9, 0.0], [0.6, 0.8]]))
        tensor(0.8000, dtype=torch.float64)
    """
    curve = accuracy_curve(matrix, learned_at=learned_at, average=average, n_test=n_test, nan_policy=nan_policy)
    return masked_mean(curve, mark(matrix, learned_at).boundary, nan_policy)


def accuracy_over_time(
    matrix: Tensor, *, learned_at: LearnedAt = None, nan_policy: NanPolicy = "propagate"
) -> Tensor:
    """Mean of all cells whose row learned a task and whose task is seen there (A of Diaz-Rodriguez et al., 2018).

    Example:
        >>> accuracy_over_time(torch.tensor([[0.9, 0.0], [0.6, 0.9]]))
        tensor(0.8000, dtype=torch.float64)
    """
    marked = mark(matrix, learned_at)
    return masked_mean(marked.values, marked.seen & marked.boundary[:, None], nan_policy, dim=(-2, -1))


def learning_accuracy(matrix: Tensor, *, learned_at: LearnedAt = None, nan_policy: NanPolicy = "propagate") -> Tensor:
    """Mean over the tasks seen of the accuracy right after learning the task (LA, plasticity).

    Example:
        >>> learning_accuracy(torch.tensor([[0.9, 0.0], [0.6, 0.7]]))
        tensor(0.8000, dtype=torch.float64)
    """
    marked = mark(matrix, learned_at)
    return masked_mean(at_learning(marked), marked.seen[-1], nan_policy)


def worst_task_accuracy(
    matrix: Tensor, *, learned_at: LearnedAt = None, nan_policy: NanPolicy = "propagate"
) -> Tensor:
    """Least accuracy at the last row among the tasks seen.

    Example:
        >>> worst_task_accuracy(torch.tensor([[0.9, 0.0], [0.6, 0.7]]))
        tensor(0.6000, dtype=torch.float64)
    """
    marked = mark(matrix, learned_at)
    masked_mean(marked.values[..., -1, :], marked.seen[-1], nan_policy)  # refuses what the policy refuses
    row, seen = marked.values[..., -1, :], marked.seen[-1]
    missing = seen & row.isnan()
    least = torch.where(seen & ~missing, row, torch.inf).amin(-1)
    undefined = ~(seen & ~missing).any(-1) | (missing.any(-1) if nan_policy != "omit" else False)
    return torch.where(undefined, torch.nan, least)
