"""Whether the files of a stream are there, told by names alone: nothing is opened and nothing is imported.

``CL_DATA`` names a folder that holds all data sets. The files of one are looked for in ``CL_DATA/<name>`` and in
``CL_DATA`` itself.
"""

from __future__ import annotations

import os
from pathlib import Path

from .registry import ScenarioInfo

VARIABLE = "CL_DATA"
_CIFAR100, _CUB = (
    ("cifar-100-python/train", "cifar-100-python/test"),
    ("CUB_200_2011/images.txt", "CUB_200_2011/images"),
)
_MNIST, _CORE50 = ("MNIST/raw/train-images-idx3-ubyte*",), ("core50_128x128/s1", "core50_128x128/s11")
_SETS = (
    "caltech101", "dtd", "eurosat", "fgvc-aircraft-2013b", "flowers-102", "food-101", "MNIST", "oxford-iiit-pet",
    "stanford_cars", "SUN397",
)  # fmt: skip
FILES: dict[str, tuple[str, ...]] = {
    "cifar10": ("cifar-10-batches-py/data_batch_1", "cifar-10-batches-py/test_batch"),
    "cifar100": _CIFAR100,
    "imagenet-r": ("n*|train/n*",),
    "imagenet-a": ("n*|train/n*",),
    "cub200": _CUB,
    "mnist": _MNIST,
    "permuted-mnist": _MNIST,
    "rotated-mnist": _MNIST,
    "tiny-imagenet": ("tiny-imagenet-200/wnids.txt", "tiny-imagenet-200/train", "tiny-imagenet-200/val/images"),
    "core50-nc": _CORE50,
    "core50-ni": _CORE50,
    "domainnet": tuple(
        f"{d}_train.txt|splits/{d}_train.txt"
        for d in ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
    ),
    "fewshot-cifar100": _CIFAR100,
    "fewshot-mini-imagenet": ("miniimagenet/images", "miniimagenet/split/train.csv"),
    "fewshot-cub200": _CUB,
    "multilabel-coco": ("annotations/instances_train20*.json", "annotations/instances_val20*.json"),
    "multilabel-voc": ("VOCdevkit/VOC20*|VOC20*",),
    "coin": ("*/train.json", "*/test.json"),
    "trace": ("*/train.json", "*/test.json"),
    "x-tail": _SETS,
    "mtil": (*_SETS, "cifar-100-python"),
}
"""Patterns, relative to a stream's folder, that must match something; ``|`` stands between alternatives."""


def missing_file(scenario: ScenarioInfo, folder: Path) -> str | None:
    """The first pattern without a match in ``folder``; None when all are there.

    Raises:
        KeyError: for a stream whose files are not known here.
    """
    for pattern in FILES[scenario.data if scenario.data in FILES else scenario.name]:
        if not any(next(folder.glob(p), None) for p in pattern.split("|")):
            return pattern.replace("|", " or ")
    return None


def find_root(scenario: ScenarioInfo, folder: str | Path) -> Path | None:
    """The folder with the stream's files: ``folder/<name>`` or ``folder``; None when they are in neither.

    Args:
        scenario: which stream.
        folder: of all data sets.

    Raises:
        NotADirectoryError: when there is no such folder.
    """
    base = Path(folder).expanduser()
    if not base.is_dir():
        raise NotADirectoryError(f"`{VARIABLE}` must be a folder that exists, got {str(folder)!r}")
    for place in (base / (scenario.data or scenario.name), base / scenario.name, base):
        if place.is_dir() and missing_file(scenario, place) is None:
            return place
    return None


def data_folder() -> Path | None:
    """What the environment variable ``CL_DATA`` says; None when it is not set."""
    told = os.environ.get(VARIABLE)
    return Path(told).expanduser() if told else None


def availability(scenario: ScenarioInfo, folder: str | Path | None) -> str:
    """In words: "comes along", "yes: <folder>", "no: <what is missing>", or "unknown" without a folder to look in.

    Example:
        >>> from cl_plugins.scenarios import scenario_info
        >>> availability(scenario_info("split-digits"), None)
        'comes along'
    """
    if not scenario.needs:
        return "comes along"
    if folder is None or not {scenario.data, scenario.name} & set(FILES):
        return "unknown"
    found = find_root(scenario, folder)
    if found is not None:
        return f"yes: {found}"
    return f"no: {missing_file(scenario, Path(folder).expanduser())} not in {folder}"
