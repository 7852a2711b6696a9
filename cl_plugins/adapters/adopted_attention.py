"""``nn.MultiheadAttention`` that asks adapters for its projections.

The stock layer multiplies its raw ``in_proj_weight`` and ``out_proj.weight`` inside one function, or inside a native
kernel, and calls no layer that a hook could sit on: a hook on ``out_proj`` is never called. An adopted layer is the
same object with the same parameters under the same names; its class is changed to one whose ``forward`` adds the
adapters' share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import starmap
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_plugins.adapters.delta import LinearDelta

Slot = Literal["in_proj", "out_proj"]


class AdoptedAttention(nn.MultiheadAttention):
    """The attention layer with adapters on its projections; made by :func:`adopt`, not by its constructor."""

    adapters: tuple[tuple[Slot, LinearDelta], ...]  # a tuple, so that they are no submodules and rename nothing

    def _in(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Query, key and value projections ``(batch, tokens, dim)``."""
        shared = inputs[0] is inputs[1] and inputs[1] is inputs[2]
        if shared:
            joined = F.linear(inputs[0], self.in_proj_weight, self.in_proj_bias)
            for slot, adapter in self.adapters:
                if slot == "in_proj" and adapter.active:
                    joined = adapter.add_to(joined, adapter(inputs[0]))
            return list(joined.chunk(3, -1))
        assert self.in_proj_weight is not None
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        out = list(starmap(F.linear, zip(inputs, self.in_proj_weight.chunk(3), biases, strict=True)))
        for slot, adapter in self.adapters:
            if slot == "in_proj" and adapter.active:
                for group, part in enumerate(adapter.parts):
                    own = adapter(inputs[part]).chunk(adapter.groups, -1)[group]
                    out[part] = out[part] + own.to(out[part].dtype)
        return out

    def _out(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.out_proj.weight, self.out_proj.bias)
        for slot, adapter in self.adapters:
            if slot == "out_proj" and adapter.active:
                y = adapter.add_to(y, adapter(x))
        return y

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The two masks as one that is added to the scores, broadcast to ``(batch, heads, tokens, tokens)``."""
        if attn_mask is not None:
            attn_mask = _additive(attn_mask, dtype)
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.view(-1, self.num_heads, *attn_mask.shape[1:])
        if padding is None:
            return attn_mask
        hidden = _additive(padding, dtype)[:, None, None]  # (batch, 1, 1, tokens)
        return hidden if attn_mask is None else hidden + attn_mask

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What ``nn.MultiheadAttention.forward`` computes, with the adapters' share in each projection."""
        if is_causal and attn_mask is None:
            raise ValueError("`attn_mask` must be given when `is_causal` is True, got None")
        single = query.ndim == 2
        shared = query is key and key is value
        inputs = [query] if shared else [query, key, value]
        if single:
            inputs = [t.unsqueeze(0) for t in inputs]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            inputs = [t.transpose(0, 1) for t in inputs]
        projected = self._in(inputs * 3 if shared else inputs)
        q, k, v = (t.view(*t.shape[:2], self.num_heads, self.head_dim).transpose(1, 2) for t in projected)
        mask = self._mask(attn_mask, key_padding_mask, q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        y = self._out(mixed.transpose(1, 2).flatten(2))  # (batch, tokens, dim)
        if single:
            return y[0], None if weights is None else weights[0]
        return (y if self.batch_first else y.transpose(0, 1)), weights


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores; True in a mask of bool hides."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    return mask.to(dtype)


def obstacle(layer: nn.MultiheadAttention) -> str | None:
    """Why adapters cannot work in this attention layer; None when they can."""
    own_forward = type(layer).forward is not nn.MultiheadAttention.forward and not isinstance(layer, AdoptedAttention)
    if own_forward or "forward" in vars(layer):
        return "another `forward` than the stock one takes part"
    if not layer._qkv_same_embed_dim:
        return "its keys or values come in another width than its queries (`kdim`, `vdim`)"
    if layer.bias_k is not None or layer.add_zero_attn:
        return "it adds keys and values of its own (`add_bias_kv`, `add_zero_attn`)"
    return None


def adopt(layer: nn.MultiheadAttention, slot: Slot, adapter: LinearDelta) -> None:
    """Let ``adapter`` act on a projection of ``layer``."""
    if not isinstance(layer, AdoptedAttention):
        layer.__class__ = AdoptedAttention
        cast("AdoptedAttention", layer).adapters = ()
    adopted = cast("AdoptedAttention", layer)
    adopted.adapters = (*adopted.adapters, (slot, adapter))


def release(layer: nn.MultiheadAttention, adapter: LinearDelta) -> None:
    """Undo :func:`adopt` for one adapter; without any left the layer is what it was."""
    if isinstance(layer, AdoptedAttention):
        layer.adapters = tuple(entry for entry in layer.adapters if entry[1] is not adapter)
        if not layer.adapters:
            del layer.adapters
            layer.__class__ = nn.MultiheadAttention  # type: ignore[assignment]  # mypy forbids what undoes adopt()
