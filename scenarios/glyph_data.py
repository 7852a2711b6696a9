"""Glyphs as a data set: images are rendered in whole batches when they are asked for, and never stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ._seeds import words
from .glyphs import SPLIT_FACES, Stencils, glyph_name, render, stream_classes
from .stream_data import StreamData

Degradation = Callable[[Tensor], Tensor]
_SPLITS = ("train", "validation", "test")


class GlyphSource:
    """Images of characters; image i of a class is a function of (split, character, i, seed).

    Args:
        code_points: one per class, in label order.
        split: ``"train"``, ``"validation"`` or ``"test"``; each has fonts of its own (:data:`SPLIT_FACES`).
        per_class: images of each class.
        seed: draws the images.
        strength: of the distortions, see :func:`cl_plugins.scenarios.glyphs.render`.
        faces: use these fonts of the split alone.
        degrade: changes a batch of images ``(batch, 3, 32, 32)``; a plain function, so that workers can have it.

    Raises:
        ValueError: for an unknown split or fewer than one image.

    Example:
        >>> GlyphSource([ord("a"), ord("b")], "test", per_class=3).read_batch(np.array([0, 5])).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(
        self,
        code_points: Sequence[int],
        split: str,
        per_class: int,
        seed: int = 0,
        strength: float = 1.0,
        faces: Sequence[str] | None = None,
        degrade: Degradation | None = None,
    ) -> None:
        if split not in SPLIT_FACES:
            raise ValueError(f"`split` must be one of {_SPLITS}, got {split!r}")
        if per_class < 1:
            raise ValueError(f"`per_class` must be 1 or more, got {per_class!r}")
        self.split, self.per_class, self.seed, self.strength = split, per_class, seed, strength
        self.labels: NDArray[np.int64] = np.repeat(np.arange(len(code_points)), per_class)
        self._code_points = np.asarray(code_points, np.int64)
        self.degrade = degrade
        self._stencils = Stencils(code_points, SPLIT_FACES[split] if faces is None else faces)

    def __len__(self) -> int:
        return len(self.labels)

    def read_batch(self, indices: NDArray[np.int64]) -> Tensor:
        """Images ``(batch, 3, 32, 32)`` in [0, 1] of these samples."""
        labels, numbers = np.divmod(indices, self.per_class)
        seeds = words(_SPLITS.index(self.split), self.seed, self._code_points[labels], numbers)
        images = render(self._stencils, labels, seeds, self.strength)
        return images if self.degrade is None else self.degrade(images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.read_batch(np.array([index]))[0], int(self.labels[index])


def load_glyphs(
    n_classes: int = 100,
    train_images: int = 60,
    validation_images: int = 10,
    test_images: int = 20,
    n_tasks: int = 10,
    seed: int = 0,
    strength: float = 1.3,
) -> StreamData:
    """Glyph images of characters that the bundled backbones have not seen.

    Args:
        n_classes: number of characters, at most about 1,900.
        train_images: training images a class, in ten fonts.
        validation_images: validation images a class, in two further fonts.
        test_images: test images a class, in four further fonts.
        n_tasks: number of tasks when nobody says otherwise.
        seed: draws the images.
        strength: of the distortions; 1.3 is stronger than in the backbones' pretraining, which leaves room above the
            closed-form heads.

    Returns:
        Data with the characters' Unicode names as class names.
    """
    code_points = stream_classes(n_classes)
    return StreamData(
        train=GlyphSource(code_points, "train", train_images, seed, strength),
        test=GlyphSource(code_points, "test", test_images, seed, strength),
        validation=GlyphSource(code_points, "validation", validation_images, seed, strength)
        if validation_images
        else None,
        class_names=tuple(glyph_name(c) for c in code_points),
        n_tasks=n_tasks,
        name=f"glyphs-{n_classes}",
    )
