"""What one process must know of the others."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def of_all_processes(value: T) -> list[T]:
    """Every process's value, by rank; a single process's own alone. All processes must call it, on CPU values."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found
