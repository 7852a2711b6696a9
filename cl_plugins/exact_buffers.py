"""Sums that keep their precision when the model around them is converted to another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """A module whose own buffers move between devices but keep their dtype and values.

    ``Trainer(precision="bf16-true")`` and ``module.half()`` convert every buffer; sums over a whole stream would lose
    all but their first digits.

    Example:
        >>> import torch
        >>> sums = ExactBuffers()
        >>> sums.register_buffer("total", torch.full((1,), 1.0001, dtype=torch.float64))
        >>> sums.bfloat16().total.item()
        1.0001
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for name, buffer in before.items():
            now = self._buffers[name]
            if now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self
