"""Glyphs as domains: the same characters in other fonts, then in other states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .domains import DomainIncremental
from .glyph_data import Degradation, GlyphSource
from .glyphs import SPLIT_FACES, Stencils, glyph_name, stream_classes
from .stream_data import StreamData


def inverted(images: Tensor) -> Tensor:
    """Dark on light."""
    return 1 - images


def blurred(images: Tensor) -> Tensor:
    """Reduced to 8 x 8 and enlarged again."""
    return F.interpolate(F.avg_pool2d(images, 4), scale_factor=4, mode="bilinear", align_corners=False)


def faint(images: Tensor) -> Tensor:
    """A quarter of the contrast, on grey."""
    return 0.375 + 0.25 * images


def turned(images: Tensor) -> Tensor:
    """A quarter turn to the left."""
    return torch.rot90(images, 1, (2, 3))


FAMILIES = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")
DEGRADATIONS: dict[str, Degradation] = {"inverted": inverted, "blurred": blurred, "faint": faint, "turned": turned}


def family_faces(split: str, family: str) -> tuple[str, ...]:
    """Fonts of one family in a split: the family's name, alone or with a style behind a hyphen."""
    upright = {"STIXGeneral": ("STIXGeneral", "STIXGeneralItalic", "STIXGeneralBol", "STIXGeneralBolIta")}
    return tuple(
        f for f in SPLIT_FACES[split] if f in upright.get(family, ()) or f.partition("-")[0] == family
    )  # fmt: skip


def common_classes(n: int) -> tuple[int, ...]:
    """The first ``n`` stream characters that every family has, for training and for testing.

    Raises:
        ValueError: when there are fewer.
    """
    found: list[int] = []
    for code_point in stream_classes():
        if len(found) == n:
            break
        if all(_drawable(code_point, family_faces(s, f)) for s in ("train", "test") for f in FAMILIES):
            found.append(code_point)
    if len(found) < n:
        raise ValueError(f"`n_classes` must be at most {len(found)}, the characters that all fonts have, got {n!r}")
    return tuple(found)


def _drawable(code_point: int, faces: tuple[str, ...]) -> bool:
    try:
        Stencils([code_point], faces)
    except ValueError:
        return False
    return True


def domain_glyphs(
    n_classes: int = 50, train_images: int = 20, test_images: int = 10, image_seed: int = 0, **options: Any
) -> DomainIncremental:
    """The same characters in eight domains: four font families, then four states of all fonts.

    Training and test images of a domain come from different fonts of its family.

    Args:
        n_classes: number of characters.
        train_images: training images a class and domain.
        test_images: test images a class and domain.
        image_seed: draws the images.
        options: of :class:`DomainIncremental`.

    Raises:
        ValueError: for more characters than all fonts have.
    """
    code_points = common_classes(n_classes)
    names = tuple(glyph_name(c) for c in code_points)
    domains, texts = [], []
    for number, text in enumerate((*FAMILIES, *DEGRADATIONS)):
        degrade = DEGRADATIONS.get(text)
        sources = [
            GlyphSource(
                code_points,
                split,
                per_class,
                image_seed * 100 + number,
                faces=None if degrade else family_faces(split, text),
                degrade=degrade,
            )
            for split, per_class in (("train", train_images), ("test", test_images))
        ]
        domains.append(StreamData(sources[0], sources[1], class_names=names, name="glyphs"))
        texts.append(text)
    options.setdefault("names", texts)
    return DomainIncremental(domains, **options)
