"""Side-Tuning: a small network beside the frozen one, blended into its feature.

"Side-Tuning: A Baseline for Network Adaptation via Additive Side Networks", Jeffrey O. Zhang, Alexander Sax, Amir
Zamir, Leonidas Guibas, Jitendra Malik, ECCV 2020, arXiv 1912.13503. Implemented: the blend with a learned scalar, sum,
product, FiLM and MLP merges, initialization by distillation, the dense variant for task streams (in
:mod:`cl_plugins.adapters.side_bank`). FiLM is written from its definition, with our own first values that leave the
backbone's feature as it is. Not implemented: lateral connections, which are progressive networks and need the layers of
two convolutional bases to match; a transformer has none to connect.

Formula, for the backbone's feature ``B`` and the side network's ``S``::

    R(x) = alpha B(x) + (1 - alpha) S(x),   alpha = sigmoid(a),  a = 0 at first
    FiLM: R(x) = (1 + gamma(S)) B(x) + beta(S),   gamma, beta linear and 0 at first
    distillation before training: mean (S(x) - B(x))^2
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_plugins._text import did_you_mean
from cl_plugins.adapters.strided_conv import StridedConv
from cl_plugins.side_network import SideNetwork, TapRecord

Merge = Literal["alpha", "sum", "product", "film", "mlp"]


class ConvSide(nn.Module):
    """Four strided convolutions, mean over the image, a linear layer: the side network.

    Group norm stands in for batch norm, whose statistics would drift over a stream of tasks.

    Args:
        features: width of the output.
        width: channels of the first layer; they double up to four times it.
        channels: of the image.

    Example:
        >>> ConvSide(16, width=8)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 16])
    """

    def __init__(self, features: int, width: int = 32, channels: int = 3) -> None:
        super().__init__()
        sizes = [channels, width, 2 * width, 4 * width, 4 * width]
        layers: list[nn.Module] = []
        for n_in, n_out in pairwise(sizes):
            layers += [StridedConv(n_in, n_out, bias=False), nn.GroupNorm(1, n_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(sizes[-1], features)

    def forward(self, image: Tensor) -> Tensor:
        """``(batch, features)`` for ``(batch, channels, height, width)``."""
        feature: Tensor = self.out(self.layers(image).mean((2, 3)))
        return feature


class TokenSide(nn.Module):
    """The same for texts, of this library's making: an embedding, four convolutions over neighbors, mean over the text.

    What lies behind the end of the text is padding and never counts.

    Args:
        features: width of the output.
        vocabulary: number of tokens.
        width: of the embedding and of the first layer; it doubles up to four times it.

    Example:
        >>> TokenSide(16, vocabulary=10, width=8)(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 16])
    """

    def __init__(self, features: int, vocabulary: int, width: int = 32) -> None:
        super().__init__()
        sizes = [width, width, 2 * width, 4 * width, 4 * width]
        self.embed = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.convs = nn.ModuleList(nn.Conv1d(a, b, 3, padding=1, bias=False) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.LayerNorm(b) for b in sizes[1:])
        self.out = nn.Linear(sizes[-1], features)

    def forward(self, ids: Tensor, last: Tensor | None = None) -> Tensor:
        """``(batch, features)`` for token ids ``(batch, tokens)`` and the position of each text's end ``(batch,)``."""
        kept = torch.ones_like(ids) if last is None else torch.arange(ids.shape[1], device=ids.device) <= last[:, None]
        x: Tensor = self.embed(ids)
        counts = kept[:, :, None].to(x.dtype)  # (batch, tokens, 1)
        x = x * counts
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x.transpose(1, 2)).transpose(1, 2)).relu() * counts
        feature: Tensor = self.out(x.sum(1) / counts.sum(1))
        return feature


class AlphaSide(SideNetwork):
    """A small network on the image, blended into the backbone's feature.

    Args:
        features: width of the backbone's feature.
        width: of the side network's first layer.
        merge: "alpha" as published; "sum", "product", "film" (the side scales and shifts the backbone's feature) and
            "mlp" (of both features, concatenated) are its ablations.
        channels: of the image.
        vocabulary: tokens of the text tower that it stands beside; None for images.
        ends: whether that tower reads its feature at the end of the text, with padding behind it.

    Raises:
        ValueError: for an unknown merge.

    Example:
        >>> side = AlphaSide(16, width=8)
        >>> record, base = TapRecord(image=torch.zeros(2, 3, 32, 32)), torch.ones(2, 16)
        >>> side.alpha.item(), side(record, base).shape
        (0.5, torch.Size([2, 16]))
    """

    needs_image = True
    needs_base = True

    def __init__(
        self,
        features: int,
        width: int = 32,
        merge: Merge = "alpha",
        channels: int = 3,
        *,
        vocabulary: int | None = None,
        ends: bool = False,
    ) -> None:
        super().__init__()
        if merge not in get_args(Merge):
            known = get_args(Merge)
            raise ValueError(f"`merge` must be one of {', '.join(known)}, got {merge!r}{did_you_mean(merge, known)}")
        if width < 1:
            raise ValueError(f"`width` must be 1 or more, got {width!r}")
        self.merge, self.ends = merge, ends
        self.network: ConvSide | TokenSide = (
            ConvSide(features, width, channels) if vocabulary is None else TokenSide(features, vocabulary, width)
        )
        self.blend = nn.Parameter(torch.zeros(())) if merge == "alpha" else None
        self.mlp = (
            nn.Sequential(nn.Linear(2 * features, features), nn.ReLU(), nn.Linear(features, features))
            if merge == "mlp"
            else None
        )

        self.film = nn.Linear(features, 2 * features) if merge == "film" else None
        if self.film is not None:
            nn.init.zeros_(self.film.weight)
            nn.init.zeros_(self.film.bias)

    @property
    def alpha(self) -> Tensor:
        """Weight of the backbone's feature.

        Raises:
            RuntimeError: for another merge than "alpha".
        """
        if self.blend is None:
            raise RuntimeError(f"`alpha` belongs to merge='alpha', got merge={self.merge!r}")
        return self.blend.sigmoid()

    def undecayed(self) -> list[nn.Parameter]:
        """The blend."""
        return [] if self.blend is None else [self.blend]

    def _own(self, record: TapRecord) -> Tensor:
        assert record.image is not None
        if isinstance(self.network, TokenSide):
            feature: Tensor = self.network(record.image, record.position if self.ends else None)
        else:
            feature = self.network(record.image)
        return feature

    def distillation_loss(self, record: TapRecord, base: Tensor) -> Tensor:
        """How far the side network is from the backbone."""
        own = self._own(record)
        return F.mse_loss(own, base.to(own.dtype))  # a stored feature may be in half precision

    def forward(self, record: TapRecord, base: Tensor) -> Tensor:
        """The feature ``(batch, features)``."""
        own = self._own(record)
        if self.merge == "alpha":
            return own + self.alpha * (base - own)
        if self.merge == "sum":
            return base + own
        if self.merge == "product":
            return base * own
        if self.film is not None:
            gamma, beta = self.film(own).chunk(2, 1)
            shifted: Tensor = (1 + gamma) * base + beta
            return shifted
        assert self.mlp is not None
        merged: Tensor = self.mlp(torch.cat([base, own], 1))
        return merged
