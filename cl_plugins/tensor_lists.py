"""Operations on lists of tensors in a few multi-tensor calls, without reading anything back from an accelerator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_CHUNK = 1 << 22
"""Elements that temporaries of a step may hold at once, unless one tensor alone is larger."""

_HALF = (torch.bfloat16, torch.float16)

_SCALAR_LISTS = hasattr(torch.ops.aten._foreach_lerp_, "ScalarList")


def chunks(tensors: Sequence[Tensor], limit: int = _CHUNK) -> Iterator[slice]:
    """Consecutive slices of one dtype and device whose sizes sum to at most ``limit``; a larger tensor stands alone.

    Example:
        >>> list(chunks([torch.zeros(n) for n in (3, 3, 9, 1)], limit=6))
        [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None)]
    """
    start, held = 0, 0
    for i, tensor in enumerate(tensors):
        other = (tensor.dtype, tensor.device) != (tensors[start].dtype, tensors[start].device)
        if i > start and (other or held + tensor.numel() > limit):
            yield slice(start, i)
            start, held = i, 0
        held += tensor.numel()
    if start < len(tensors):
        yield slice(start, len(tensors))


def l1_norms(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """L1 norms ``(tensors,)``, summed and given in ``dtype`` whatever that of the tensors, on ``device``."""
    if _one_by_one(tensors, dtype):
        norms = torch.stack([t.abs().sum() for t in tensors])
    else:
        norms = torch.stack(torch._foreach_norm(list(tensors), 1, dtype=dtype))
    return norms.to(device, non_blocking=True)


def l1_distances(
    left: Sequence[Tensor], right: Sequence[Tensor], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """L1 norms ``(tensors,)`` of ``left - right``, like :func:`l1_norms`; both of one dtype and device."""
    if _one_by_one(left, dtype):
        return torch.stack([(a - b).abs_().sum() for a, b in zip(left, right, strict=True)]).to(device)
    return l1_norms(torch._foreach_sub(list(left), list(right)), device, dtype)


def l1_change_(
    old: Sequence[Tensor], new: Sequence[Tensor], device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """L1 norms ``(tensors,)`` of ``old - new``; ``old`` holds a copy of ``new`` afterwards."""
    held = list(old)
    if _one_by_one(held, dtype):
        norms = l1_distances(held, new, device, dtype)
    else:
        torch._foreach_sub_(held, list(new))
        norms = l1_norms(held, device, dtype)
    torch._foreach_copy_(held, list(new))
    return norms


def _one_by_one(tensors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether a loop is quicker: on the CPU a temporary of one tensor stays in the cache, a list of them does not."""
    return dtype == torch.float32 and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)


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

    Args:
        averages: all of one dtype and device.
        weights: of the same.
        alpha: a number, or ``(tensors,)``.
    """
    if not averages:
        return
    # the multi-tensor calls take lists alone
    targets = averages if isinstance(averages, list) else list(averages)
    sources = weights if isinstance(weights, list) else list(weights)
    first = targets[0]
    if first.dtype in _HALF:
        # the released code's two products, whose rounding decides whether such an average moves at all
        per_tensor = alpha if isinstance(alpha, Tensor) else torch.full((len(targets),), alpha)
        for average, weight, a in zip(targets, sources, per_tensor.to(first.device).unbind(), strict=True):
            old = ((1.0 - a) * average.float()).to(first.dtype)
            average.copy_(old + (a * weight.float()).to(first.dtype))
    elif not isinstance(alpha, Tensor):
        torch._foreach_lerp_(targets, sources, alpha)
    elif _SCALAR_LISTS and first.is_cpu and alpha.is_cpu:
        torch._foreach_lerp_(targets, sources, alpha.tolist())
    else:
        torch._foreach_lerp_(targets, sources, list(alpha.to(first.device, first.dtype, non_blocking=True).unbind()))
