"""Operations on lists of tensors in a few multi-tensor calls, without reading anything back from an accelerator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_CHUNK = 1 << 22
"""Elements that temporaries of a step may hold at once, unless one tensor alone is larger."""


def chunks(sizes: Sequence[int], limit: int = _CHUNK) -> Iterator[slice]:
    """Consecutive slices whose sizes sum to at most ``limit``; a larger single item gets its own slice.

    Example:
        >>> list(chunks([3, 3, 9, 1], limit=6))
        [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]
    """
    start, held = 0, 0
    for i, size in enumerate(sizes):
        if i > start and held + size > limit:
            yield slice(start, i)
            start, held = i, 0
        held += size
    if start < len(sizes):
        yield slice(start, len(sizes))


def l1_norms(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """L1 norms ``(tensors,)``, summed and given in ``dtype`` whatever that of the tensors, on ``device``."""
    norms = torch._foreach_norm(list(tensors), 1, dtype=dtype)
    return torch.stack([n.to(device, non_blocking=True) for n in norms])


def cast_like(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors themselves where dtype and device already are those of ``like``, else one copied list."""
    if all(t.dtype == o.dtype and t.device == o.device for t, o in zip(tensors, like, strict=True)):
        return list(tensors)
    copies = [torch.empty_like(o) for o in like]
    torch._foreach_copy_(copies, list(tensors))
    return copies


def interpolate_(averages: Sequence[Tensor], weights: Sequence[Tensor], alpha: Tensor | float) -> None:
    """``E <- E + alpha (theta - E)`` in place, one ``alpha`` for all or one per tensor.

    On an accelerator the weights stay on the device. On the CPU they are read, which waits for nothing there and lets
    the kernel be the one of a plain moving average.
    """
    targets, sources = list(averages), list(weights)
    if any(t.dtype in (torch.bfloat16, torch.float16) for t in targets):
        # the released code's two products, whose rounding decides whether such an average moves at all
        per_tensor = alpha if isinstance(alpha, Tensor) else torch.full((len(targets),), alpha)
        for average, weight, a in zip(targets, sources, per_tensor.unbind(), strict=True):
            a = a.to(average.device)
            old = ((1.0 - a) * average.float()).to(average.dtype)
            average.copy_(old + (a * weight.float()).to(average.dtype))
    elif not isinstance(alpha, Tensor):
        torch._foreach_lerp_(targets, sources, alpha)
    elif alpha.device.type == "cpu" and all(t.device.type == "cpu" for t in targets):
        for average, weight, a in zip(targets, sources, alpha.tolist(), strict=True):
            average.lerp_(weight, a)
    else:
        torch._foreach_lerp_(
            targets,
            sources,
            [a.to(t.device, t.dtype, non_blocking=True) for a, t in zip(alpha.unbind(), targets, strict=True)],
        )
