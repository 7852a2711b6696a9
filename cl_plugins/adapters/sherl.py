"""SHERL: merge shallow taps with little redundancy, then let the last frozen blocks finish the work.

"SHERL: Synthesizing High Accuracy and Efficient Memory for Resource-Limited Transfer Learning", Haiwen Diao, Bo Wan, Xu
Jia, Yunzhi Zhuge, Ying Zhang, Huchuan Lu, Long Chen, ECCV 2024, arXiv 2407.07523. Implemented: the consolidation of
taps with its published variants, and the late route through the last blocks of a vision transformer or of a text tower
of open_clip. Not implemented: encoder-decoder and convolutional hosts.

Formula per token, for projected taps ``z_1 ... z_{K-1}`` and the guide ``g = z_K`` (:class:`Consolidator`)::

    R_j = sum_k relu(cos(z_j, z_k));   q_j = relu(v . (z_j * g) + b) / R_j;   a_j = q_j / (sum |q| + eps)
    out = E relu(sum_j a_j z_j + g) + tanh(alpha / T) h_last
    feature = pool(norm(last `late` blocks(out)))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from cl_plugins._text import did_you_mean
from cl_plugins.backbones import Backbone
from cl_plugins.side_network import SideNetwork, TapRecord
from cl_plugins.tokens import run_late

Variant = Literal["gated", "norm", "mlp"]


def redundancy(taps: Tensor, eps: float = 1e-6) -> Tensor:
    """How much each tap repeats the others: the sum of its positive cosines with all, itself included.

    Args:
        taps: ``(taps, ..., width)``.
        eps: added to each norm.

    Returns:
        ``(taps, ...)``, 1 or more.
    """
    unit = taps / (taps.norm(dim=-1, keepdim=True) + eps)
    return torch.einsum("j...w,k...w->jk...", unit, unit).relu().sum(1)


def consolidate(taps: Tensor, scores: Tensor, eps: float = 1e-6) -> Tensor:
    """Merge taps ``(taps, ..., width)`` with weights that fall with their redundancy.

    Args:
        taps: the shallow taps.
        scores: ``(taps, ...)``, how well each tap agrees with the guide.
        eps: keeps the sum of the weights off 0.

    Returns:
        ``(..., width)``.

    Example:
        >>> z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> consolidate(z, torch.ones(3)).round(decimals=3)
        tensor([0.5000, 0.5000])
    """
    weights = scores.relu() / redundancy(taps, eps)
    weights = weights / (weights.abs().sum(0, keepdim=True) + eps)
    return torch.einsum("j...,j...w->...w", weights, taps)


class GatedDown(nn.Module):
    """``u = relu(A h);  z = (B u + u) sigmoid(C u)``: the default projection of a tap."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, tap: Tensor) -> Tensor:
        """``(..., dim)`` to ``(..., width)``."""
        u = self.fc1(tap).relu()
        gated: Tensor = (self.fc2(u) + u) * self.fc3(u).sigmoid()
        return gated


class Consolidator(nn.Module):
    """Merges taps per token and gives tokens in the backbone's width (the paper's multi-tiered sensing adapter).

    Args:
        dim: width of the backbone.
        width: of the projected taps.
        n_taps: taps, the last one is the guide.
        variant: "gated" is the default; "norm" (Linear and LayerNorm) and "mlp" (a further MLP on the merged taps) are
            the published ones for BERT and MDETR.
        temperature: of the output gate.
        gate_init: "zero" as published, where the last blocks first see nothing but the random adapter, or "identity",
            which starts at the frozen model.
        score_bias: initial bias of the agreement with the guide; above 0 it is never dead for a whole token. The random
            one of PyTorch when None, as published.

    Raises:
        ValueError: for fewer than two taps, an unknown variant or initialization.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        n_taps: int,
        *,
        variant: Variant = "gated",
        temperature: float = 0.1,
        gate_init: Literal["zero", "identity"] = "zero",
        score_bias: float | None = None,
    ) -> None:
        super().__init__()
        if n_taps < 2:
            raise ValueError(f"`n_taps` must be 2 or more, a shallow tap and the guide, got {n_taps!r}")
        if variant not in get_args(Variant):
            known = get_args(Variant)
            raise ValueError(
                f"`variant` must be one of {', '.join(known)}, got {variant!r}{did_you_mean(variant, known)}"
            )
        if gate_init not in ("zero", "identity"):
            raise ValueError(f"`gate_init` must be 'zero' or 'identity', got {gate_init!r}")
        self.variant, self.temperature = variant, temperature
        self.eps = 1e-8 if variant == "norm" else 1e-6
        downs = (
            GatedDown(dim, width) if variant == "gated" else nn.Sequential(nn.Linear(dim, width), nn.LayerNorm(width))
            for _ in range(n_taps)
        )
        self.down = nn.ModuleList(downs)
        self.score = nn.Linear(width, 1)
        self.mlp = (
            nn.Sequential(nn.Linear(width, dim), nn.ReLU(), nn.Linear(dim, width), nn.LayerNorm(width))
            if variant == "mlp"
            else nn.Identity()
        )
        self.out = nn.Linear(width, dim)
        self.norm = nn.Identity() if variant == "gated" else nn.LayerNorm(dim, eps=1e-12 if variant == "norm" else 1e-5)
        self.dropout = nn.Dropout(0.1 if variant == "norm" else 0.0)
        self.alpha = nn.Parameter(torch.zeros(1))
        with torch.no_grad():
            if score_bias is not None:
                self.score.bias.fill_(score_bias)
            if gate_init == "identity":
                self.alpha.fill_(1.0)  # tanh(1 / 0.1) is 1 in float32
                last = self.norm if isinstance(self.norm, nn.LayerNorm) else self.out
                last.weight.zero_()
                last.bias.zero_()

    def forward(self, taps: Sequence[Tensor], last: Tensor | None = None) -> Tensor:
        """Tokens ``(batch, tokens, dim)`` for taps of that shape; ``last``, the last tap when None, goes on."""
        guide = self.down[-1](taps[-1])
        shallow = torch.stack([down(tap) for down, tap in zip(self.down[:-1], taps[:-1], strict=True)])
        merged = consolidate(shallow, self.score(shallow * guide)[..., 0], self.eps)
        merged = self.mlp(merged) + guide
        out = self.dropout(self.norm(self.out(merged.relu())))
        stream: Tensor = out + (self.alpha / self.temperature).tanh() * (taps[-1] if last is None else last)
        return stream


class EmbeddingConsolidator(nn.Module):
    """The published form for CLIP towers that end in an embedding: taps are pooled over tokens, then merged.

    Args:
        dim: width of the tower.
        width: of the projected taps.
        n_taps: taps.
        embed_dim: of the embedding, which is the guide.
        gated: whether each tap's class token has a learned gate, as published for MSR-VTT.
        temperature: of these gates.
        eps: in norms and sums.

    Example:
        >>> merge = EmbeddingConsolidator(16, 4, n_taps=3, embed_dim=8)
        >>> merge([torch.zeros(2, 5, 16)] * 3, torch.ones(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(
        self,
        dim: int,
        width: int,
        n_taps: int,
        embed_dim: int,
        *,
        gated: bool = False,
        temperature: float = 0.1,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.temperature, self.eps = temperature, eps
        self.down = nn.ModuleList(nn.Linear(dim, width) for _ in range(n_taps))
        self.guide = nn.Linear(embed_dim, width)
        self.token_score = nn.ModuleList(nn.Linear(width, 1) for _ in range(n_taps))
        self.tap_score = nn.Linear(width, 1)
        self.gates = nn.Parameter(torch.ones(n_taps)) if gated else None
        self.out = nn.Linear(width, embed_dim)

    def forward(
        self,
        taps: Sequence[Tensor],
        embedding: Tensor,
        mask: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """The embedding ``(batch, embed_dim)`` with what the taps add.

        Args:
            taps: ``(batch, tokens, dim)`` each.
            embedding: of the frozen tower ``(batch, embed_dim)``.
            mask: ``(batch, tokens)``, 1 for tokens that count.
            position: ``(batch,)``, the token that stands for the sample; the first one when None.
        """
        guide = self.guide(embedding.relu())  # (batch, width)
        pooled = []
        for index, tap in enumerate(taps):
            tokens = self.down[index](tap.relu())  # (batch, tokens, width)
            weights = self.token_score[index](guide[:, None] * tokens)[..., 0]
            weights = (weights if mask is None else weights * mask).relu()
            weights = weights / (weights.sum(1, keepdim=True) + self.eps)
            rows = torch.arange(len(tokens), device=tokens.device)
            own = tokens[:, 0] if position is None else tokens[rows, position.long()]
            if self.gates is not None:
                own = own * (self.gates[index] / self.temperature).sigmoid()
            pooled.append(torch.einsum("bn,bnw->bw", weights, tokens) + own)
        stacked = torch.stack(pooled)
        merged = consolidate(stacked, self.tap_score(stacked * guide)[..., 0], self.eps)
        result: Tensor = embedding + self.out((merged + guide).relu())
        return result


class SherlSide(SideNetwork):
    """Consolidated shallow taps, finished by the last frozen blocks of the backbone, through which gradients flow.

    Args:
        backbone: what it stands beside; its last blocks are called, not copied.
        reduction: the taps' width is the backbone's divided by it; 8 as published for the large models.
        late: blocks that finish the work, 1 as published; each keeps about 5 % of full fine-tuning's memory.
        variant: see :class:`Consolidator`.
        gate_init: see :class:`Consolidator`.
        score_bias: see :class:`Consolidator`.

    Raises:
        ValueError: for a reduction that does not divide the width, or too many late blocks.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        reduction: int = 8,
        late: int = 1,
        variant: Variant = "gated",
        gate_init: Literal["zero", "identity"] = "zero",
        score_bias: float | None = None,
    ) -> None:
        super().__init__()
        depth, dim = len(backbone.blocks), backbone.embed_dim
        if not 1 <= late < depth:
            raise ValueError(f"`late` must leave a block for the taps, 1 to {depth - 1}, got {late!r}")
        if reduction < 1 or dim % reduction:
            raise ValueError(f"`reduction` must divide the backbone's width, {dim}, got {reduction!r}")
        self.late = late
        self.tap_indices = tuple(range(depth - late + 1))
        self.merge = Consolidator(
            dim, dim // reduction, len(self.tap_indices), variant=variant, gate_init=gate_init, score_bias=score_bias
        )
        self._backbone = (backbone,)

    def undecayed(self) -> list[nn.Parameter]:
        """The output gate."""
        return [self.merge.alpha]

    def forward(self, record: TapRecord, base: Tensor) -> Tensor:
        """The feature ``(batch, features)``."""
        tokens = self.merge([record.taps[i] for i in self.tap_indices])
        return run_late(self._backbone[0], tokens, self.late, record.position)
