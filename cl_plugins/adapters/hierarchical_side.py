"""Hierarchical side network: a pyramid of cross-attention stages fed by a vision transformer's intermediate tokens.

"Hierarchical Side-Tuning for Vision Transformers", Weifeng Lin, Ziheng Wu, Wentao Yang, Mingxin Huang, Jun Huang,
Lianwen Jin, 2023, arXiv 2310.05393. Implemented: register tokens, bridge, pyramid and its multi-scale output, as
described; and a variant of our own without registers that reads a frozen backbone. Not implemented: the detection and
segmentation heads.

Formula of side block i in stage s, for the output ``[m_i; patches]`` of backbone block i::

    e   = resize(bridge_s(patches) -> grid of the stage);   kv = [norm_i(bridge_s(m_i)); mean(e)]
    x   = x + attention(q = norm(x), kv);   x = x + e;   x = x + mlp(norm(x))
    feature = batch_norm(mean over tokens of the last stage)

The bridge acts per token and the weights of a bilinear resize sum to 1, so bridge and resize commute; the bridge goes
first, which keeps the wide map from being resized.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from timm.layers.drop import DropPath
from timm.models._features import FeatureInfo
from torch import Tensor, nn
from torch.nn import functional as F

from cl_plugins.adapters.strided_conv import StridedConv
from cl_plugins.backbones import find_backbone
from cl_plugins.side_network import Adaptation, SideNetwork, TapRecord
from cl_plugins.taps import BackboneTaps
from cl_plugins.tokens import TokenLayout, check_tokens, patch_grid, token_layout

STRIDES = (4, 8, 16, 32)
"""Of the pyramid's levels, in pixels."""

NORMS = ("norm1", "norm2", "ln_1", "ln_2")
"""Names of the norms of a block in timm and open_clip."""


def stage_depths(depth: int) -> tuple[int, int, int, int]:
    """Side blocks per stage, one for each block of the backbone; what does not divide goes to the later stages.

    Raises:
        ValueError: for fewer than four blocks.

    Example:
        >>> stage_depths(12), stage_depths(6)
        ((3, 3, 3, 3), (1, 1, 2, 2))
    """
    if depth < 4:
        raise ValueError(f"`depth` must give each of the 4 stages a block, got {depth!r}")
    a, b, c, d = (depth // 4 + (stage >= 4 - depth % 4) for stage in range(4))
    return a, b, c, d


class CrossAttention(nn.Module):
    """Attention of many tokens to a few, by the fused kernel."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """``(batch, tokens, dim)`` attends to ``(batch, keys, dim)``."""
        inputs = ((self.q, x), (self.k, context), (self.v, context))
        q, k, v = (layer(t).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer, t in inputs)
        result: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return result


class PyramidBlock(nn.Module):
    """One side block: cross-attention, injection of the backbone's map, feed-forward."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm_meta = nn.LayerNorm(dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim), nn.Dropout(dropout)
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, meta: Tensor, injection: Tensor) -> Tensor:
        """``x`` and ``injection`` ``(batch, tokens, dim)``, ``meta`` ``(batch, registers, dim)``."""
        context = torch.cat([self.norm_meta(meta), injection.mean(1, keepdim=True)], 1)
        x = x + self.drop_path(self.attn(self.norm1(x), context)) + injection
        result: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return result


class Stem(nn.Module):
    """Image to the first level: stride 4."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            StridedConv(channels, dim, bias=False),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Conv2d(dim, dim, 2, stride=2),
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens ``(batch, rows * columns, dim)`` and their grid."""
        x = self.conv(image)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class Downsample(nn.Module):
    """One level to the next: half the stride."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.proj = StridedConv(dim_in, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens of a map ``(batch, dim_in, rows, columns)`` and their grid."""
        if x.shape[2] == x.shape[3] == 1:  # torch 2.15's bfloat16 kernel on CPUs leaves its weight gradient unwritten
            x = F.conv2d(F.pad(x, (1, 1, 1, 1)), self.proj.weight, self.proj.bias, stride=2)
        else:
            x = self.proj(x)
        return self.norm(x.flatten(2).transpose(1, 2)), (x.shape[2], x.shape[3])


class HierarchicalSide(SideNetwork):
    """A four-level pyramid beside a vision transformer.

    Args:
        dim: width of the backbone.
        depth: blocks of the backbone, one side block each.
        registers: learned tokens per backbone block, as published 1. They make gradients flow through the whole
            backbone. With 0, the memory-lean variant of our own, the pyramid reads the class token of a frozen backbone
            instead.
        widths: of the levels; the published ones for classification.
        heads: of the levels.
        depths: side blocks per level; evenly when None.
        dropout: in the feed-forward layers.
        drop_path: of the last side block, rising linearly from 0; per data set in the paper, 0 to 0.2.
        channels: of the image.
        layout: of the backbone's tokens.
        blocks: of the backbone, whose norms are copied here and trained as published; none when empty. The backbone
            computes with these copies for as long as this network's own pass lasts, and keeps its own.

    Raises:
        ValueError: for depths that do not sum to the backbone's, or widths that heads do not divide.

    Example:
        >>> side = HierarchicalSide(768, depth=12)  # the published 764,840 without the backbone's 36,864 norm weights
        >>> sum(p.numel() for p in side.parameters())
        727976
    """

    needs_image = True

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        registers: int = 1,
        widths: Sequence[int] = (32, 48, 64, 72),
        heads: Sequence[int] = (2, 4, 8, 12),
        depths: Sequence[int] | None = None,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        channels: int = 3,
        layout: TokenLayout | None = None,
        blocks: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        depths = stage_depths(depth) if depths is None else tuple(depths)
        if len(depths) != 4 or sum(depths) != depth or min(depths) < 1:
            raise ValueError(f"`depths` must be 4 numbers that sum to {depth}, the backbone's blocks, got {depths!r}")
        if len(widths) != 4 or len(heads) != 4 or any(w % h for w, h in zip(widths, heads, strict=True)):
            raise ValueError(f"`widths` must be 4 multiples of `heads`, got {tuple(widths)!r} and {tuple(heads)!r}")
        if registers < 0:
            raise ValueError(f"`registers` must be 0 or more, got {registers!r}")
        self.layout = layout or TokenLayout(1, "token")
        self.depths, self.widths = depths, tuple(widths)
        self.tap_indices = tuple(range(1, depth + 1))
        self.registers = nn.ParameterList(
            nn.Parameter(torch.empty(1, registers, dim)) for _ in range(depth) if registers
        )
        self.embed = nn.ModuleList([Stem(channels, widths[0])])
        self.embed.extend(Downsample(a, b) for a, b in pairwise(widths))
        self.bridge = nn.ModuleList(nn.Linear(dim, w) for w in widths)
        rates = torch.linspace(0.0, drop_path, depth, device="cpu").tolist()
        stage_of = [s for s in range(4) for _ in range(depths[s])]
        self.blocks = nn.ModuleList(
            PyramidBlock(widths[s], heads[s], dropout, rate) for s, rate in zip(stage_of, rates, strict=True)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(w, eps=1e-6) for w in widths)
        self.batch_norm = nn.BatchNorm1d(widths[-1], eps=1e-6, affine=False)
        self.apply(_initialize)
        for register in self.registers:
            nn.init.xavier_uniform_(register)
        self.norms = nn.ModuleList(_copied_norms(block) for block in blocks)

    def undecayed(self) -> list[nn.Parameter]:
        """Nothing: the paper's optimizer leaves biases and norms alone, which the user's may do as well."""
        return []

    def adaptation(self) -> Adaptation | None:
        """Registers and norms, where there are any."""
        if not len(self.registers):
            return None
        norms = tuple({n: dict(own.named_parameters()) for n, own in block.named_children()} for block in self.norms)
        return Adaptation(tuple(self.registers), norms)

    def pyramid(self, record: TapRecord) -> list[Tensor]:
        """The four levels ``(batch, width, rows, columns)``, at strides 4, 8, 16 and 32."""
        assert record.image is not None
        height, width = record.image.shape[2:]
        n_registers = self.registers[0].shape[1] if len(self.registers) else 0
        levels: list[Tensor] = []
        source, index = record.image, 0
        for stage in range(4):
            x, grid = self.embed[stage](source)
            for _ in range(self.depths[stage]):
                bridged = self.bridge[stage](record.taps[index + 1])  # (batch, registers + prefix + patches, width_s)
                patches = bridged[:, n_registers + self.layout.prefix :]
                if n_registers or self.layout.prefix:
                    meta = bridged[:, : n_registers or 1]
                else:
                    meta = patches.mean(1, keepdim=True)
                x = self.blocks[index](x, meta, _resize(patches, patch_grid(patches.shape[1], height, width), grid))
                index += 1
            source = self.norm[stage](x).transpose(1, 2).unflatten(2, grid)
            levels.append(source)
        return levels

    def forward(self, record: TapRecord, base: Tensor) -> Tensor:
        """The feature ``(batch, widths[-1])``."""
        pooled = self.pyramid(record)[-1].flatten(2).mean(2)
        norm = self.batch_norm
        if norm.training and len(pooled) == 1:  # one sample has no variance: its statistics are not used
            return F.batch_norm(pooled, norm.running_mean, norm.running_var, eps=norm.eps)
        feature: Tensor = norm(pooled)
        return feature


def _resize(tokens: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Tokens of one grid as tokens of another, bilinear."""
    if grid == to:
        return tokens
    maps = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
    return F.interpolate(maps, size=to, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def _copied_norms(block: nn.Module) -> nn.ModuleDict:
    """Weights of the norms of a block, as parameters of their own."""
    norms = {n: m for n, m in block.named_children() if n in NORMS}
    copies = {n: {k: nn.Parameter(p.detach().clone()) for k, p in m.named_parameters()} for n, m in norms.items()}
    return nn.ModuleDict({n: nn.ParameterDict(values) for n, values in copies.items() if values})


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class HierarchicalFeatures(nn.Module):
    """A frozen transformer with a pyramid beside it, as a multi-scale encoder in timm's ``features_only`` convention.

    A detector or segmenter can stand on it: ``forward`` gives a list of maps, :attr:`feature_info` their channels and
    strides.

    Args:
        model: a timm ViT or an open_clip vision tower; frozen here.
        **options: of :class:`HierarchicalSide`; the paper's widths for dense tasks are ``(64, 128, 256, 384)``.

    Example:
        >>> from cl_plugins.backbones import vit_glyph
        >>> encoder = HierarchicalFeatures(vit_glyph(num_classes=0))
        >>> [tuple(m.shape[1:]) for m in encoder(torch.zeros(1, 3, 32, 32))], encoder.feature_info.reduction()
        ([(32, 8, 8), (48, 4, 4), (64, 2, 2), (72, 1, 1)], [4, 8, 16, 32])
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        backbone = find_backbone(model)
        check_tokens(backbone)
        self.side = HierarchicalSide(
            backbone.embed_dim, len(backbone.blocks), layout=token_layout(backbone), **{"registers": 0, **options}
        )
        if len(self.side.registers):
            raise ValueError("`registers` must be 0 beside a frozen backbone; they would need gradients through it")
        self.taps = BackboneTaps(backbone).attach()
        self.taps.want(self.side.tap_indices, image=True)
        self.taps.needs_final = False
        levels = zip(self.side.widths, STRIDES, strict=True)
        info = [{"num_chs": w, "reduction": r, "module": f"side.norm.{i}"} for i, (w, r) in enumerate(levels)]
        self.feature_info = FeatureInfo(info, out_indices=tuple(range(4)))

    def forward(self, image: Tensor) -> list[Tensor]:
        """Maps ``(batch, width, rows, columns)`` of an image ``(batch, channels, height, width)``."""
        backbone: Any = self.model
        backbone.forward_features(image) if self.taps.backbone.kind == "timm" else backbone(image)
        return self.side.pyramid(self.taps.take())
