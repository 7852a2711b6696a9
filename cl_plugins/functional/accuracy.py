"""Accuracy of a stream of tasks, from the accuracy matrix.

* ``average_accuracy``: mean over seen tasks of the last row ("last accuracy", A_B);
* ``average_incremental_accuracy``: mean over boundaries of the average accuracy there (iCaRL, A-bar);
* ``accuracy_over_time``: mean over all cells at or after learning (Diaz-Rodriguez et al. 2018);
* ``learning_accuracy``: mean over seen tasks of ``R[l(j), j]`` (Riemer et al. 2019), also ``plasticity``;
* ``stability``: mean over old tasks of the last row.

``ACC = LA + (T-1)/T * BWT`` ties the first, the fourth and backward transfer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._matrix import (
    Average,
    LearnedAt,
    NanPolicy,
    Table,
    as_double,
    check_choice,
    masked_extreme,
    nan_like,
    read_matrix,
)


def accuracy_matrix(correct: Tensor, total: Tensor) -> Tensor:
    """Counts to accuracies.

    Args:
        correct: right predictions ``(..., rows, tasks)``.
        total: test samples, same shape; 0 or less marks a cell that was not measured.

    Returns:
        Accuracy ``(..., rows, tasks)`` float64 in [0, 1], NaN where not measured.

    Example:
        >>> accuracy_matrix(torch.tensor([[9, 0], [7, 8]]), torch.tensor([[10, 0], [10, 10]]))
        tensor([[0.9000,    nan],
                [0.7000, 0.8000]], dtype=torch.float64)
    """
    right, samples = as_double(correct), as_double(total)
    return torch.where(samples > 0, right / samples, torch.nan)


def _row_means(table: Table, rows: Tensor, average: Average) -> Tensor:
    """Mean over the tasks seen at each of ``rows`` ``(..., len(rows))``."""
    check_choice("average", average, ("macro", "micro"))
    values = table.cells[..., rows, :]
    if average == "micro" and table.weights is None:
        return torch.full_like(values[..., 0], torch.nan)
    weights = table.weights[..., rows, :] if average == "micro" and table.weights is not None else None
    return table.mean(values, table.learned[None, :] <= rows[:, None], weights)


def row_accuracy(table: Table, row: int, average: Average = "macro") -> Tensor:
    """Mean over the tasks seen at ``row``; the micro mean without counts is undefined."""
    if table.rows == 0:
        return nan_like(table.cells)
    return _row_means(table, torch.tensor([row % table.rows], device=table.cells.device), average)[..., 0]


def average_accuracy(
    matrix: Tensor,
    *,
    learned_at: LearnedAt = None,
    initial: Tensor | None = None,
    average: Average = "macro",
    n_test: Tensor | None = None,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Mean over seen tasks of the last row.

    Args:
        matrix: accuracy ``(..., rows, tasks)`` in [0, 1], NaN where not measured.
        learned_at: row at which each column was learned, None or -1 for never; None for column j at row j.
        initial: accuracy before any training; not read here.
        average: ``"macro"`` weights tasks equally, ``"micro"`` by their test samples.
        n_test: test samples ``(tasks,)`` or ``(..., rows, tasks)``; ``"micro"`` is undefined without them.
        nan_policy: what a cell that is read and missing does: ``"propagate"``, ``"omit"`` or ``"raise"``.

    Returns:
        ``(...)`` float64 in [0, 1], higher is better; NaN when nothing was seen.

    Example:
        >>> average_accuracy(torch.tensor([[0.9, 0.3], [0.7, 0.8]]))
        tensor(0.7500, dtype=torch.float64)
    """
    return row_accuracy(read_matrix(matrix, learned_at, initial, nan_policy, n_test), -1, average)


def _counted_rows(table: Table, every_row: bool) -> Tensor:
    """The boundaries, or all rows from the first of them on."""
    if not every_row or not len(table.boundaries):
        return table.boundaries
    return torch.arange(int(table.boundaries[0]), table.rows, device=table.cells.device)


def accuracy_curve(
    matrix: Tensor,
    *,
    learned_at: LearnedAt = None,
    initial: Tensor | None = None,
    average: Average = "macro",
    n_test: Tensor | None = None,
    nan_policy: NanPolicy = "propagate",
    every_row: bool = False,
) -> Tensor:
    """Average accuracy at each boundary ``(..., boundaries)``. Arguments as for :func:`average_accuracy`.

    With ``every_row`` rows from the first boundary on count even when nothing was learned at them, as in streams that
    are tested on one set after each task.

    Example:
        >>> accuracy_curve(torch.tensor([[0.9, 0.3], [0.7, 0.8]]))
        tensor([0.9000, 0.7500], dtype=torch.float64)
    """
    table = read_matrix(matrix, learned_at, initial, nan_policy, n_test)
    return _row_means(table, _counted_rows(table, every_row), average)


def average_incremental_accuracy(
    matrix: Tensor,
    *,
    learned_at: LearnedAt = None,
    initial: Tensor | None = None,
    average: Average = "macro",
    n_test: Tensor | None = None,
    nan_policy: NanPolicy = "propagate",
    every_row: bool = False,
) -> Tensor:
    """Mean over boundaries of the average accuracy there, in [0, 1], higher is better.

    Arguments as for :func:`average_accuracy`. The class-incremental literature mostly uses ``average="micro"``; the two
    agree when every task has equally many test samples. ``every_row`` as for :func:`accuracy_curve`.

    Example:
        >>> average_incremental_accuracy(torch.tensor([[0.9, 0.3], [0.7, 0.8]]))
        tensor(0.8250, dtype=torch.float64)
    """
    table = read_matrix(matrix, learned_at, initial, nan_policy, n_test)
    rows = _counted_rows(table, every_row)
    return table.mean(_row_means(table, rows, average), torch.ones_like(rows, dtype=torch.bool))


def accuracy_over_time(
    matrix: Tensor, *, learned_at: LearnedAt = None, initial: Tensor | None = None, nan_policy: NanPolicy = "propagate"
) -> Tensor:
    """Mean over all cells at boundaries whose task is seen, in [0, 1], higher is better.

    Weights late rows more than :func:`average_incremental_accuracy` does. Arguments as for :func:`average_accuracy`.

    Example:
        >>> accuracy_over_time(torch.tensor([[0.9, 0.3], [0.7, 0.8]]))
        tensor(0.8000, dtype=torch.float64)
    """
    table = read_matrix(matrix, learned_at, initial, nan_policy)
    return table.mean_cells(table.cells, table.at_boundary & (table.learned <= table.row_index))


def learning_accuracy(
    matrix: Tensor, *, learned_at: LearnedAt = None, initial: Tensor | None = None, nan_policy: NanPolicy = "propagate"
) -> Tensor:
    """Mean over seen tasks of the accuracy right after learning, in [0, 1], higher is better.

    Arguments as for :func:`average_accuracy`.

    Example:
        >>> learning_accuracy(torch.tensor([[0.9, 0.3], [0.7, 0.8]]))
        tensor(0.8500, dtype=torch.float64)
    """
    table = read_matrix(matrix, learned_at, initial, nan_policy)
    return table.mean(table.diagonal, table.seen)


def plasticity(
    matrix: Tensor, *, learned_at: LearnedAt = None, initial: Tensor | None = None, nan_policy: NanPolicy = "propagate"
) -> Tensor:
    """The same as :func:`learning_accuracy`, under the name that goes with :func:`stability`.

    Example:
        >>> plasticity(torch.tensor([[0.9, 0.3], [0.7, 0.8]]))
        tensor(0.8500, dtype=torch.float64)
    """
    return learning_accuracy(matrix, learned_at=learned_at, initial=initial, nan_policy=nan_policy)


def worst_task_accuracy(
    matrix: Tensor, *, learned_at: LearnedAt = None, initial: Tensor | None = None, nan_policy: NanPolicy = "propagate"
) -> Tensor:
    """Smallest entry of the last row over seen tasks, in [0, 1], higher is better.

    Arguments as for :func:`average_accuracy`.

    Example:
        >>> worst_task_accuracy(torch.tensor([[0.9, 0.3], [0.7, 0.8]]))
        tensor(0.7000, dtype=torch.float64)
    """
    table = read_matrix(matrix, learned_at, initial, nan_policy)
    if table.rows == 0:
        return nan_like(table.cells)
    return masked_extreme(table.final, table.seen, nan_policy, largest=False)


def stability(
    matrix: Tensor, *, learned_at: LearnedAt = None, initial: Tensor | None = None, nan_policy: NanPolicy = "propagate"
) -> Tensor:
    """Mean over old tasks of the last row, in [0, 1], higher is better; NaN with one task.

    Arguments as for :func:`average_accuracy`.

    Example:
        >>> stability(torch.tensor([[0.9, 0.3], [0.7, 0.8]]))
        tensor(0.7000, dtype=torch.float64)
    """
    table = read_matrix(matrix, learned_at, initial, nan_policy)
    return table.mean(table.final, table.old) if table.rows else nan_like(table.cells)


def stability_plasticity(
    matrix: Tensor, *, learned_at: LearnedAt = None, initial: Tensor | None = None, nan_policy: NanPolicy = "propagate"
) -> Tensor:
    """Harmonic mean of :func:`stability` and :func:`plasticity`, 0 when both are 0; NaN with one task.

    Example:
        >>> stability_plasticity(torch.tensor([[0.9, 0.3], [0.7, 0.8]]))
        tensor(0.7677, dtype=torch.float64)
    """
    old = stability(matrix, learned_at=learned_at, initial=initial, nan_policy=nan_policy)
    new = plasticity(matrix, learned_at=learned_at, initial=initial, nan_policy=nan_policy)
    return harmonic_mean(old, new)


def harmonic_mean(first: Tensor, second: Tensor) -> Tensor:
    """``2ab/(a+b)``, 0 when both are 0."""
    total = first + second
    return torch.where(total == 0, 0.0, 2 * first * second / total)
