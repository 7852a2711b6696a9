"""DomainNet: 345 classes in six domains, 586,575 images (Peng et al., 2019, arXiv 1812.01754).

Layout: one folder per domain with one folder per class, and the published lists ``<domain>_train.txt`` and
``<domain>_test.txt`` beside them (in ``root``, or in ``root/splits``), each line ``<domain>/<class>/<image> <label>``.
Domain-incremental: every domain is a task with the same 345 classes, in the order of S-Prompts (Wang, Huang and Hong,
2022, arXiv 2207.12819): real, quickdraw, painting, sketch, infograph, clipart. There are two versions of clipart and
painting; the field uses the cleaned one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .benchmarks import crop_transforms, data_folder
from .domains import DomainIncremental
from .image_files import ImageFiles, image_names, need, no_download
from .stream_data import StreamData

DOMAINS = ("real", "quickdraw", "painting", "sketch", "infograph", "clipart")
_HOW = "get the six archives and the twelve lists from http://ai.bu.edu/M3SDA and unpack them there"
_Listed = list[tuple[str, int]]


def domainnet(
    root: str | None = None,
    download: bool = False,
    size: int = 224,
    domains: Sequence[str] = DOMAINS,
    n_classes: int = 345,
    **options: Any,
) -> DomainIncremental:
    """The stream of the six domains.

    Args:
        root: folder with the domains and their lists.
        download: refused, since there is no checksummed source.
        size: of the images given out.
        domains: which of them, in the order in which they are learned.
        n_classes: classes that the lists must name.
        options: of :class:`DomainIncremental`.

    Raises:
        ValueError: without a folder, for an unknown domain, or for lists that contradict each other.
        FileNotFoundError: when parts are not there, naming them.
    """
    no_download("DomainNet", download, _HOW)
    unknown = [d for d in domains if d not in DOMAINS]
    if isinstance(domains, str) or not len(domains) or unknown or len(set(domains)) < len(domains):
        raise ValueError(f"`domains` must name some of {', '.join(DOMAINS)}, each once, got {domains!r}")
    folder = data_folder(root, "DomainNet", _HOW)
    where = "splits/" if (folder / "splits").is_dir() else ""
    lists = [f"{where}{d}_{part}.txt" for d in domains for part in ("train", "test")]
    need("DomainNet", folder, [*domains, *lists], _HOW)
    listed = {name: _read_list(folder, name) for name in lists}
    names = _class_names(listed, n_classes)
    transforms = crop_transforms(size)
    given = []
    for domain in domains:
        places = sorted({path.rpartition("/")[0] for part in ("train", "test") for path, _ in
                         listed[f"{where}{domain}_{part}.txt"]})  # fmt: skip
        need("DomainNet", folder, places, _HOW)
        there = {f"{place}/{name}" for place in places for name in image_names(folder / place)}
        train, test = (
            _files(folder, f"{where}{domain}_{part}.txt", listed, there, names) for part in ("train", "test")
        )
        given.append(
            StreamData(
                train,
                test,
                class_names=tuple(name.replace("_", " ") for name in names),
                train_transform=transforms[0],
                eval_transform=transforms[1],
                name="domainnet",
            )
        )
    options.setdefault("name", "domainnet")
    options.setdefault("names", list(domains))
    return DomainIncremental(given, **options)


def _read_list(folder: Path, name: str) -> _Listed:
    """Path and label of each line; the path starts with the domain of the list."""
    domain = name.rpartition("/")[2].rpartition("_")[0]
    found: _Listed = []
    for number, line in enumerate((folder / name).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(" ")
        parts = path.split("/")
        if not label.isdecimal() or len(parts) != 3 or parts[0] != domain or ".." in parts:
            raise ValueError(
                f"{name} must hold lines `{domain}/<class>/<image> <label>`, got {line.strip()!r} in line {number}"
            )
        found.append((path, int(label)))
    if not found:
        raise ValueError(f"{name} must list images, got none")
    return found


def _class_names(listed: dict[str, _Listed], n_classes: int) -> list[str]:
    """Folder of each label, the same in all lists."""
    folder_of: dict[int, str] = {}
    for name, lines in listed.items():
        for path, label in lines:
            own = path.split("/")[1]
            if folder_of.setdefault(label, own) != own:
                raise ValueError(
                    f"{name} must give label {label} to one class alone, got {own!r} after {folder_of[label]!r}"
                )
    if sorted(folder_of) != list(range(n_classes)):
        raise ValueError(
            f"the lists must name {n_classes} classes, labels 0 to {n_classes - 1}, got {len(folder_of)} labels from"
            f" {min(folder_of)} to {max(folder_of)}; {_HOW}"
        )
    return [folder_of[label] for label in range(n_classes)]


def _files(folder: Path, name: str, listed: dict[str, _Listed], there: set[str], names: Sequence[str]) -> ImageFiles:
    lost = [path for path, _ in listed[name] if path not in there]
    if lost:
        raise FileNotFoundError(
            f"`root` must hold every listed image, got no {lost[0]} in {str(folder)!r}, the first of {len(lost)} that"
            f" {name} lists in vain; {_HOW}"
        )
    return ImageFiles([os.path.join(folder, p) for p, _ in listed[name]], [label for _, label in listed[name]], names)
