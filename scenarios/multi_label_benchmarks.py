"""COCO and Pascal VOC as multi-label class-incremental streams.

Protocols of "Knowledge Restore and Transfer for Multi-Label Class-Incremental Learning" (Dong et al., 2023, arXiv
2302.13334), classes in alphabetical order of their names: ``Bx-Cy`` has x classes in the first task and y in every
later one, B0 has y in all.

    COCO  B40-C10 (5 tasks), B0-C10 (8 tasks), on 80 classes
    VOC   B10-C2 (6 tasks), B4-C2 (9 tasks), on 20 classes

Images without any class are left out. Images are resized to a square, in training flipped at random too: a random crop
would cut objects off whose labels stay. The published augmentations are others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .benchmarks import data_folder
from .data import Transform
from .image_files import need, no_download
from .multi_label import MultiLabel

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_VOC_PARTS = {"2007": ("trainval", "test"), "2012": ("train", "val")}  # the test labels of 2012 are not public
_COCO = "get the images and annotations from https://cocodataset.org and unpack them there"
_VOC = "pass `download=True` to get it, or unpack VOCtrainval and, for 2007, VOCtest there"


class LabelledFiles:
    """Images in files, with a row of 0/1 labels each.

    Args:
        paths: one file a sample.
        targets: ``(samples, classes)`` bool.
        class_names: one per class.

    Raises:
        ValueError: when the numbers differ.
    """

    def __init__(self, paths: Sequence[Path], targets: NDArray[np.bool_], class_names: Sequence[str]) -> None:
        if targets.shape != (len(paths), len(class_names)):
            raise ValueError(f"`targets` must be ({len(paths)}, {len(class_names)}), got shape {targets.shape}")
        self.paths, self.targets, self.classes = list(paths), targets, list(class_names)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, NDArray[np.bool_]]:
        with Image.open(self.paths[index]) as image:
            return image.convert("RGB"), self.targets[index]


def tasks_of(protocol: str, n_classes: int) -> dict[str, Any]:
    """Arguments of :class:`MultiLabel` for a protocol such as "B40-C10".

    Raises:
        ValueError: for another text, or classes that it does not divide evenly.

    Example:
        >>> tasks_of("B40-C10", 80), tasks_of("B0-C10", 80)
        ({'n_tasks': 5, 'first_task_classes': 40}, {'n_tasks': 8})
    """
    match = re.fullmatch(r"B(\d+)-C([1-9]\d*)", str(protocol))
    if match is None:
        raise ValueError(f"`protocol` must be such as 'B10-C2', got {protocol!r}")
    base, step = int(match[1]), int(match[2])
    if base >= n_classes or (n_classes - base) % step:
        raise ValueError(f"`protocol` must divide the {n_classes} classes evenly, got {protocol!r}")
    later = (n_classes - base) // step
    return {"n_tasks": later + 1, "first_task_classes": base} if base else {"n_tasks": later}


def _transforms(size: int) -> tuple[Transform, Transform]:
    from torchvision import transforms

    if size < 1:
        raise ValueError(f"`size` must be 1 or more, got {size!r}")
    square = transforms.Resize((size, size))
    train = transforms.Compose([square, transforms.RandomHorizontalFlip(), transforms.ToTensor()])
    return train, transforms.Compose([square, transforms.ToTensor()])


def _there(title: str, folder: Path, paths: Sequence[Path], how: str) -> None:
    lost = next((p for p in paths if not p.is_file()), None)
    if lost is not None:
        raise FileNotFoundError(
            f"`root` must hold every listed image of {title}, got no {lost.name} in {str(folder)!r}; {how}"
        )


def _inside(name: Any, listing: str) -> str:
    """A file's name from a list, which must be a plain one."""
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise ValueError(f"{listing} must name files by their plain name, got {name!r}")
    return name


def _stream(
    kind: str, train: LabelledFiles, test: LabelledFiles, protocol: str, size: int, options: dict[str, Any]
) -> MultiLabel:
    if not options.keys() & {"n_tasks", "classes", "first_task_classes"}:
        options.update(tasks_of(protocol, len(train.classes)))
    transforms = _transforms(size)
    options.setdefault("train_transform", transforms[0])
    options.setdefault("eval_transform", transforms[1])
    options.setdefault("class_names", tuple(train.classes))
    options.setdefault("name", kind)
    return MultiLabel(train, test, **options)


def read_coco(annotations: Path, images: Path) -> LabelledFiles:
    """The images of one COCO annotation file that have a class; objects marked as crowds count.

    Args:
        annotations: ``instances_*.json``; the file of 2014's training images takes some gigabytes while it is read.
        images: folder of the images.

    Raises:
        ValueError: for a file with parts missing or contradictory.
        FileNotFoundError: for a listed image that is not there.
    """
    try:
        content = json.loads(annotations.read_text(encoding="utf-8"))
        kinds = sorted((str(c["name"]), int(c["id"])) for c in content["categories"])
        files = {int(i["id"]): _inside(i["file_name"], annotations.name) for i in content["images"]}
        pairs = [(int(a["image_id"]), int(a["category_id"])) for a in content["annotations"]]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{annotations.name} must be COCO's JSON with images, annotations and categories, got {error!r}"
        ) from error
    column = {number: k for k, (_, number) in enumerate(kinds)}
    row = {number: k for k, number in enumerate(sorted(files))}
    stray = next((p for p in pairs if p[0] not in row or p[1] not in column), None)
    if stray is not None:
        raise ValueError(
            f"{annotations.name} must list every image and category that it uses, got image {stray[0]} and category"
            f" {stray[1]} in an annotation"
        )
    targets = np.zeros((len(row), len(column)), np.bool_)
    if pairs:
        targets[[row[i] for i, _ in pairs], [column[c] for _, c in pairs]] = True
    kept = np.flatnonzero(targets.any(1))
    ordered = sorted(files)
    paths = [images / files[ordered[i]] for i in kept]
    _there("COCO", images, paths, _COCO)
    return LabelledFiles(paths, targets[kept], [name for name, _ in kinds])


def multilabel_coco(
    root: str | None = None,
    download: bool = False,
    protocol: str = "B40-C10",
    year: str = "2014",
    size: int = 224,
    **options: Any,
) -> MultiLabel:
    """COCO (Lin et al., 2014, arXiv 1405.0312): 80 classes; the validation images are the test data.

    Args:
        root: holds ``annotations/instances_train<year>.json``, ``annotations/instances_val<year>.json`` and the folders
            ``train<year>`` and ``val<year>``.
        download: refused, since there is no checksummed source.
        protocol: "B40-C10" or "B0-C10", or another that divides the classes.
        year: "2014" or "2017".
        size: side of the images given out, in pixels.
        options: of :class:`MultiLabel`; ``n_tasks``, ``first_task_classes`` or ``classes`` replace the protocol.

    Raises:
        ValueError: without a folder, for an unknown year or protocol, or for damaged annotations.
        FileNotFoundError: when parts are not there, naming them.
    """
    no_download("COCO", download, _COCO)
    if str(year) not in ("2014", "2017"):
        raise ValueError(f"`year` must be '2014' or '2017', got {year!r}")
    folder = data_folder(root, "COCO", _COCO)
    lists = [f"annotations/instances_{part}{year}.json" for part in ("train", "val")]
    need("COCO", folder, [*lists, f"train{year}", f"val{year}"], _COCO)
    train, test = (read_coco(folder / n, folder / f"{p}{year}") for n, p in zip(lists, ("train", "val"), strict=True))
    if train.classes != test.classes:
        raise ValueError(f"{lists[0]} and {lists[1]} must have the same categories, got others in each")
    return _stream("multilabel-coco", train, test, protocol, size, options)


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses a document type, with which a small file could grow without bound or name other files."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a document type definition")


def voc_objects(path: Path, difficult: bool = True) -> set[str]:
    """Names of the classes in one annotation file of VOC.

    Args:
        path: the XML file.
        difficult: count objects marked as difficult.

    Raises:
        ValueError: for a file that is no such XML, or one with a document type definition.
    """
    try:
        tree = ElementTree.fromstring(path.read_bytes(), ElementTree.XMLParser(target=_NoDoctype()))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path.name} must be an annotation of VOC in plain XML, got one where {error}") from error
    objects = [o for o in tree.findall("object") if difficult or o.findtext("difficult", "0").strip() != "1"]
    names = {o.findtext("name", "").strip() for o in objects}
    unknown = names - set(VOC_CLASSES)
    if unknown:
        raise ValueError(f"{path.name} must name classes of VOC, got {min(unknown)!r}")
    return names


def read_voc(folder: Path, part: str, difficult: bool = True) -> LabelledFiles:
    """The images of one list of VOC that have a class.

    Args:
        folder: ``VOC2007`` or ``VOC2012``.
        part: name of the list in ``ImageSets/Main``.
        difficult: count objects marked as difficult.

    Raises:
        ValueError: for damaged annotations.
        FileNotFoundError: for a listed image or annotation that is not there.
    """
    lines = (folder / "ImageSets" / "Main" / f"{part}.txt").read_text(encoding="utf-8").split("\n")
    numbers = [_inside(line.strip(), f"{part}.txt") for line in lines if line.strip()]
    column = {name: k for k, name in enumerate(VOC_CLASSES)}
    targets = np.zeros((len(numbers), len(column)), np.bool_)
    _there("VOC", folder / "Annotations", [folder / "Annotations" / f"{n}.xml" for n in numbers], _VOC)
    for k, number in enumerate(numbers):
        targets[k, [column[c] for c in voc_objects(folder / "Annotations" / f"{number}.xml", difficult)]] = True
    kept = np.flatnonzero(targets.any(1))
    paths = [folder / "JPEGImages" / f"{numbers[k]}.jpg" for k in kept]
    _there("VOC", folder / "JPEGImages", paths, _VOC)
    return LabelledFiles(paths, targets[kept], VOC_CLASSES)


def multilabel_voc(
    root: str | None = None,
    download: bool = False,
    protocol: str = "B10-C2",
    year: str = "2007",
    size: int = 224,
    difficult: bool = True,
    **options: Any,
) -> MultiLabel:
    """Pascal VOC (Everingham et al., 2010): 20 classes; 2007 trains on trainval, 2012 on train, tested on test or val.

    Args:
        root: holds ``VOCdevkit/VOC<year>`` or ``VOC<year>``.
        download: get it through torchvision, checksummed.
        protocol: "B10-C2" or "B4-C2", or another that divides the classes.
        year: "2007" or "2012".
        size: side of the images given out, in pixels.
        difficult: whether an object marked as difficult counts as present; as absent otherwise.
        options: of :class:`MultiLabel`; ``n_tasks``, ``first_task_classes`` or ``classes`` replace the protocol.

    Raises:
        ValueError: without a folder, for an unknown year or protocol, or for damaged annotations.
        FileNotFoundError: when parts are not there, naming them.
    """
    if str(year) not in _VOC_PARTS:
        raise ValueError(f"`year` must be '2007' or '2012', got {year!r}")
    base, parts = data_folder(root, "VOC", _VOC), _VOC_PARTS[str(year)]
    folder = next((p for p in (base / "VOCdevkit" / f"VOC{year}", base / f"VOC{year}") if p.is_dir()), None)
    lists = [f"ImageSets/Main/{part}.txt" for part in parts]
    needed = [*lists, "Annotations", "JPEGImages"]
    if download and (folder is None or not all((folder / name).exists() for name in needed)):
        from torchvision.datasets import VOCDetection

        for part in parts:
            VOCDetection(str(base), year=str(year), image_set=part, download=True)
        folder = base / "VOCdevkit" / f"VOC{year}"
    if folder is None:
        raise FileNotFoundError(f"`root` must hold VOCdevkit/VOC{year}, got {str(base)!r} without; {_VOC}")
    need("VOC", folder, needed, _VOC)
    train, test = (read_voc(folder, part, difficult) for part in parts)
    return _stream("multilabel-voc", train, test, protocol, size, options)
