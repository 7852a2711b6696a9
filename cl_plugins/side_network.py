"""What every network beside a frozen backbone has in common: what it reads, and what it puts into the backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass
class TapRecord:
    """What one forward pass left for a side network.

    Attributes:
        taps: tokens ``(batch, tokens, dim)`` by tap index; learned registers, where there are any, in front.
        image: what the backbone was given, when a side network reads it; of a text tower always, token ids
            ``(batch, tokens)``.
        position: the token at which a text tower reads its feature ``(batch,)``.
        causal: whether a text tower's tokens attend to earlier ones and themselves alone.
    """

    taps: dict[int, Tensor] = field(default_factory=dict)
    image: Tensor | None = None
    position: Tensor | None = None
    causal: bool = False

    def rows(self, rows: Tensor) -> TapRecord:
        """What the pass left for samples ``(n,)`` of the batch."""
        image, position = (None if t is None else t[rows] for t in (self.image, self.position))
        return TapRecord({i: tap[rows] for i, tap in self.taps.items()}, image, position, self.causal)


@dataclass(frozen=True)
class Adaptation:
    """What a side network of its own puts into the frozen backbone for as long as a pass lasts.

    Attributes:
        registers: for each block, learned tokens ``(1, registers, dim)`` in front of the others.
        norms: for each block, weights by the norm's name and theirs, such as ``norms[0]["norm1"]["weight"]``.
    """

    registers: tuple[Tensor, ...]
    norms: tuple[Mapping[str, Mapping[str, nn.Parameter]], ...] = ()


class SideNetwork(nn.Module):
    """Base of the networks beside a backbone: maps a record of taps to the feature in front of the classifier.

    Attributes:
        tap_indices: taps that it reads.
        needs_image: whether it reads the image too.
        needs_base: whether it reads the backbone's own feature.
        in_token_space: whether its feature has the width of a token, so that open_clip's projection applies to it.
    """

    tap_indices: tuple[int, ...] = ()
    needs_image: bool = False
    needs_base: bool = False
    in_token_space: bool = False

    def forward(self, record: TapRecord, base: Tensor) -> Tensor:
        """The feature ``(batch, features)`` for a record and the backbone's own feature ``base``."""
        raise RuntimeError(
            f"`{type(self).__name__}` has no forward; use LadderSide, HierarchicalSide, SherlSide, AlphaSide"
        )

    def undecayed(self) -> list[nn.Parameter]:
        """Gates and mixing weights, which weight decay must leave alone."""
        return []

    def adaptation(self) -> Adaptation | None:
        """What the backbone must be given while its taps are taken; None for the backbone as it is."""
        return None
