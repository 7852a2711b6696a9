"""What low-rank adapters share: they add something to the output of a linear layer and leave the layer as it is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class LinearDelta(nn.Module):
    """Base of adapters that add a function of a layer's input to the layer's output.

    A layer that computes several projections at once (query, key and value) can get one independent part for each.

    Args:
        in_features: width of the layer's input.
        out_features: width of one part of the output.
        parts: indices of the output's parts that get something added, ascending.
        of: number of equal parts that the output consists of.

    Raises:
        ValueError: for parts that do not exist.
    """

    def __init__(self, in_features: int, out_features: int, *, parts: tuple[int, ...] = (0,), of: int = 1) -> None:
        super().__init__()
        if not parts or sorted(set(parts)) != list(parts) or not 0 <= parts[0] <= parts[-1] < of:
            raise ValueError(f"`parts` must be ascending indices below {of}, got {parts!r}")
        self.in_features = in_features
        self.out_features = out_features
        self.parts = parts
        self.of = of

    @property
    def groups(self) -> int:
        """Independent adapters in this module, one per part."""
        return len(self.parts)

    @property
    def active(self) -> bool:
        """Whether there is anything to add."""
        return True

    def compute_dtype(self, x: Tensor, weight: Tensor) -> torch.dtype:
        """Dtype of the products: autocast's where it is on, else that of the adapter's weights."""
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype

    def refusal(self, state: Mapping[str, Tensor]) -> str | None:
        """Why a saved state cannot be loaded into this adapter; None when it can."""
        for name, own in self.named_parameters():
            if name not in state:
                return f"it lacks `{name}`"
            if state[name].shape != own.shape:
                return f"its `{name}` has shape {tuple(state[name].shape)}, here it is {tuple(own.shape)}"
        return None

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """``(..., groups * out_features)`` for an input ``(..., in_features)``."""

    def add_to(self, output: Tensor, delta: Tensor) -> Tensor:
        """``output`` plus ``delta`` in the parts that have an adapter."""
        delta = delta.to(output.dtype)
        if self.groups < self.of:
            pieces = list(delta.chunk(self.groups, -1))
            zeros = torch.zeros_like(pieces[0])
            delta = torch.cat([pieces.pop(0) if part in self.parts else zeros for part in range(self.of)], -1)
        return output + delta

    def hook(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Forward hook of the layer; a bound method, so that a copy of the model calls the copy of the adapter."""
        if not self.active:
            return output
        return self.add_to(output, self(args[0] if args else kwargs["input"]))


def adapter_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of an adapter's parameters: float32 beside half-precision or quantized weights, for small steps."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32
