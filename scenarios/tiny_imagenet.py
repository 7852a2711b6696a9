"""Tiny-ImageNet: 200 classes of ImageNet at 64 x 64 pixels (Le and Yang, Stanford CS 231N, 2015)."""

from __future__ import annotations

import os
from pathlib import Path

from .benchmarks import crop_transforms, data_folder
from .fetch import fetch
from .image_files import ImageFiles, image_names, need
from .stream_data import StreamData

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
"""No sum is published beside the archive; this is the one that public loaders state."""
FOLDER = "tiny-imagenet-200"


def load_tiny_imagenet(root: str | None = None, download: bool = False, size: int = 224) -> StreamData:
    """Tiny-ImageNet: 100,000 training images, 500 a class; 10,000 validation images, 50 a class, for testing.

    The labels of the official test images were never published, so the field tests on the validation images, and so
    does this. Labels number the WordNet ids in alphabetical order, as torchvision's ImageFolder does; names are the
    first of each line of ``words.txt``. Split into 10 tasks of 20 classes unless said otherwise.

    Args:
        root: ``tiny-imagenet-200``, or the folder that holds or gets it.
        download: get it, 248 MB, checksummed; goes on after an interruption.
        size: of the images given out; 64 keeps the size of the files.

    Raises:
        ValueError: without a folder.
        FileNotFoundError: when parts are not there, naming them.
        ConnectionError: when the download breaks; the next one goes on.
    """
    how = f"pass `download=True` to get it, or unpack {URL} there"
    folder = data_folder(root, "Tiny-ImageNet", how)
    if folder.name != FOLDER and not (folder / "wnids.txt").is_file():
        if download and not (folder / FOLDER).is_dir():
            from torchvision.datasets.utils import extract_archive

            extract_archive(str(fetch(URL, folder / f"{FOLDER}.zip", MD5)), str(folder))
        if (folder / FOLDER).is_dir():
            folder = folder / FOLDER
    need("Tiny-ImageNet", folder, ("wnids.txt", "words.txt", "train", "val/images", "val/val_annotations.txt"), how)
    ids = sorted((folder / "wnids.txt").read_text(encoding="utf-8").split())
    need("Tiny-ImageNet", folder, [f"train/{i}/images" for i in ids], how)
    lines = (folder / "words.txt").read_text(encoding="utf-8").splitlines()
    words = {i: text.partition(",")[0].strip() for i, _, text in (line.partition("\t") for line in lines)}
    names = [words.get(i, i) for i in ids]
    transforms = crop_transforms(size, squash=True)
    return StreamData(
        _training(folder, ids, names, how),
        _validation(folder, ids, names, how),
        class_names=tuple(names),
        train_transform=transforms[0],
        eval_transform=transforms[1],
        n_tasks=10,
        name="tiny-imagenet",
    )


def _training(folder: Path, ids: list[str], names: list[str], how: str) -> ImageFiles:
    paths: list[str] = []
    labels: list[int] = []
    for label, own in enumerate(ids):
        place = folder / "train" / own / "images"
        files = image_names(place)
        if not files:
            raise FileNotFoundError(f"each class folder must hold images, got none in {str(place)!r}; {how}")
        paths += [os.path.join(place, name) for name in files]
        labels += [label] * len(files)
    return ImageFiles(paths, labels, names)


def _validation(folder: Path, ids: list[str], names: list[str], how: str) -> ImageFiles:
    number = {own: label for label, own in enumerate(ids)}
    there = set(image_names(folder / "val" / "images"))
    paths: list[Path] = []
    labels: list[int] = []
    for line in (folder / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        name, own = [*line.split("\t"), ""][:2]
        if own not in number:
            raise ValueError(f"val_annotations.txt must name classes of wnids.txt, got {own!r} in line {line!r}")
        if name not in there:
            raise FileNotFoundError(
                f"`root` must hold every listed image, got no val/images/{name} in {str(folder)!r}; {how}"
            )
        paths.append(folder / "val" / "images" / name)
        labels.append(number[own])
    return ImageFiles(paths, labels, names)
