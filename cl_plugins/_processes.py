"""What one process must know of the others."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

T = TypeVar("T")


def of_all_processes(value: T) -> list[T]:
    """Every process's value, by rank; a single process's own alone. All processes must call it, on CPU values."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def gather_rows(rows: Tensor, dealt: bool = False) -> Tensor:
    """The rows of all processes, the same on each; a single process gets its own back.

    Args:
        rows: ``(rows, ...)``; the number of rows may differ between processes, and one without any need not know the
            other sizes.
        dealt: the samples were dealt out in turn, as a ``DistributedSampler`` does, and come back in the order in which
            one process would have seen them; otherwise in order of rank.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return rows
    shape = torch.tensor(rows.shape, device=rows.device)
    shapes = [torch.zeros_like(shape) for _ in range(dist.get_world_size())]
    dist.all_gather(shapes, shape)
    counts, *widths = zip(*torch.stack(shapes).tolist(), strict=True)
    if not len(rows):
        rows = rows.new_zeros(0, *map(max, widths))
    widest = pad(rows, (0, 0) * (rows.ndim - 1) + (0, max(counts) - len(rows))).contiguous()
    parts = [torch.empty_like(widest) for _ in counts]
    dist.all_gather(parts, widest)
    if not dealt:
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])
    real = torch.arange(len(widest), device=rows.device)[:, None] < torch.tensor(counts, device=rows.device)
    return torch.stack(parts, 1)[real]
