"""Ladder side network: a narrow copy of a transformer that reads its intermediate tokens.

"LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", Yi-Lin Sung, Jaemin Cho, Mohit Bansal,
NeurIPS 2022, arXiv 2206.06522. Implemented: gated ladder, all gate variants, dropped layers, for vision transformers
and text towers, whose causal mask the side keeps and whose feature it reads at the same token; the pruning
initialization is in :mod:`cl_plugins.adapters.side_pruning`. Not implemented: the decoder's ladder of encoder-decoder
models, distillation to the backbone's logits.

Formula, for taps ``h_0 ... h_L`` (see :mod:`cl_plugins.taps`) and width ``dim // reduction``::

    s    = first(h_0)
    s    = block_i(mu_i s + (1 - mu_i) down_i(h_{i+1})),   mu_i = sigmoid(gate_i / temperature)      kept layers i
    feat = up(norm(pool(s)))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_plugins._text import did_you_mean
from cl_plugins.side_network import SideNetwork, TapRecord
from cl_plugins.tokens import TokenLayout

Gate = Literal["learnable", "one", "none", "linear", "hyperbolic"]
Drop = Literal["none", "quarter", "half", "three-quarters"]

_DROPPED = {"none": 0, "quarter": 1, "half": 2, "three-quarters": 3}


def kept_layers(depth: int, drop: str = "none") -> tuple[int, ...]:
    """Layers that keep a side block when the first ones of each group of four are dropped, as published.

    Raises:
        ValueError: for an unknown pattern, or when nothing is left.

    Example:
        >>> kept_layers(12, "quarter")
        (1, 2, 3, 5, 6, 7, 9, 10, 11)
    """
    if drop not in _DROPPED:
        raise ValueError(f"`drop` must be one of {', '.join(_DROPPED)}, got {drop!r}{did_you_mean(drop, _DROPPED)}")
    layers = tuple(i for i in range(depth) if i % 4 >= _DROPPED[drop])
    if not layers:
        raise ValueError(f"`drop` must leave a layer of {depth}, got {drop!r}; use a smaller part or a list of layers")
    return layers


def check_layers(layers: Sequence[int], depth: int) -> tuple[int, ...]:
    """``layers`` as a tuple, ascending and inside the backbone.

    Raises:
        ValueError: for an empty list, a repeated layer or one out of range.
    """
    chosen = tuple(int(i) for i in layers)
    if not chosen or sorted(set(chosen)) != list(chosen) or chosen[0] < 0 or chosen[-1] >= depth:
        raise ValueError(f"`layers` must be distinct blocks in order, 0 to {depth - 1}, got {list(layers)!r}")
    return chosen


def kept_rows(n: int, keep: float) -> int:
    """Rows of ``n`` that a narrower layer has, and that pruning leaves; rounded as published, at least one.

    Example:
        >>> kept_rows(3072, 1 / 8), kept_rows(4304, 1 / 3)
        (384, 1435)
    """
    return max(n - round((1.0 - keep) * n), 1)


def ladder_gate(gate: Tensor, temperature: float = 0.1) -> Tensor:
    """``sigmoid(gate / temperature)``, the weight of the side stream."""
    return torch.sigmoid(gate / temperature)


def scheduled_gate(kind: str, epoch: int, epochs: int) -> float:
    """The weight of the side stream in an epoch: from 0.1 to 0.9 ("linear") or ``1 / (1 + epoch)`` ("hyperbolic").

    Example:
        >>> scheduled_gate("linear", 9, 10), scheduled_gate("hyperbolic", 0, 10)
        (0.9, 0.9)
    """
    if kind == "linear":
        last = max(epochs - 1, 1)
        return 0.1 + 0.8 * min(epoch, last) / last
    return min(max(1.0 / (1 + epoch), 0.1), 0.9)


class SideAttention(nn.Module):
    """Self-attention by the fused kernel; explicit maps would cost as much as the backbone's.

    Args:
        dim: width.
        heads: as many as in the backbone.
        bias: whether queries, keys and values have one.
    """

    def __init__(self, dim: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """``(batch, tokens, dim)`` to the same; ``causal`` tokens attend to earlier ones and themselves."""
        q, k, v = (self._heads(part) for part in self.qkv(x).chunk(3, 2))  # one copy less in backward than unbind(0)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        result: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return result

    def _heads(self, x: Tensor) -> Tensor:
        """``(batch, tokens, dim)`` as ``(batch, heads, tokens, head_dim)``."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)

    def one_token(self, x: Tensor, position: Tensor | None = None, causal: bool = False) -> Tensor:
        """What one token ``(batch, 1, dim)`` gets of ``x``, without the other tokens' queries."""
        dim = x.shape[2]
        weight, bias = self.qkv.weight, self.qkv.bias
        own = F.linear(_one(x, position), weight[:dim], None if bias is None else bias[:dim])
        all_ = F.linear(x, weight[dim:], None if bias is None else bias[dim:])
        q, k, v = (self._heads(part) for part in (own, *all_.chunk(2, 2)))
        allowed = None
        if causal:
            last = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device) if position is None else position[:, None]
            allowed = (torch.arange(x.shape[1], device=x.device) <= last)[:, None, None]  # (batch, 1, 1, tokens)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        result: Tensor = self.proj(out.transpose(1, 2).flatten(2))
        return result


def _one(x: Tensor, position: Tensor | None) -> Tensor:
    """A copy of the first token of ``(batch, tokens, dim)``, or of the one at ``position``: ``(batch, 1, dim)``."""
    return x[:, :1].clone() if position is None else x[torch.arange(len(x), device=x.device), position][:, None]


class SideMlp(nn.Module):
    """Two layers around an activation.

    Args:
        dim: width.
        hidden: width between the layers.
        activation: the backbone's.
    """

    def __init__(self, dim: int, hidden: int, activation: Callable[[], nn.Module] = nn.GELU) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = activation()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, tokens, dim)`` to the same."""
        result: Tensor = self.fc2(self.act(self.fc1(x)))
        return result


class SideBlock(nn.Module):
    """A narrow pre-norm block with timm's parameter names.

    Args:
        dim: width.
        heads: of the attention.
        hidden: width of the feed-forward layer.
        bias: of queries, keys and values.
        activation: of the feed-forward layer.
        eps: of the norms.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        bias: bool = True,
        activation: Callable[[], nn.Module] = nn.GELU,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = SideAttention(dim, heads, bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = SideMlp(dim, hidden, activation)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """``(batch, tokens, dim)`` to the same; ``causal`` tokens attend to earlier ones and themselves."""
        x = x + self.attn(self.norm1(x), causal)
        result: Tensor = x + self.mlp(self.norm2(x))
        return result

    def one_token(self, x: Tensor, position: Tensor | None = None, causal: bool = False) -> Tensor:
        """One token of :meth:`forward` ``(batch, 1, dim)``, at a fraction of its cost.

        Args:
            x: ``(batch, tokens, dim)``.
            position: which one, ``(batch,)``; the first when None.
            causal: whether it attends to earlier ones and itself alone.
        """
        own = x[:, :1] if position is None else _one(x, position)
        x = own + self.attn.one_token(self.norm1(x), position, causal)
        result: Tensor = x + self.mlp(self.norm2(x))
        return result


class LadderSide(SideNetwork):
    """A ladder of narrow blocks over the taps of a frozen backbone.

    Args:
        dim: width of the backbone.
        heads: of the backbone; the side keeps their number.
        depth: blocks of the backbone.
        reduction: divides every width; 8 as published for GLUE, 4 for vision and language.
        layers: blocks that keep a side block; all when None.
        hidden: feed-forward width of the backbone, ``4 * dim`` when None.
        gate: "learnable" as published; "one" (no ladder) and "none" (plain sum) are ablations, "linear" and
            "hyperbolic" follow the epoch given to :meth:`set_epoch`.
        temperature: of the gates; 0.1 as published, which multiplies their learning rate by 10.
        fuse: "before" the side block as published, or "after" it.
        layout: how tokens are pooled.
        bias: whether the backbone's queries, keys and values have one.
        activation: of the backbone.
        eps: of the norms.

    Raises:
        ValueError: for a reduction that does not divide the width of a head, layers out of range, an unknown gate.

    Example:
        >>> side = LadderSide(768, heads=12, depth=12, reduction=8)
        >>> sum(p.numel() for p in side.parameters())
        2376492
    """

    in_token_space = True

    def __init__(
        self,
        dim: int,
        heads: int,
        depth: int,
        *,
        reduction: int = 8,
        layers: Sequence[int] | None = None,
        hidden: int | None = None,
        gate: Gate = "learnable",
        temperature: float = 0.1,
        fuse: Literal["before", "after"] = "before",
        layout: TokenLayout | None = None,
        bias: bool = True,
        activation: Callable[[], nn.Module] = nn.GELU,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if reduction < 1 or dim % heads or (dim // heads) % reduction:
            raise ValueError(
                f"`reduction` must divide the width of a head, {dim // heads}, got {reduction!r};"
                f" use one of {[r for r in range(1, dim // heads + 1) if (dim // heads) % r == 0]}"
            )
        if gate not in get_args(Gate):
            raise ValueError(
                f"`gate` must be one of {', '.join(get_args(Gate))}, got {gate!r}{did_you_mean(gate, get_args(Gate))}"
            )
        if fuse not in ("before", "after"):
            raise ValueError(f"`fuse` must be 'before' or 'after', got {fuse!r}")
        if not temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {temperature!r}")
        width = dim // reduction
        self.layers = check_layers(range(depth) if layers is None else layers, depth)
        self.tap_indices = (0, *(i + 1 for i in self.layers))
        self.gate, self.temperature, self.fuse = gate, temperature, fuse
        self.layout = layout or TokenLayout(1, "token")
        self.scheduled: Tensor | None  # a buffer, so that it is saved with the weights that were trained at it
        moves = gate in ("linear", "hyperbolic")
        self.register_buffer("scheduled", torch.tensor(scheduled_gate(gate, 0, 1)) if moves else None)
        names = [str(i) for i in self.layers]
        self.first = nn.Linear(dim, width)
        self.down = nn.ModuleDict({n: nn.Linear(dim, width) for n in names})
        inner = kept_rows(4 * dim if hidden is None else hidden, 1.0 / reduction)
        self.blocks = nn.ModuleDict(
            {n: SideBlock(width, heads, inner, bias=bias, activation=activation, eps=eps) for n in names}
        )
        self.gates = nn.ParameterDict({n: nn.Parameter(torch.zeros(1)) for n in names if gate == "learnable"})
        self.norm = nn.LayerNorm(width, eps=eps)
        self.up = nn.Linear(width, dim)

    def set_epoch(self, epoch: int, epochs: int) -> None:
        """Move the scheduled gates; without effect on the others."""
        if self.scheduled is not None:
            self.scheduled.fill_(scheduled_gate(self.gate, epoch, epochs))

    def undecayed(self) -> list[nn.Parameter]:
        """The gates."""
        return list(self.gates.values())

    def _fuse(self, name: str, stream: Tensor, tap: Tensor) -> Tensor:
        if self.gate == "one":
            return stream
        step: Tensor = self.down[name](tap)
        if self.gate == "none":
            return stream + step
        mu = ladder_gate(self.gates[name], self.temperature) if self.scheduled is None else self.scheduled
        return step + mu * (
            stream - step
        )  # one difference is kept for backward, mu s + (1 - mu) d would keep two terms

    def layer(self, index: int, stream: Tensor, tap: Tensor, causal: bool = False) -> Tensor:
        """One rung: ``stream`` ``(batch, tokens, width)`` on entry to a kept layer, ``tap`` the output of its block."""
        name = str(index)
        if self.fuse == "before":
            stream = self._fuse(name, stream, tap)
        stream = self.blocks[name](stream, causal)
        return self._fuse(name, stream, tap) if self.fuse == "after" else stream

    def stream(self, taps: Mapping[int, Tensor], causal: bool = False) -> Tensor:
        """The side stream ``(batch, tokens, width)`` behind the last kept layer, before the norm."""
        stream: Tensor = self.first(taps[0])
        for index in self.layers:
            stream = self.layer(index, stream, taps[index + 1], causal)
        return stream

    def _pooled(self, record: TapRecord) -> Tensor:
        """The pooled stream ``(batch, width)``; the last block computes one token where only one is read."""
        taps, causal = record.taps, record.causal
        if self.layout.pool == "avg" or self.fuse == "after":
            return self.layout.reduce(self.stream(taps, causal), record.position)
        stream: Tensor = self.first(taps[0])
        for index in self.layers[:-1]:
            stream = self.layer(index, stream, taps[index + 1], causal)
        last = str(self.layers[-1])
        block = self.blocks[last]
        assert isinstance(block, SideBlock)
        fused = self._fuse(last, stream, taps[self.layers[-1] + 1])
        return block.one_token(fused, record.position, causal)[:, 0]

    def forward(self, record: TapRecord, base: Tensor) -> Tensor:
        """The feature ``(batch, dim)``."""
        feature: Tensor = self.up(self.norm(self._pooled(record)))
        return feature
