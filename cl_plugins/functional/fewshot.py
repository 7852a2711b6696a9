"""Measures of few-shot class-incremental learning: a large base session, then small ones; means are over samples."""

from __future__ import annotations

from torch import Tensor

from ._matrix import LearnedAt, NanPolicy, nan_like, read_matrix
from .accuracy import harmonic_mean, row_accuracy


def performance_drop(
    matrix: Tensor,
    n_test: Tensor | None = None,
    *,
    learned_at: LearnedAt = None,
    initial: Tensor | None = None,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Accuracy over all samples seen, after the base session minus after the last one (PD).

    Args:
        matrix: accuracy ``(..., rows, tasks)`` in [0, 1], NaN where not measured.
        n_test: test samples ``(tasks,)`` or ``(..., rows, tasks)``; undefined without them.
        learned_at: row at which each column was learned, None or -1 for never; None for column j at row j.
        initial: accuracy before any training; not read here.
        nan_policy: what a cell that is read and missing does: ``"propagate"``, ``"omit"`` or ``"raise"``.

    Returns:
        ``(...)`` float64 in [-1, 1], lower is better.

    Example:
        >>> import torch
        >>> performance_drop(torch.tensor([[0.9, 0.3], [0.7, 0.8]]), torch.tensor([300, 100]))
        tensor(0.1750, dtype=torch.float64)
    """
    table = read_matrix(matrix, learned_at, initial, nan_policy, n_test)
    if len(table.boundaries) == 0:
        return nan_like(table.cells)
    return row_accuracy(table, int(table.boundaries[0]), "micro") - row_accuracy(table, -1, "micro")


def harmonic_accuracy(
    matrix: Tensor,
    n_test: Tensor | None = None,
    *,
    learned_at: LearnedAt = None,
    initial: Tensor | None = None,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Harmonic mean of final accuracy on the base session's tasks and on all later ones; 0 when both are 0.

    Arguments as for :func:`performance_drop`; NaN with one session.

    Example:
        >>> import torch
        >>> harmonic_accuracy(torch.tensor([[0.9, 0.3], [0.7, 0.8]]), torch.tensor([300, 100]))
        tensor(0.7467, dtype=torch.float64)
    """
    table = read_matrix(matrix, learned_at, initial, nan_policy, n_test)
    if len(table.boundaries) == 0 or table.weights is None:
        return nan_like(table.cells)
    base = table.learned == table.boundaries[0]
    weights = table.weights[..., -1, :]
    return harmonic_mean(table.mean(table.final, base, weights), table.mean(table.final, table.seen & ~base, weights))
