"""The eleven image sets of MTIL and X-TAIL, in the folders that torchvision reads and, where it can, downloads.

All lie below one ``root``. Training and test images are the official ones; where a set has training and validation
images apart, both are trained on. Caltech101, EuroSAT and SUN397 have no official split here, so that of every class a
seeded fifth is for testing. A file ``split_zhou_<Set>.json`` of CoOp (Zhou, Yang, Loy and Liu, 2022, arXiv 2109.01134)
in a set's folder, with the lists "train", "val" and "test" of ``[path, label, class name]``, replaces all that for its
set. Templates are those of CoOp, for MNIST that of CLIP (arXiv 2103.00020), for CIFAR-100 the generic one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .benchmarks import crop_transforms, data_folder
from .image_files import ImageFiles, class_folders, need, seeded_halves
from .stream_data import StreamData
from .transfer_archives import get_archives

_Parts = tuple[Any, Any, Sequence[str]]
_GENERIC = "a photo of a {}."


@dataclass(frozen=True)
class TransferSet:
    """One of the sets on disk.

    Attributes:
        title: in messages.
        folder: its folder in ``root``.
        parts: what must be in there.
        template: text of a class.
        read: ``(root, download)`` to training data, test data and class names.
        images: folder of the images, which the paths of a CoOp list start from.
        split: name of CoOp's list.
        source: where to get it when torchvision cannot.
    """

    title: str
    folder: str
    parts: tuple[str, ...]
    template: str
    read: Callable[[Path, bool], _Parts]
    images: str = ""
    split: str = ""
    source: str = ""

    @property
    def how(self) -> str:
        """What to do when it is not there."""
        here = f"put {', '.join(self.parts)} in {self.folder} there"
        return f"{here}, from {self.source}" if self.source else f"{here}, or pass `download=True`"


class _Colored:
    """Gray images as RGB."""

    def __init__(self, data: Any) -> None:
        self.data, self.targets = data, data.targets

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, label = self.data[index]
        return image.convert("RGB"), label


def _files(parts: Sequence[Any], names: Sequence[str]) -> ImageFiles:
    """Torchvision data sets of one folder as paths and labels."""
    paths: list[Path] = []
    labels: list[int] = []
    for data in parts:
        found = getattr(data, "_image_files", None) or getattr(data, "_images", None)
        paths += [Path(p) for p in (found or [path for path, _ in data._samples])]
        labels += [int(y) for y in (data._labels if found else [label for _, label in data._samples])]
    return ImageFiles(paths, labels, names)


def _plain(names: Sequence[str]) -> list[str]:
    return [n.replace("_", " ") for n in names]


def _all_there(title: str, folder: Path, names: Sequence[str], n: int) -> None:
    if len(names) != n:
        raise FileNotFoundError(f"{str(folder)!r} must hold the {n} class folders of {title}, got {len(names)}")


def _aircraft(root: Path, download: bool) -> _Parts:
    from torchvision.datasets import FGVCAircraft

    train, test = (FGVCAircraft(str(root), split=s, download=download) for s in ("trainval", "test"))
    return _files([train], train.classes), _files([test], train.classes), train.classes


def _caltech(root: Path, download: bool) -> _Parts:
    from torchvision.datasets import Caltech101

    if download:
        Caltech101(str(root), download=True)
    folder = root / "caltech101" / "101_ObjectCategories"
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name != "BACKGROUND_Google")
    _all_there("Caltech101", folder, names, 101)
    return *seeded_halves(class_folders(folder, names), 0.2, 0), _plain(names)


def _cifar100(root: Path, download: bool) -> _Parts:
    from torchvision.datasets import CIFAR100

    train, test = (CIFAR100(str(root), train=part, download=download) for part in (True, False))
    return train, test, _plain(train.classes)


def _dtd(root: Path, download: bool) -> _Parts:
    from torchvision.datasets import DTD

    train, held, test = (DTD(str(root), split=s, download=download) for s in ("train", "val", "test"))
    if not train.classes == held.classes == test.classes:
        raise FileNotFoundError("train1.txt, val1.txt and test1.txt of DTD must list the same classes")
    return _files([train, held], train.classes), _files([test], train.classes), _plain(train.classes)


def _eurosat(root: Path, download: bool) -> _Parts:
    from torchvision.datasets import EuroSAT

    if download:
        EuroSAT(str(root), download=True)
    folder = root / "eurosat" / "2750"
    names = sorted(p.name for p in folder.iterdir() if p.is_dir())
    _all_there("EuroSAT", folder, names, 10)
    texts = [re.sub(r"(?<=[a-z])(?=[A-Z])", " ", n).lower() for n in names]
    return *seeded_halves(class_folders(folder, names), 0.2, 0), texts


def _flowers(root: Path, download: bool) -> _Parts:
    from torchvision.datasets import Flowers102

    train, held, test = (Flowers102(str(root), split=s, download=download) for s in ("train", "val", "test"))
    names = getattr(Flowers102, "classes", None)
    if not names:
        raise ValueError("`torchvision` must name the classes of Flowers102, got an older one; install 0.21 or later")
    return _files([train, held], names), _files([test], names), list(names)


def _food(root: Path, download: bool) -> _Parts:
    from torchvision.datasets import Food101

    train, test = (Food101(str(root), split=s, download=download) for s in ("train", "test"))
    return _files([train], train.classes), _files([test], train.classes), _plain(train.classes)


def _mnist(root: Path, download: bool) -> _Parts:
    from torchvision.datasets import MNIST

    train, test = (MNIST(str(root), train=part, download=download) for part in (True, False))
    return _Colored(train), _Colored(test), [str(i) for i in range(10)]


def _pets(root: Path, download: bool) -> _Parts:
    from torchvision.datasets import OxfordIIITPet

    train, test = (OxfordIIITPet(str(root), split=s, download=download) for s in ("trainval", "test"))
    return _files([train], train.classes), _files([test], train.classes), train.classes


def _cars(root: Path, download: bool) -> _Parts:
    from torchvision.datasets import StanfordCars

    train, test = (StanfordCars(str(root), split=s, download=False) for s in ("train", "test"))
    return _files([train], train.classes), _files([test], train.classes), train.classes


def _sun(root: Path, download: bool) -> _Parts:
    from torchvision.datasets import SUN397

    if download:
        SUN397(str(root), download=True)
    folder = root / "SUN397"
    names = [line.strip().lstrip("/") for line in (folder / "ClassName.txt").read_text("utf-8").splitlines() if line]
    texts = [" ".join(reversed(n.split("/")[1:])).replace("_", " ") for n in names]  # indoor church, as in CoOp
    return *seeded_halves(class_folders(folder, names), 0.2, 0), texts


_RAW = tuple(f"raw/{p}-{k}-ubyte" for p in ("train", "t10k") for k in ("images-idx3", "labels-idx1"))
SETS: dict[str, TransferSet] = {
    "aircraft": TransferSet(
        "FGVC-Aircraft",
        "fgvc-aircraft-2013b/data",
        ("images", "variants.txt", "images_variant_trainval.txt", "images_variant_test.txt"),
        "a photo of a {}, a type of aircraft.",
        _aircraft,
    ),
    "caltech101": TransferSet(
        "Caltech101",
        "caltech101",
        ("101_ObjectCategories",),
        _GENERIC,
        _caltech,
        "101_ObjectCategories",
        "split_zhou_Caltech101.json",
    ),
    "cifar100": TransferSet("CIFAR-100", "cifar-100-python", ("train", "test", "meta"), _GENERIC, _cifar100),
    "dtd": TransferSet(
        "DTD",
        "dtd/dtd",
        ("images", "labels/train1.txt", "labels/val1.txt", "labels/test1.txt"),
        "{} texture.",
        _dtd,
        "images",
        "split_zhou_DescribableTextures.json",
    ),
    "eurosat": TransferSet(
        "EuroSAT",
        "eurosat",
        ("2750",),
        "a centered satellite photo of {}.",
        _eurosat,
        "2750",
        "split_zhou_EuroSAT.json",
    ),
    "flowers102": TransferSet(
        "Flowers102",
        "flowers-102",
        ("jpg", "imagelabels.mat", "setid.mat"),
        "a photo of a {}, a type of flower.",
        _flowers,
        "jpg",
        "split_zhou_OxfordFlowers.json",
    ),
    "food101": TransferSet(
        "Food-101",
        "food-101",
        ("images", "meta/train.json", "meta/test.json"),
        "a photo of {}, a type of food.",
        _food,
        "images",
        "split_zhou_Food101.json",
    ),
    "mnist": TransferSet("MNIST", "MNIST", _RAW, 'a photo of the number: "{}".', _mnist),
    "oxford-pets": TransferSet(
        "Oxford-IIIT Pet",
        "oxford-iiit-pet",
        ("images", "annotations/trainval.txt", "annotations/test.txt"),
        "a photo of a {}, a type of pet.",
        _pets,
        "images",
        "split_zhou_OxfordPets.json",
    ),
    "stanford-cars": TransferSet(
        "Stanford Cars",
        "stanford_cars",
        (
            "cars_train",
            "cars_test",
            "cars_test_annos_withlabels.mat",
            "devkit/cars_meta.mat",
            "devkit/cars_train_annos.mat",
        ),
        _GENERIC,
        _cars,
        "",
        "split_zhou_StanfordCars.json",
        "a copy of ai.stanford.edu/~jkrause/cars, which is gone",
    ),
    "sun397": TransferSet("SUN397", "SUN397", ("ClassName.txt",), _GENERIC, _sun, "", "split_zhou_SUN397.json"),
}
"""The sets by name, in alphabetical order, which is order I of MTIL."""


def missing_parts(name: str, root: Path) -> list[str]:
    """Parts of a set that are not below ``root``; empty when it is there."""
    known = SETS[name]
    return [f"{known.folder}/{p}" for p in known.parts if not (root / known.folder / p).exists()]


def _listed(folder: Path, known: TransferSet) -> tuple[ImageFiles, ImageFiles | None, ImageFiles, list[str]]:
    """Training, validation and test images of a CoOp list."""
    listing = json.loads((folder / known.split).read_text("utf-8"))
    names: dict[int, str] = {}
    parts: dict[str, tuple[list[Path], list[int]]] = {}
    for part in ("train", "val", "test"):
        paths, labels = parts.setdefault(part, ([], []))
        for relative, label, name in listing.get(part, []):
            if Path(relative).is_absolute() or ".." in Path(relative).parts:
                raise ValueError(f"{known.split} must name files below {known.folder}, got {relative!r}")
            if names.setdefault(int(label), name) != name:
                raise ValueError(f"{known.split} must name each label once, got {names[int(label)]!r} and {name!r}")
            paths.append(folder / known.images / relative)
            labels.append(int(label))
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"{known.split} must number its classes from 0 without a gap, got {sorted(names)[:5]}")
    texts = [names[i].replace("_", " ") for i in range(len(names))]
    train, held, test = (ImageFiles(*parts[p], texts) for p in ("train", "val", "test"))
    return train, held if len(held) else None, test, texts


def _only_there(known: TransferSet, parts: Sequence[Any]) -> None:
    for data in parts:
        paths = [p for p, _ in data.samples] if isinstance(data, ImageFiles) else []
        lost = next((p for p in paths if not Path(p).is_file()), None)
        if lost is not None:
            raise FileNotFoundError(f"`root` must hold every listed image of {known.title}, got no {lost!r}")


def load_transfer_set(
    root: str | None = None,
    download: bool = False,
    name: str = "dtd",
    size: int = 224,
    leave_out: Sequence[str] = (),
) -> StreamData:
    """One of :data:`SETS`.

    Args:
        root: folder with all of them.
        download: get what is not there, where torchvision can; Stanford Cars must be put there by hand.
        name: which one.
        size: of the images given out, when nothing else transforms them.
        leave_out: class names that are not taken.

    Raises:
        ValueError: for an unknown name, or without a folder.
        FileNotFoundError: when parts are not there, naming them and where they belong.

    Example:
        >>> sorted(SETS)[:4]
        ['aircraft', 'caltech101', 'cifar100', 'dtd']
    """
    if name not in SETS:
        raise ValueError(f"`name` must be one of {', '.join(SETS)}, got {name!r}")
    known = SETS[name]
    folder = data_folder(root, known.title, known.how)
    if download and missing_parts(name, folder):
        folder.mkdir(parents=True, exist_ok=True)
        get_archives(name, folder)
    else:
        need(known.title, folder / known.folder, known.parts, known.how)
        download = False
    own = folder / known.folder
    validation: Any = None
    if known.split and (own / known.split).is_file():
        train, validation, test, names = _listed(own, known)
    else:
        try:
            train, test, read = known.read(folder, download)
            names = list(read)
        except RuntimeError as error:  # what torchvision raises for files that are missing or damaged
            raise FileNotFoundError(f"`root` must hold {known.title} undamaged, got {error}; {known.how}") from error
    _only_there(known, [train, test, *([] if validation is None else [validation])])
    if leave_out:
        train, test, validation, names = _without(train, test, validation, names, leave_out)
    transforms = crop_transforms(size)
    return StreamData(
        train,
        test,
        validation,
        class_names=tuple(names),
        train_transform=transforms[0],
        eval_transform=transforms[1],
        n_tasks=5,
        name=name,
        template=known.template,
    )


def _without(train: Any, test: Any, validation: Any, names: list[str], leave_out: Sequence[str]) -> Any:
    unknown = [n for n in leave_out if n not in names]
    if unknown:
        raise ValueError(f"`leave_out` must name classes, got {unknown[0]!r}")
    kept = [i for i, n in enumerate(names) if n not in leave_out]
    number = np.full(len(names), -1)
    number[kept] = np.arange(len(kept))
    texts = [names[i] for i in kept]

    def part(data: Any) -> Any:
        chosen = number[data.targets] >= 0
        paths = [Path(data.samples[i][0]) for i in np.flatnonzero(chosen)]
        return ImageFiles(paths, number[data.targets[chosen]], texts)

    return part(train), part(test), None if validation is None else part(validation), texts
