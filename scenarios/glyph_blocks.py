"""Glyphs as a multi-domain stream: Unicode blocks as domains, the characters' names as class texts.

All characters are ones that the bundled vision-language model `clip_glyph` has never seen, neither image nor name, so
its accuracy before training is honest zero-shot accuracy. Every block is drawn in a style of its own, which the model
has not seen either: there is something to learn in each domain, and something to forget.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_plugins.clip_glyph import HELD_OUT

from .glyph_data import Degradation, GlyphSource
from .glyphs import glyph_name, stream_classes
from .multi_domain import MTIL, XTAIL
from .stream_data import StreamData

_COLUMN, _ROW = torch.arange(32).float(), torch.arange(32).float()[:, None]


def striped(images: Tensor) -> Tensor:
    """Before thin horizontal lines."""
    return 0.9 * images + 0.1 * ((_ROW // 2) % 2)


def checkered(images: Tensor) -> Tensor:
    """Before a chessboard."""
    return 0.9 * images + 0.1 * ((_ROW // 4 + _COLUMN // 4) % 2)


def ringed(images: Tensor) -> Tensor:
    """Inside a circle."""
    radius = ((_ROW - 15.5) ** 2 + (_COLUMN - 15.5) ** 2).sqrt()
    return torch.maximum(images, 0.2 * ((radius - 14.5).abs() < 1))


def shadowed(images: Tensor) -> Tensor:
    """With a shadow to the lower right."""
    return torch.maximum(images, 0.7 * torch.roll(images, (4, 4), (2, 3)))


def doubled(images: Tensor) -> Tensor:
    """Twice, four pixels apart."""
    return torch.maximum(images, torch.roll(images, 4, 3))


def outlined(images: Tensor) -> Tensor:
    """Rather the edge than the body."""
    edge = (1.3 * (F.max_pool2d(images, 3, 1, 1) - images)).clamp(0, 1)
    return 0.3 * images + 0.7 * edge


def thinned(images: Tensor) -> Tensor:
    """Strokes thinner by a pixel on each side."""
    return (-1.5 * F.max_pool2d(-images, 3, 1, 1)).clamp(0, 1)


def tilted(images: Tensor) -> Tensor:
    """Turned by 30 degrees."""
    cos, sin = math.cos(math.pi / 6), math.sin(math.pi / 6)
    turn = images.new_tensor([[cos, -sin, 0], [sin, cos, 0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


BLOCKS: dict[str, tuple[tuple[tuple[int, int], ...], Degradation]] = {
    "Latin-1 and Latin Extended-A": (((0x80, 0x17F),), striped),
    "Latin Extended-B": (((0x180, 0x24F),), shadowed),
    "Latin Extended Additional": (((0x1E00, 0x1EFF),), tilted),
    "IPA and Phonetic Extensions": (((0x250, 0x2AF), (0x1D00, 0x1DBF)), thinned),
    "Greek Extended": (((0x1F00, 0x1FFF),), outlined),
    "Cyrillic": (((0x400, 0x4FF),), doubled),
    "Mathematical Operators": (((0x2200, 0x22FF),), checkered),
    "Box Drawing": (((0x2500, 0x257F),), ringed),
}
"""First and last code points of each domain, and its style."""


def block_characters(name: str, n: int) -> tuple[int, ...]:
    """The first ``n`` characters of a domain that `clip_glyph` has not seen.

    Raises:
        ValueError: when there are fewer.

    Example:
        >>> [glyph_name(c) for c in block_characters("Mathematical Operators", 1)]
        ['SUPERSET OF OR EQUAL TO']
    """
    ranges = BLOCKS[name][0]
    found = tuple(c for c in stream_classes(HELD_OUT) if any(first <= c <= last for first, last in ranges))
    if not 1 <= n <= len(found):
        raise ValueError(f"`n_classes` must be from 1 to {len(found)}, the held-out characters of {name}, got {n!r}")
    return found[:n]


def block_domains(
    n_classes: int = 20,
    train_images: int = 16,
    validation_images: int = 4,
    test_images: int = 10,
    image_seed: int = 0,
    strength: float = 1.0,
) -> list[StreamData]:
    """The eight domains; training, validation and test images come from different fonts.

    Args:
        n_classes: characters of each block, from 1 to 21.
        train_images: training images a class; 16 as in X-TAIL.
        validation_images: validation images a class; 0 for none.
        test_images: test images a class.
        image_seed: draws the images.
        strength: of the distortions, see :func:`cl_plugins.scenarios.glyphs.render`.
    """
    domains = []
    for name, (_, style) in BLOCKS.items():
        characters = block_characters(name, n_classes)
        sources = {
            split: GlyphSource(characters, split, per_class, image_seed, strength, degrade=style)
            for split, per_class in (("train", train_images), ("validation", validation_images), ("test", test_images))
            if per_class or split != "validation"
        }
        domains.append(
            StreamData(
                sources["train"],
                sources["test"],
                sources.get("validation"),
                class_names=tuple(glyph_name(c) for c in characters),
                name=name,
                template="{}",  # the model knows bare names
            )
        )
    return domains


_DATA = ("n_classes", "train_images", "validation_images", "test_images", "image_seed", "strength")


def xtail_glyphs(**options: Any) -> XTAIL:
    """The stream with the choice among the names of all blocks.

    Args:
        options: of :func:`block_domains` and :class:`XTAIL`.
    """
    own = {k: options.pop(k) for k in _DATA if k in options}
    return XTAIL(block_domains(**own), **options)


def mtil_glyphs(**options: Any) -> MTIL:
    """The stream with the choice among the names of the image's own block.

    Args:
        options: of :func:`block_domains` and :class:`MTIL`.
    """
    own = {k: options.pop(k) for k in _DATA if k in options}
    return MTIL(block_domains(**own), **options)
