"""Images that lie in files: a list of paths with labels, read from class folders or from lists."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ._seeds import SPLIT, words
from .data import rank_in_class

_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp", ".tif", ".tiff"})


class ImageFiles:
    """Images in files, read as RGB when they are asked for.

    Args:
        paths: one file a sample.
        labels: its class, 0 or more.
        class_names: text of each label.

    Raises:
        ValueError: when the numbers differ.
    """

    def __init__(
        self, paths: Sequence[Path | str], labels: Sequence[int] | NDArray[np.int64], class_names: Sequence[str]
    ) -> None:
        if len(paths) != len(labels):
            raise ValueError(f"`labels` must be one for each of the {len(paths)} `paths`, got {len(labels)}")
        self.targets = np.asarray(labels, np.int64)
        self.samples = [(str(p), int(y)) for p, y in zip(paths, self.targets.tolist(), strict=True)]
        self.classes = list(class_names)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, label = self.samples[index]
        with Image.open(path) as image:
            return image.convert("RGB"), label

    def only(self, keep: NDArray[np.bool_]) -> ImageFiles:
        """The samples where ``keep`` is true."""
        chosen = np.flatnonzero(keep)
        return ImageFiles([self.samples[i][0] for i in chosen], self.targets[chosen], self.classes)


def need(name: str, folder: Path, parts: Iterable[str], how: str) -> None:
    """Refuse a folder that lacks parts of a data set.

    Raises:
        FileNotFoundError: naming the missing parts and how to get them.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"`root` must be the folder with {name}, got {str(folder)!r}, which is none; {how}")
    missing = [p for p in parts if not (folder / p).exists()]
    if missing:
        raise FileNotFoundError(f"`root` must hold {_some(missing)} of {name}, got {str(folder)!r} without; {how}")


def _some(texts: Sequence[str], most: int = 6) -> str:
    rest = len(texts) - most
    return ", ".join(texts[:most]) + (f" and {rest} more" if rest > 0 else "")


def image_names(folder: Path) -> list[str]:
    """File names of the images that lie directly in a folder, in alphabetical order."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if os.path.splitext(e.name)[1].lower() in _SUFFIXES)


def no_download(name: str, download: bool, how: str) -> None:
    """Refuse to download a data set that has no checksummed source.

    Raises:
        ValueError: saying ``how`` to get it.
    """
    if download:
        raise ValueError(f"`download` must be False for {name}, which has no checksummed source; {how}")


def class_folders(folder: Path, class_names: Sequence[str] | None = None) -> ImageFiles:
    """Images in one folder per class, ``<folder>/<class>/.../<image>``; classes and files in alphabetical order.

    Args:
        folder: holds the class folders.
        class_names: folders in label order; None takes all there are.

    Raises:
        FileNotFoundError: for a folder without class folders, or a class folder without images.
    """
    names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if class_names is None else list(class_names)
    if not names:
        raise FileNotFoundError(f"`root` must hold one folder of images per class, got {str(folder)!r} without folders")
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        files = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not files:
            raise FileNotFoundError(f"each class folder must hold images, got none in {str(folder / name)!r}")
        paths += files
        labels += [label] * len(files)
    return ImageFiles(paths, labels, names)


def listed_images(folder: Path, listing: Path, class_names: Sequence[str]) -> ImageFiles:
    """Images that a text file names, one path relative to ``folder`` a line; the class is the file's own folder.

    Raises:
        FileNotFoundError: for a missing list, or a listed file that is not there.
        ValueError: for a path whose folder is no class, or that leads out of ``folder``.
    """
    if not listing.is_file():
        raise FileNotFoundError(f"the list of images must be a text file, got {str(listing)!r}, which is none")
    number = {name: i for i, name in enumerate(class_names)}
    paths, labels = [], []
    for line in listing.read_text(encoding="utf-8").split("\n"):
        if not line.strip():
            continue
        path = folder / line.strip()
        if ".." in path.parts[len(folder.parts) :] or not path.is_relative_to(folder):  # links in it are the user's own
            raise ValueError(f"{listing.name} must name files below {str(folder)!r}, got {line.strip()!r} outside")
        if path.parent.name not in number:
            raise ValueError(f"{listing.name} must name files in class folders, got {line.strip()!r}")
        if not path.is_file():
            raise FileNotFoundError(f"{listing.name} names {line.strip()!r}, which is not in {str(folder)!r}")
        paths.append(path)
        labels.append(number[path.parent.name])
    return ImageFiles(paths, labels, class_names)


def seeded_halves(images: ImageFiles, fraction: float, seed: int) -> tuple[ImageFiles, ImageFiles]:
    """Training and test images; ``fraction`` of every class is for testing, drawn by ``seed``.

    Both have an image of every class that has two.
    """
    rank = rank_in_class(images.targets, words(SPLIT, seed, np.arange(len(images))))
    counts = np.bincount(images.targets)
    held = rank < np.minimum(np.maximum(np.round(fraction * counts), 1), counts - 1)[images.targets]
    return images.only(~held), images.only(held)
