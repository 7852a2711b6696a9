"""How a backbone's tokens are arranged, and how its last part turns them into a feature.

By the ``kind`` of a backbone:

* timm: class token, registers and patches, pooled behind the final norm
* open_clip: the same, and a projection behind it
* text: tokens attend to earlier ones (causal mask); the feature is read at one token, which the token ids tell, and
  projected
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_plugins.backbones import Backbone


@dataclass(frozen=True)
class TokenLayout:
    """How a backbone's tokens are arranged.

    Attributes:
        prefix: tokens in front of the patches (class token, registers).
        pool: "token" reads the first token, "avg" the mean of the patches, "text" one token by its position.
    """

    prefix: int
    pool: str

    def reduce(self, tokens: Tensor, position: Tensor | None = None) -> Tensor:
        """One vector per sample ``(batch, dim)``; a copy, since a slice would keep all tokens alive for backward.

        Args:
            tokens: ``(batch, tokens, dim)``.
            position: the token that is read ``(batch,)``, for "text".
        """
        if self.pool == "text":
            assert position is not None
            return tokens[torch.arange(len(tokens), device=tokens.device), position]
        return tokens[:, 0].clone() if self.pool == "token" else tokens[:, self.prefix :].mean(1)


def token_layout(backbone: Backbone) -> TokenLayout:
    """The layout that the backbone itself pools with."""
    model: Any = backbone.model
    if backbone.kind == "text":
        return TokenLayout(0, "text")
    if backbone.kind == "open_clip":
        return TokenLayout(1, "token" if getattr(model, "pool_type", "tok") == "tok" else "avg")
    prefix = int(getattr(model, "num_prefix_tokens", 1))
    return TokenLayout(prefix, "token" if getattr(model, "global_pool", "token") == "token" and prefix else "avg")


def patch_grid(tokens: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of ``tokens`` patches of an image.

    Raises:
        ValueError: when they fill no grid of the image's shape.
    """
    rows = max(1, round((tokens * height / width) ** 0.5))
    if tokens % rows:
        raise ValueError(f"the patches must fill a grid like the image of {height} x {width}, got {tokens} patches")
    return rows, tokens // rows


def check_tokens(backbone: Backbone) -> None:
    """Refuse backbones whose blocks do not hold all their tokens.

    Raises:
        ValueError: for one whose class token joins in blocks of its own, behind those that can be tapped.
    """
    for name, child in backbone.model.named_children():
        further = isinstance(child, nn.ModuleList | nn.Sequential) and any(hasattr(b, "attn") for b in child)
        if backbone.kind == "timm" and name != "blocks" and further:
            raise ValueError(
                f"the backbone must attend in `blocks` alone, got {type(backbone.model).__name__}, whose class token"
                f" only joins in {name!r}; use SideTuning, which reads no tokens"
            )


def check_plain_blocks(backbone: Backbone, method: str) -> None:
    """Refuse backbones whose blocks need more than tokens, for what runs blocks itself.

    Args:
        backbone: to look at.
        method: in the error's words.

    Raises:
        ValueError: for blocks that are given rotary or shared relative positions, or the shape of the map.
    """
    given = list(inspect.signature(backbone.blocks[0].forward).parameters.values())[1:]
    bare = [p.name for p in given if p.default is inspect.Parameter.empty]
    shared = [n for n in ("rope", "rel_pos_bias", "shared_rel_pos") if getattr(backbone.model, n, None) is not None]
    if backbone.kind == "timm" and (bare or shared):
        raise ValueError(
            f"the backbone's blocks must take tokens alone for {method}, got {type(backbone.model).__name__}, which"
            f" hands them {', '.join(bare + shared)}; use LadderSideTuning or SideTuning"
        )


def check_free_positions(backbone: Backbone, method: str) -> None:
    """Refuse backbones whose attention counts its tokens, for what puts more of them in.

    Args:
        backbone: to look at.
        method: in the error's words.

    Raises:
        ValueError: for attention with rotary positions or relative ones.
    """
    check_plain_blocks(backbone, method)
    attention: Any = getattr(backbone.blocks[0], "attn", None)
    if any(getattr(attention, n, None) is not None for n in ("rel_pos", "relative_position_bias_table")):
        raise ValueError(
            f"the backbone's attention must take any number of tokens for {method}, got"
            f" {type(backbone.model).__name__} with relative positions; use LeanHierarchicalSideTuning"
        )


def image_channels(backbone: Backbone) -> int:
    """Channels of the images that a backbone takes."""
    model: Any = backbone.model
    stem = model.patch_embed if backbone.kind == "timm" else model.conv1
    return next((int(m.in_channels) for m in stem.modules() if isinstance(m, nn.Conv2d)), 3)


def text_pool(backbone: Backbone) -> str:
    """Where a text tower reads its feature: "argmax" (the largest token id), "eos", "first" or "last"."""
    model: Any = backbone.model
    return str(getattr(model, "text_pool_type", None) or model.pool_type)


def text_position(backbone: Backbone, ids: Tensor) -> Tensor:
    """The position ``(batch,)`` at which a text tower reads its feature of token ids ``(batch, tokens)``."""
    model: Any = backbone.model
    pool = text_pool(backbone)
    if pool == "argmax":
        return ids.argmax(1)
    if pool == "eos":
        end = int(getattr(model, "text_eos_id", getattr(model, "eos_id", 0)))
        return (ids == end).int().argmax(1)
    return torch.full((len(ids),), 0 if pool == "first" else ids.shape[1] - 1, device=ids.device)


def is_causal(backbone: Backbone) -> bool:
    """Whether a text tower's tokens attend to earlier ones and themselves alone."""
    return getattr(backbone.model, "attn_mask", None) is not None


def projection(backbone: Backbone) -> Any:
    """What an open_clip tower multiplies its pooled token with: a matrix, a linear layer, or None."""
    if backbone.kind == "timm":
        return None
    return getattr(backbone.model, "text_projection" if backbone.kind == "text" else "proj", None)


def _projected(backbone: Backbone, feature: Tensor) -> Tensor:
    matrix = projection(backbone)
    if matrix is None:
        return feature
    projected: Tensor = matrix(feature) if isinstance(matrix, nn.Module) else feature @ matrix.to(feature.dtype)
    return projected


def output_width(backbone: Backbone) -> int:
    """Width of an open_clip tower's feature."""
    matrix = projection(backbone)
    if matrix is None:
        return backbone.embed_dim
    return int(matrix.out_features if isinstance(matrix, nn.Linear) else matrix.shape[1])


def run_late(backbone: Backbone, tokens: Tensor, late: int, position: Tensor | None = None) -> Tensor:
    """The last ``late`` blocks, final norm and pooling on ``tokens``, with a graph: the feature ``(batch, features)``.

    The blocks' parameters stay frozen; gradients only pass through them to ``tokens``.

    Args:
        backbone: whose blocks run.
        tokens: on entry to the first of these blocks ``(batch, tokens, dim)``.
        late: blocks.
        position: where a text tower reads its feature ``(batch,)``.
    """
    model: Any = backbone.model
    if model.training:
        model.eval()
    blocks = backbone.blocks[len(backbone.blocks) - late :]
    if backbone.kind == "timm":
        for block in blocks:
            tokens = block(tokens)
        feature: Tensor = model.forward_head(model.norm(tokens), pre_logits=True)
        return feature
    batch_first = bool(getattr(model.transformer, "batch_first", True))
    mask = model.attn_mask[: tokens.shape[1], : tokens.shape[1]] if is_causal(backbone) else None
    tokens = tokens if batch_first else tokens.transpose(0, 1)
    for block in blocks:
        tokens = block(tokens) if mask is None else block(tokens, attn_mask=mask)
    tokens = tokens if batch_first else tokens.transpose(0, 1)
    if backbone.kind == "text":
        return _projected(backbone, model.ln_final(token_layout(backbone).reduce(tokens, position)))
    return _projected(backbone, model._pool(tokens)[0])


def project(backbone: Backbone, feature: Tensor, width: int, *, tokens: bool) -> Tensor:
    """A side network's feature in the width of the classifier: zeros behind a narrow one.

    Zeros make the classifier's first columns the feature's own classifier, and the others without effect.

    Args:
        backbone: whose frozen projection is applied, where an open_clip tower has one.
        feature: ``(batch, features)``.
        width: what the classifier takes.
        tokens: whether the feature has the width of a token and passes the projection.

    Raises:
        ValueError: for a feature that is wider than the classifier's input.
    """
    if tokens:
        feature = _projected(backbone, feature)
    if feature.shape[1] > width:
        raise ValueError(
            f"the classifier must take at least {feature.shape[1]} features, the side network's width, got {width}"
        )
    return F.pad(feature, (0, width - feature.shape[1])) if feature.shape[1] < width else feature
