"""Measures that compare the stream with models trained another way.

* ``plasticity_gain``: ``R[l(j), j] - independent_j``, against a model for that task alone;
* ``intransigence``: ``joint_upto_j - R[l(j), j]``, against joint training on the tasks so far (Chaudhry et al. 2018);
* ``forgetting_ratio``: 0 as good as joint training, -1 as bad as guessing (Serra et al. 2018, HAT);
* ``normalized_accuracy``: ``R[last, j] / joint_j``.

Without the reference the result is NaN.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ._matrix import LearnedAt, NanPolicy, check_choice, nan_like, read_matrix


def plasticity_gain(
    matrix: Tensor,
    independent: Tensor | None = None,
    *,
    learned_at: LearnedAt = None,
    initial: Tensor | None = None,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Accuracy right after learning minus that of a model trained on the task alone, over tasks after the first.

    Some publications call this forward transfer.

    Args:
        matrix: accuracy ``(..., rows, tasks)`` in [0, 1], NaN where not measured.
        independent: accuracy of a model for each task alone ``(..., tasks)``.
        learned_at: row at which each column was learned, None or -1 for never; None for column j at row j.
        initial: accuracy before any training; not read here.
        nan_policy: what a cell that is read and missing does: ``"propagate"``, ``"omit"`` or ``"raise"``.

    Returns:
        ``(...)`` float64 in [-1, 1], higher is better; NaN with one task or without the reference.

    Example:
        >>> import torch
        >>> plasticity_gain(torch.tensor([[0.9, 0.3], [0.7, 0.8]]), torch.tensor([0.9, 0.75]))
        tensor(0.0500, dtype=torch.float64)
    """
    table = read_matrix(matrix, learned_at, initial, nan_policy)
    reference = table.reference("independent", independent)
    if reference is None:
        return nan_like(table.cells)
    return table.mean(table.diagonal - reference, table.previous >= 0)


def intransigence(
    matrix: Tensor,
    joint_upto: Tensor | None = None,
    *,
    learned_at: LearnedAt = None,
    initial: Tensor | None = None,
    reduction: Literal["mean", "last"] = "mean",
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """What the stream failed to learn: joint training on the tasks so far minus accuracy right after learning.

    Args:
        matrix: accuracy ``(..., rows, tasks)`` in [0, 1], NaN where not measured.
        joint_upto: accuracy on task j of a model trained jointly on all tasks up to j ``(..., tasks)``.
        learned_at: row at which each column was learned, None or -1 for never; None for column j at row j.
        initial: accuracy before any training; not read here.
        reduction: ``"mean"`` over seen tasks, or the task learned ``"last"`` as in the paper.
        nan_policy: what a cell that is read and missing does: ``"propagate"``, ``"omit"`` or ``"raise"``.

    Returns:
        ``(...)`` float64 in [-1, 1], lower is better; NaN without the reference.

    Example:
        >>> import torch
        >>> intransigence(torch.tensor([[0.9, 0.3], [0.7, 0.8]]), torch.tensor([0.9, 0.9]))
        tensor(0.0500, dtype=torch.float64)
    """
    check_choice("reduction", reduction, ("mean", "last"))
    table = read_matrix(matrix, learned_at, initial, nan_policy)
    reference = table.reference("joint_upto", joint_upto)
    if reference is None or len(table.boundaries) == 0:
        return nan_like(table.cells)
    counts = table.seen if reduction == "mean" else table.learned == table.boundaries[-1]
    return table.mean(reference - table.diagonal, counts)


def forgetting_ratio(
    matrix: Tensor,
    joint: Tensor | None = None,
    random: Tensor | None = None,
    *,
    learned_at: LearnedAt = None,
    initial: Tensor | None = None,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Where the final accuracy lies between guessing (-1) and joint training (0).

    Args:
        matrix: accuracy ``(..., rows, tasks)`` in [0, 1], NaN where not measured.
        joint: accuracy of a model trained on all tasks at once ``(..., tasks)``.
        random: accuracy of guessing ``(..., tasks)``; tasks where it equals ``joint`` are left out.
        learned_at: row at which each column was learned, None or -1 for never; None for column j at row j.
        initial: accuracy before any training; not read here.
        nan_policy: what a cell that is read and missing does: ``"propagate"``, ``"omit"`` or ``"raise"``.

    Returns:
        ``(...)`` float64, usually in [-1, 0], higher is better; NaN without the references.

    Example:
        >>> import torch
        >>> forgetting_ratio(torch.tensor([[0.9, 0.3], [0.7, 0.8]]), torch.tensor([0.9, 0.9]), torch.tensor([0.1, 0.1]))
        tensor(-0.1875, dtype=torch.float64)
    """
    table = read_matrix(matrix, learned_at, initial, nan_policy)
    top, floor = table.reference("joint", joint), table.reference("random", random)
    if top is None or floor is None or table.rows == 0:
        return nan_like(table.cells)
    return table.mean((table.final - floor) / (top - floor), table.seen & (top != floor)) - 1.0


def normalized_accuracy(
    matrix: Tensor,
    joint: Tensor | None = None,
    *,
    learned_at: LearnedAt = None,
    initial: Tensor | None = None,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Final accuracy as a share of joint training's, over seen tasks; tasks with a joint accuracy of 0 are left out.

    Args:
        matrix: accuracy ``(..., rows, tasks)`` in [0, 1], NaN where not measured.
        joint: accuracy of a model trained on all tasks at once ``(..., tasks)``.
        learned_at: row at which each column was learned, None or -1 for never; None for column j at row j.
        initial: accuracy before any training; not read here.
        nan_policy: what a cell that is read and missing does: ``"propagate"``, ``"omit"`` or ``"raise"``.

    Returns:
        ``(...)`` float64, at least 0, higher is better; NaN without the reference.

    Example:
        >>> import torch
        >>> normalized_accuracy(torch.tensor([[0.9, 0.3], [0.7, 0.8]]), torch.tensor([0.875, 0.8]))
        tensor(0.9000, dtype=torch.float64)
    """
    table = read_matrix(matrix, learned_at, initial, nan_policy)
    top = table.reference("joint", joint)
    if top is None or table.rows == 0:
        return nan_like(table.cells)
    return table.mean(table.final / top, table.seen & (top != 0))
