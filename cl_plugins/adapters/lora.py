"""Low-rank adaptation of linear layers, one adapter for all tasks: the baseline that forgets.

"LoRA: Low-Rank Adaptation of Large Language Models", Edward J. Hu, Yelong Shen, Phillip Wallis, Zeyuan Allen-Zhu,
Yuanzhi Li, Shean Wang, Lu Wang and Weizhu Chen, ICLR 2022, arXiv 2106.09685. Implemented: the adapter with dropout,
split or fused query, key and value, and merging. Not implemented: an adapter per task.

Formula::

    y = W x + b + `scaling` B A x        A: `down` (rank, in), B: `up` (rank, out) transposed, zeros at first
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cl_plugins.adapters.delta import LinearDelta


class LowRank(LinearDelta):
    """Adds a product of two thin matrices to a linear layer.

    Args:
        in_features: width of the layer's input.
        out_features: width of one part of its output.
        rank: inner width.
        scaling: factor of the product.
        dropout: on its input.
        parts: parts of the output that have an adapter of their own, see :class:`LinearDelta`.
        of: number of parts of the output.
        generator: draws ``down``, uniform as for MoRA's keys; a fixed seed when None.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for a rank below 1 or a dropout outside [0, 1).

    Example:
        >>> LowRank(8, 4, rank=2)(torch.ones(3, 8)).abs().sum().item()
        0.0
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 16,
        *,
        scaling: float = 1.0,
        dropout: float = 0.0,
        parts: tuple[int, ...] = (0,),
        of: int = 1,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, parts=parts, of=of)
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"`rank` must be an integer of 1 or more, got {rank!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {dropout!r}")
        self.rank, self.scaling, self.dropout = rank, scaling, dropout
        bound = 1 / math.sqrt(in_features)
        generator = generator or torch.Generator().manual_seed(0)
        down = torch.empty(self.groups, rank, in_features).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down.to(device=device, dtype=dtype))
        self.up = nn.Parameter(torch.zeros(self.groups, rank, out_features, device=device, dtype=dtype))

    def refusal(self, state: Mapping[str, Tensor]) -> str | None:
        """Why a saved state cannot be loaded into this adapter; None when it can."""
        down = state.get("down")
        if down is not None and down.ndim == 3 and down.shape[1] != self.rank:
            return f"its rank is {down.shape[1]}, here `rank` is {self.rank}"
        return super().refusal(state)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., groups * out_features)`` for ``(..., in_features)``."""
        dtype = self.compute_dtype(x, self.down)
        tokens = nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x
        with torch.autocast(x.device.type, enabled=False):
            down, up = self.down.to(dtype), self.up.to(dtype)
            z = tokens.to(dtype) @ down.flatten(0, 1).T * self.scaling
            if self.groups == 1:
                return z @ up[0]
            return torch.cat([part @ u for part, u in zip(z.chunk(self.groups, -1), up, strict=True)], -1)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """What to add to the layer's weight for the same function without the adapter, ``(groups * out, in)``."""
        return (self.up.transpose(1, 2) @ self.down).flatten(0, 1) * self.scaling
