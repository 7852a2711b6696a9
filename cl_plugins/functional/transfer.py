"""Forward transfer: what earlier tasks gave to a task before it was learned, and the MTIL numbers.

    FWT                 mean over tasks j after the first of R[prev(j), j] - R_initial[j]     (Lopez-Paz and Ranzato, 2017)
      baseline=False    without subtracting the initial accuracy
      scheme="triangle" mean of all cells before learning                                     (Diaz-Rodriguez et al., 2018)
    transfer            mean over tasks of the mean over rows before learning                 (ZSCL's MTIL)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ._matrix import NEVER, LearnedAt, NanPolicy, mark, masked_mean


def forward_transfer(
    matrix: Tensor,
    *,
    initial: Tensor | None = None,
    learned_at: LearnedAt = None,
    scheme: Literal["previous", "triangle"] = "previous",
    baseline: bool = True,
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Accuracy on tasks just before they are learned, above that of the untrained model.

    Args:
        matrix: ``(..., rows, tasks)`` in [0, 1]; the cells before learning must be measured.
        initial: accuracy ``(..., tasks)`` before any training.
        learned_at: row at which each task was learned; None for row j and task j.
        scheme: "previous" reads the last boundary before learning, "triangle" all rows before learning.
        baseline: subtract ``initial``; for "previous" alone.
        nan_policy: for a missing cell that counts: "propagate", "omit" or "raise".

    Returns:
        ``(...)`` float64 in [-1, 1], higher is better; NaN with a single task, and without ``initial`` where it is needed.

    Example:
        >>> matrix = torch.tensor([[0.9, 0.3], [0.6, 0.8]])
        >>> forward_transfer(matrix, initial=torch.tensor([0.1, 0.2]))
        tensor(0.1000, dtype=torch.float64)
    """
    if scheme not in ("previous", "triangle"):
        raise ValueError(f"`scheme` must be previous or triangle, got {scheme!r}")
    marked = mark(matrix, learned_at)
    rows = marked.values.shape[-2]
    index = torch.arange(rows, device=marked.values.device)[:, None]
    reached = marked.learned < rows
    if scheme == "triangle":
        before = (index < marked.learned) & reached & marked.boundary[:, None]
        return masked_mean(marked.values, before, nan_policy, dim=(-2, -1))
    previous = torch.where(marked.boundary[:, None] & (index < marked.learned), index, -1).amax(0)
    counted = reached & (previous >= 0) & (marked.learned < NEVER)
    at = previous.clamp_min(0).expand(*marked.values.shape[:-2], 1, -1)
    term = marked.values.gather(-2, at)[..., 0, :]
    if baseline:
        if initial is None:
            return torch.full(marked.values.shape[:-2], torch.nan, dtype=torch.float64, device=term.device)
        term = term - torch.as_tensor(initial, dtype=torch.float64, device=term.device)
    return masked_mean(term, counted, nan_policy)


def transfer_accuracy(
    matrix: Tensor,
    *,
    learned_at: LearnedAt = None,
    order: Literal["column", "row"] = "column",
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """Accuracy on tasks that are not learned yet, the initial row not counted (MTIL and X-TAIL "Transfer").

    Args:
        matrix: ``(..., rows, tasks)`` in [0, 1].
        learned_at: row at which each task was learned; None for row j and task j.
        order: "column" averages a task's rows first, as ZSCL does, "row" a row's tasks first.
        nan_policy: for a missing cell that counts: "propagate", "omit" or "raise".

    Returns:
        ``(...)`` float64 in [0, 1], higher is better; NaN with a single task.

    Example:
        >>> transfer_accuracy(torch.tensor([[0.9, 0.3, 0.2], [0.7, 0.8, 0.4], [0.6, 0.7, 0.9]]))
        tensor(0.3000, dtype=torch.float64)
    """
    if order not in ("column", "row"):
        raise ValueError(f"`order` must be column or row, got {order!r}")
    marked = mark(matrix, learned_at)
    before = ~marked.seen
    dim = -2 if order == "column" else -1
    means = masked_mean(marked.values, before, nan_policy, dim=dim)
    return masked_mean(means, before.any(dim), nan_policy)
