"""The notation of all matrix metrics: which cells of an accuracy matrix count as learned, seen and old.

``matrix[..., i, j]`` is the accuracy on task j at evaluation i, NaN where not measured; ``learned_at[j]`` is the row at which
task j was learned. Leading dimensions (seeds, say) are independent matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

NanPolicy = Literal["propagate", "omit", "raise"]
LearnedAt = Sequence[int | None] | Tensor | None
NEVER = 1 << 30


class Marked(NamedTuple):
    """A matrix with the masks that the definitions use.

    Attributes:
        values: ``(..., rows, tasks)`` float64.
        learned: ``(tasks,)`` int64 row at which a task was learned, :data:`NEVER` for none.
        seen: ``(rows, tasks)`` bool, learned at this row or before.
        old: ``(rows, tasks)`` bool, learned before this row.
        boundary: ``(rows,)`` bool, a task was learned at this row.
    """

    values: Tensor
    learned: Tensor
    seen: Tensor
    old: Tensor
    boundary: Tensor


def mark(matrix: Tensor, learned_at: LearnedAt = None) -> Marked:
    """Check a matrix and lay out its masks.

    Raises:
        ValueError: for a matrix that is not 2-D or more, or a ``learned_at`` of another length or below 0.
    """
    values = torch.as_tensor(matrix).to(torch.float64)
    if values.ndim < 2:
        raise ValueError(f"`matrix` must have shape (..., rows, tasks), got {tuple(values.shape)}")
    rows, tasks = values.shape[-2:]
    if learned_at is None:
        learned = torch.arange(tasks)
    else:
        plain = learned_at.tolist() if isinstance(learned_at, Tensor) else list(learned_at)
        if len(plain) != tasks:
            raise ValueError(f"`learned_at` must hold a row for each of {tasks} tasks, got {len(plain)} entries")
        if any(v is not None and v < 0 for v in plain):
            raise ValueError(f"`learned_at` must hold rows of 0 or more, or None, got {plain!r}")
        learned = torch.tensor([NEVER if v is None else int(v) for v in plain], dtype=torch.int64)
    learned = learned.to(values.device)
    index = torch.arange(rows, device=values.device)[:, None]
    seen, old = learned <= index, learned < index
    boundary = (learned == index).any(1)
    return Marked(values, learned, seen, old, boundary)


def masked_mean(values: Tensor, mask: Tensor, nan_policy: NanPolicy, dim: int | tuple[int, ...] = -1) -> Tensor:
    """Mean of the cells in ``mask``; NaN when it is empty.

    Raises:
        ValueError: for a missing cell with ``nan_policy="raise"``, and for an unknown policy.
    """
    if nan_policy not in ("propagate", "omit", "raise"):
        raise ValueError(f"`nan_policy` must be propagate, omit or raise, got {nan_policy!r}")
    mask = mask.expand_as(values)
    missing = mask & values.isnan()
    if nan_policy == "raise" and bool(missing.any()):
        raise ValueError(
            f"`matrix` must have every cell that the metric reads, got {int(missing.sum())} missing;"
            " use nan_policy='omit' to leave them out"
        )
    counted = mask & ~missing if nan_policy == "omit" else mask
    total = torch.where(counted, values, torch.zeros_like(values)).sum(dim)
    return total / counted.sum(dim)  # 0 / 0 is NaN: undefined


def masked_max(values: Tensor, mask: Tensor, nan_policy: NanPolicy, dim: int) -> Tensor:
    """Maximum of the cells in ``mask`` along ``dim``; NaN when there is none, or one is missing and counts."""
    mask = mask.expand_as(values)
    missing = mask & values.isnan()
    usable = mask & ~missing
    peak = torch.where(usable, values, torch.full_like(values, -torch.inf)).amax(dim)
    undefined = ~usable.any(dim) | (missing.any(dim) if nan_policy != "omit" else False)
    return torch.where(undefined, torch.nan, peak)


def at_learning(marked: Marked) -> Tensor:
    """Accuracy of each task at the row at which it was learned, ``(..., tasks)``; NaN for tasks never learned."""
    rows = marked.values.shape[-2]
    reached = marked.learned < rows
    index = marked.learned.clamp(max=rows - 1).expand(*marked.values.shape[:-2], 1, -1)
    taken = marked.values.gather(-2, index)[..., 0, :]
    return torch.where(reached, taken, torch.nan)
