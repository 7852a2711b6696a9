"""Finding the backbone in a user's module, and the small pretrained one that comes with the package.

timm and open_clip models are recognized by what they offer (``blocks`` and ``forward_features``;
``transformer.resblocks``), not by their classes, so subclasses and look-alikes work too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from cl_plugins._text import did_you_mean

WEIGHTS = Path(__file__).parent / "weights"
VIT_GLYPH: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
"""Arguments of the bundled backbone's architecture: 1.2 M parameters, 17 tokens of width 128."""

default_cfgs = generate_default_cfgs(
    {
        "vit_glyph.glyph400": {
            "file": str(WEIGHTS / "vit_glyph.safetensors"),
            "input_size": (3, 32, 32),
            "num_classes": 0,
            "mean": (0.0, 0.0, 0.0),
            "std": (1.0, 1.0, 1.0),
            "interpolation": "bilinear",
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def vit_glyph(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The bundled backbone: a small ViT that was trained to tell 400 glyphs apart (see its model card).

    Args:
        pretrained: load the weights in the package; nothing is downloaded.
        **kwargs: any argument of timm's ``VisionTransformer``.

    Example:
        >>> vit_glyph(num_classes=10).num_features
        128
    """
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer, "vit_glyph", pretrained, **{**VIT_GLYPH, **kwargs}
    )
    return model


def create_backbone(name: str, num_classes: int, pretrained: bool = True, **kwargs: Any) -> nn.Module:
    """A timm model by name, ``"vit_glyph"`` included.

    Args:
        name: any name that timm knows.
        num_classes: outputs of the head; 0 for features only.
        pretrained: load pretrained weights; only ``vit_glyph`` has them without a download.
        **kwargs: further arguments of the model.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    if not timm.is_model(name.split(".")[0]):
        raise ValueError(f"`name` must be a timm model, got {name!r}{did_you_mean(name, timm.list_models())}")
    model: nn.Module = timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **kwargs)
    return model


@dataclass(frozen=True)
class Backbone:
    """A transformer inside a user's module.

    Attributes:
        name: dotted path in that module; ``""`` when it is the module itself.
        model: the transformer.
        kind: ``"timm"``; ``"open_clip"`` for a vision tower of open_clip, ``"text"`` for its text tower.
        blocks: its residual blocks in order of depth.
        embed_dim: width of a token.
        num_heads: attention heads of a block.
    """

    name: str
    model: nn.Module
    kind: Literal["timm", "open_clip", "text"]
    blocks: tuple[nn.Module, ...]
    embed_dim: int
    num_heads: int


def _as_backbone(name: str, module: nn.Module) -> Backbone | None:
    attention: Any
    blocks = getattr(module, "blocks", None)
    if isinstance(blocks, nn.Sequential | nn.ModuleList) and len(blocks) and hasattr(module, "forward_features"):
        attention = getattr(blocks[0], "attn", None)
        width = getattr(module, "embed_dim", None) or getattr(module, "num_features", None)
        if hasattr(attention, "num_heads") and isinstance(width, int):
            return Backbone(name, module, "timm", tuple(blocks), width, int(attention.num_heads))
    resblocks = getattr(getattr(module, "transformer", None), "resblocks", None)
    if isinstance(resblocks, nn.Sequential | nn.ModuleList) and len(resblocks) and hasattr(module, "conv1"):
        attention = getattr(resblocks[0], "attn", None)
        if attention is None:
            return None
        return Backbone(name, module, "open_clip", tuple(resblocks), int(attention.embed_dim), int(attention.num_heads))
    return None


def _as_text_tower(name: str, module: nn.Module) -> Backbone | None:
    """A text tower of open_clip: the tower itself, or a CLIP that holds its parts."""
    blocks = getattr(getattr(module, "transformer", None), "resblocks", None)
    known = all(hasattr(module, n) for n in ("token_embedding", "ln_final", "text_projection"))
    if not known or not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
        return None
    attention: Any = getattr(blocks[0], "attn", None)
    if attention is None:
        return None
    mask: Any = getattr(module, "attn_mask", None)
    if mask is not None and not mask.is_meta and not torch.equal(mask == 0, torch.ones_like(mask).tril() > 0):
        raise ValueError(f"`attn_mask` of the text tower {name or type(module).__name__!r} must be causal, got another")
    pool = getattr(module, "text_pool_type", None) or getattr(module, "pool_type", None)
    if getattr(module, "cls_emb", None) is not None or getattr(module, "use_pad_mask", False):
        raise ValueError(
            f"the text tower {name or type(module).__name__!r} must have one mask for all texts, got one with a class"
            " token or a mask of its padding (as in CoCa); LoRA and MoRA take it"
        )
    if pool not in ("argmax", "eos", "first", "last") or getattr(module, "output_tokens", False):
        raise ValueError(
            f"the text tower {name or type(module).__name__!r} must give one feature, read at one token, got"
            f" pool_type={pool!r}, output_tokens={getattr(module, 'output_tokens', False)!r}"
        )
    return Backbone(name, module, "text", tuple(blocks), int(attention.embed_dim), int(attention.num_heads))


def _as_called_text_tower(name: str, module: nn.Module) -> Backbone | None:
    """A text tower with a forward pass of its own; a CLIP that is one by its ``encode_text`` must be named."""
    return None if hasattr(module, "encode_text") else _as_text_tower(name, module)


def _text_towers(module: nn.Module) -> list[str]:
    """Names of text transformers inside: open_clip's text towers and language models of transformers."""
    return [
        path or type(child).__name__
        for path, child in module.named_modules()
        if (hasattr(getattr(child, "transformer", None), "resblocks") and not hasattr(child, "conv1"))
        or (isinstance(getattr(child, "layers", None), nn.ModuleList) and hasattr(child, "embed_tokens"))
    ]


_LANGUAGE = (
    "it is no text tower of open_clip, which is pooled at the end of the text; LoRA and MoRA take text transformers"
)
_TEXT = (
    "its tokens attend to earlier ones only and its feature is read at the end of the text, where these methods expect"
    " an image's patches; LoRA and MoRA take text transformers"
)


def _candidates(
    module: nn.Module, ours: set[int], as_backbone: Callable[[str, nn.Module], Backbone | None]
) -> list[Backbone]:
    """Transformers in ``module``, the outermost ones, but none of this library's own modules."""
    candidates: list[Backbone] = []
    for path, child in module.named_modules():
        inside = any(path.startswith(f"{c.name}.") or c.name == "" for c in candidates)
        wrapper = "_orig_mod" in child._modules  # of `torch.compile`; what it wraps is visited next
        found = None if inside or wrapper or id(child) in ours else as_backbone(path, child)
        if found is not None:
            candidates.append(found)
    return candidates


def find_backbone(module: nn.Module, name: str | None = None, *, text: bool = False) -> Backbone:
    """The one transformer in ``module``; where ``torch.compile`` wraps it, what is inside the wrapper.

    Args:
        module: a LightningModule or any other module that holds, or is, a timm ViT or an open_clip vision tower.
        name: dotted path of the transformer, for modules that hold several.
        text: take a text tower of open_clip as well, where ``name`` says so or there is no other transformer. A CLIP
            that holds its text tower's parts itself is one by name alone.

    Raises:
        ValueError: when there is none, or several and ``name`` does not choose; for a text tower that has no causal or
            open mask, or gives more than one feature.

    Example:
        >>> find_backbone(nn.ModuleDict({"net": vit_glyph()})).name
        'net'
    """
    if name is not None:
        names = dict(module.named_modules())
        if name not in names:
            raise ValueError(f"`backbone` must be a submodule's name, got {name!r}{did_you_mean(name, names)}")
        if "_orig_mod" in names[name]._modules:  # of `torch.compile`
            name = f"{name}._orig_mod".lstrip(".")
        found = _as_backbone(name, names[name])
        if found is None and text:
            found = _as_text_tower(name, names[name])
        if found is None:
            why = f"; {_LANGUAGE if text else _TEXT}" if _text_towers(names[name]) else ""
            raise ValueError(
                f"`backbone` must be a timm ViT or an open_clip {'tower' if text else 'vision tower'}, got {name!r},"
                f" a {type(names[name]).__name__}{why}"
            )
        return found
    skipped = getattr(module, "plugins", None)
    ours = {id(m) for m in skipped.modules()} if isinstance(skipped, nn.Module) else set()
    candidates = _candidates(module, ours, _as_backbone)
    if text and not candidates:
        candidates = _candidates(module, ours, _as_called_text_tower)
    if not candidates and (towers := _text_towers(module)):
        raise ValueError(
            f"`{type(module).__name__}` must hold a timm ViT or an open_clip {'tower' if text else 'vision tower'},"
            f" found only the text transformer {towers[0]!r}; {_LANGUAGE if text else _TEXT}"
        )
    if not candidates:
        raise ValueError(
            f"`{type(module).__name__}` must hold a transformer backbone (a timm ViT or an open_clip vision tower),"
            " found none; build it in __init__, or pass `backbone=` with its attribute name"
        )
    if len(candidates) > 1:
        raise ValueError(
            f"`{type(module).__name__}` holds {len(candidates)} backbones: {', '.join(c.name for c in candidates)};"
            " pass `backbone=` with the name of the one to use"
        )
    return candidates[0]
