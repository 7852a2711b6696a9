"""Key and value prefixes in the attention of a frozen transformer (prefix tuning as OnePrompt uses it).

"OVOR: OnePrompt with Virtual Outlier Regularization for Rehearsal-Free Class-Incremental Learning", Wei-Cheng Huang,
Chun-Fu (Richard) Chen and Hsiang Hsu, ICLR 2024, arXiv 2402.04129. Implemented: one set of prefixes for all samples and
tasks. Not implemented here: pools of prompts that are chosen per sample.

Formula, for the normalized tokens ``x`` of a block and its own frozen projections::

    q, k, v = qkv(x)                                            (batch, heads, tokens, head_dim)
    P_k, P_v = the first and the last half of the block's prompt (length, heads * head_dim), not projected
    y = proj(softmax(q [P_k; k]^T * scale) [P_v; v])            as many tokens as before
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import starmap
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_plugins.backbones import find_backbone

ONE_PROMPT_LENGTHS: Mapping[int, int] = MappingProxyType({0: 10, 1: 10, 2: 40, 3: 40, 4: 40})
"""Published prompt rows per block; half of them are keys, half values."""

_TIMM_ARGUMENTS = {"x", "attn_mask", "is_causal"}


class PrefixSlot(nn.Module):
    """The prefix of one block; :meth:`attend_timm` or :meth:`attend_mha` becomes its attention layer's ``forward``.

    Args:
        length: prompt rows; the first half are keys, the last half values.
        dim: width of all heads together.
        generator: draws the prompt, uniform in [0, 1) as published; a fixed seed when None.
    """

    def __init__(self, length: int, dim: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        generator = generator or torch.Generator().manual_seed(0)
        self.prompt = nn.Parameter(torch.rand(length, dim, generator=generator))
        self.frozen = False
        self._layer: tuple[Any, ...] = ()  # in a tuple, so that the layer's weights are not saved twice

    def forward(self, like: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Key and value prefix ``(batch, heads, length / 2, head_dim)`` for a batch and dtype like ``like``'s."""
        prompt = self.prompt.detach() if self.frozen else self.prompt
        rows = prompt.to(like.dtype).view(len(prompt), heads, -1).transpose(0, 1)  # (heads, length, head_dim)
        key, value = rows.expand(len(like), -1, -1, -1).chunk(2, dim=2)
        return key, value

    def _attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float | None
    ) -> Tensor:
        if len(self.prompt):
            key, value = self(k, k.shape[1])
            k, v = torch.cat([key, k], dim=2), torch.cat([value, v], dim=2)
        if causal and mask is None:
            mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        if mask is not None:  # every token sees every prefix row
            mask = F.pad(mask, (len(self.prompt) // 2, 0), value=True if mask.dtype == torch.bool else 0.0)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)

    def attend_timm(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """What timm's ``Attention.forward`` computes, with the prefix: ``(batch, tokens, dim)`` to the same."""
        layer = self._layer[0]
        batch, tokens, _ = x.shape
        qkv = layer.qkv(x).view(batch, tokens, 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (batch, heads, tokens, head_dim)
        q, k = layer.q_norm(q), layer.k_norm(k)
        dropout = layer.attn_drop.p if layer.training else 0.0
        out = self._attention(q, k, v, attn_mask, is_causal, dropout, layer.scale).transpose(1, 2).flatten(2)
        norm, gate = getattr(layer, "norm", None), getattr(layer, "gate", None)
        if norm is not None:
            out = norm(out)
        if gate is not None:
            out = out * gate(x).sigmoid()
        result: Tensor = layer.proj_drop(layer.proj(out))
        return result

    def attend_mha(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """What ``nn.MultiheadAttention.forward`` computes, with the prefix; the attention weights are not returned."""
        layer = self._layer[0]
        if need_weights or key_padding_mask is not None:
            raise ValueError(
                "`need_weights` must be False and `key_padding_mask` None for an attention layer with a prefix,"
                f" got {need_weights!r} and {key_padding_mask!r}"
            )
        weights, biases = layer.in_proj_weight.chunk(3), (None,) * 3
        if layer.in_proj_bias is not None:
            biases = layer.in_proj_bias.chunk(3)
        inputs = (query, key, value) if layer.batch_first else tuple(t.transpose(0, 1) for t in (query, key, value))
        projected = starmap(F.linear, zip(inputs, weights, biases, strict=True))
        q, k, v = (t.reshape(*t.shape[:2], layer.num_heads, -1).transpose(1, 2) for t in projected)
        if attn_mask is not None:
            attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(q.dtype)  # True hides there
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.view(-1, layer.num_heads, *attn_mask.shape[1:])
        dropout = layer.dropout if layer.training else 0.0
        out = self._attention(q, k, v, attn_mask, False, dropout, None).transpose(1, 2).flatten(2)
        out = F.linear(out, layer.out_proj.weight, layer.out_proj.bias)
        return (out if layer.batch_first else out.transpose(0, 1)), None

    def attach(self, layer: nn.Module, where: str) -> None:
        """Become the ``forward`` of ``layer``; a repeated call changes nothing.

        Raises:
            ValueError: for an attention layer that a prefix cannot work in, saying why.
            RuntimeError: when the slot or the layer's ``forward`` is taken.
        """
        if self._layer and self._layer[0] is layer:
            return
        if self._layer:
            raise RuntimeError(f"the prefix of {where} is attached to another layer; call `detach()` first")
        if "forward" in vars(layer):
            raise RuntimeError(f"the `forward` of {where} is already replaced; detach the other adapter first")
        multihead, fields = isinstance(layer, nn.MultiheadAttention), cast("Any", layer)
        reason = _mha_obstacle(layer) if multihead else _timm_obstacle(layer)
        if reason is None:
            width = fields.embed_dim if multihead else fields.qkv.out_features // 3
            if width != self.prompt.shape[1]:
                reason = f"its heads are {width} wide together, the prompt {self.prompt.shape[1]}"
        if reason is not None:
            raise ValueError(
                f"{where} must be a layer that a prefix works in, got {type(layer).__name__}: {reason};"
                " use the attention of timm's VisionTransformer or nn.MultiheadAttention"
            )
        self._layer = (layer,)
        layer.forward = self.attend_mha if multihead else self.attend_timm

    def detach(self) -> None:
        """Give the layer its own ``forward`` back."""
        for layer in self._layer:
            vars(layer).pop("forward", None)
        self._layer = ()


def _timm_obstacle(layer: nn.Module) -> str | None:
    """Why this layer is no plain self-attention with one ``qkv`` projection; None when it is."""
    missing = [n for n in ("qkv", "proj", "q_norm", "k_norm", "attn_drop", "proj_drop") if not hasattr(layer, n)]
    missing += [n for n in ("num_heads", "scale") if not hasattr(layer, n)]
    if missing:
        return f"it has no {', '.join(f'`{n}`' for n in missing)}"
    if getattr(layer, "qkv", None) is None:
        return "it projects queries, keys and values apart"
    extra = set(inspect.signature(type(layer).forward).parameters) - {"self"} - _TIMM_ARGUMENTS
    if extra:
        return f"its forward takes {', '.join(f'`{n}`' for n in sorted(extra))}, which gives tokens a position"
    own = {n for n, _ in (*layer.named_parameters(), *layer.named_buffers())}
    known = ("qkv.", "proj.", "q_norm.", "k_norm.", "norm.", "gate.")
    unknown = sorted(n for n in own if not n.startswith(known))
    if unknown:
        return f"it also uses {', '.join(f'`{n}`' for n in unknown)}"
    return None if _computes_plain_attention(layer) else "its forward computes something else than plain attention"


@torch.no_grad()
def _computes_plain_attention(layer: Any) -> bool:
    """Whether an empty prefix reproduces the layer's own output on three tokens."""
    if layer.qkv.weight.is_meta:
        return True
    probe, training = PrefixSlot(0, layer.qkv.out_features // 3), layer.training
    probe._layer = (layer,)
    x = torch.linspace(-1, 1, 3 * layer.qkv.in_features).sin().view(1, 3, -1).to(layer.qkv.weight)
    layer.eval()
    try:
        expected, got = layer.forward(x), probe.attend_timm(x)
    finally:
        layer.train(training)
    return expected.shape == got.shape and torch.allclose(
        expected, got, rtol=0.02, atol=0.02 * float(expected.abs().max())
    )


def _mha_obstacle(layer: nn.Module) -> str | None:
    if type(layer).forward is not nn.MultiheadAttention.forward:
        return "it overrides `forward`"
    if layer.in_proj_weight is None:
        return "its keys or values have another width"
    if layer.bias_k is not None or layer.add_zero_attn:
        return "it adds keys and values of its own"
    return None


class PrefixPrompt(nn.Module):
    """Puts learned key and value rows in front of the attention of chosen blocks.

    WHEN: :meth:`attach` replaces the ``forward`` of the blocks' attention layers, as an attribute of the instances; no
    parameter of the model is renamed, and deepcopy, pickle, strict state dicts and ``torch.compile`` keep working.
    :meth:`detach` restores the model. The number of tokens never changes.

    Args:
        dim: width of a token.
        lengths: prompt rows per block index, even numbers of 0 or more; half are keys, half values. The published
            10 rows in blocks 0 and 1 and 40 in blocks 2, 3 and 4 when None.
        seed: for the initial prompts, uniform in [0, 1) as published.

    Raises:
        ValueError: for an odd or negative length or a negative block index.

    Example:
        >>> from timm.models.vision_transformer import VisionTransformer
        >>> vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=3)
        >>> prompt = PrefixPrompt(32, {0: 4, 1: 8}).attach(vit)
        >>> vit(torch.zeros(1, 3, 16, 16)).shape, [tuple(p.shape) for p in prompt.parameters()]
        (torch.Size([1, 3]), [(4, 32), (8, 32)])
    """

    def __init__(self, dim: int, lengths: Mapping[int, int] | None = None, *, seed: int = 0) -> None:
        super().__init__()
        self._default = lengths is None
        lengths = ONE_PROMPT_LENGTHS if lengths is None else lengths
        if dim < 1:
            raise ValueError(f"`dim` must be 1 or more, got {dim!r}")
        for block, length in lengths.items():
            if block < 0:
                raise ValueError(f"`lengths` must have block indices of 0 or more, got {block!r}")
            if length < 0 or length % 2:
                raise ValueError(
                    f"`lengths` must be even, half keys and half values, got {length!r} for block {block}; use"
                    f" {max(length + 1, 0)}"
                )
        generator = torch.Generator().manual_seed(seed)
        self.slots = nn.ModuleDict({str(b): PrefixSlot(n, dim, generator) for b, n in sorted(lengths.items())})

    def slot(self, block: int) -> PrefixSlot:
        """The prefix of a block."""
        slot = self.slots[str(block)]
        assert isinstance(slot, PrefixSlot)
        return slot

    @property
    def frozen(self) -> bool:
        """Whether prompts enter detached, so that the forward pass builds no graph through a frozen backbone."""
        return any(self.slot(int(block)).frozen for block in self.slots)

    @frozen.setter
    def frozen(self, value: bool) -> None:
        for block in self.slots:
            self.slot(int(block)).frozen = value

    def attach(self, model: nn.Module | Sequence[nn.Module]) -> PrefixPrompt:
        """Put the prefixes into a model; a repeated call changes nothing.

        Args:
            model: a timm ViT, an open_clip vision tower, a module that holds one, or the list of its blocks.

        Returns:
            Itself.

        Raises:
            ValueError: when a block does not exist (the default lengths skip such blocks and freeze their prompts) or
                its attention cannot take a prefix.
            RuntimeError: when an attention layer already has another ``forward``.
        """
        blocks = list(find_backbone(model).blocks) if isinstance(model, nn.Module) else list(model)
        indices = [int(block) for block in self.slots]
        beyond = [b for b in indices if b >= len(blocks)]
        if beyond and not self._default:
            raise ValueError(
                f"`lengths` must name blocks of the model, 0 to {len(blocks) - 1}, got {beyond!r}; leave these out"
            )
        attached: list[PrefixSlot] = []
        try:
            for block in (b for b in indices if b < len(blocks)):
                layer, kind = getattr(blocks[block], "attn", None), type(blocks[block]).__name__
                if not isinstance(layer, nn.Module):
                    raise ValueError(f"block {block} must have an attention layer `attn`, got a {kind} without one")
                fresh = not self.slot(block)._layer
                self.slot(block).attach(layer, f"`attn` of block {block}")
                if fresh:
                    attached.append(self.slot(block))
        except (ValueError, RuntimeError):
            for slot in attached:  # all or nothing
                slot.detach()
            raise
        for block in beyond:
            self.slot(block).prompt.requires_grad_(False)
        return self

    def detach(self) -> None:
        """Give every attention layer its own ``forward`` back."""
        for block in self.slots:
            self.slot(int(block)).detach()
