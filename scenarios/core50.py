"""CORe50: 50 objects filmed in 11 sessions, 164,866 frames (Lomonaco and Maltoni, 2017, arXiv 1705.03550).

Layout: ``s1`` to ``s11``, each with ``o1`` to ``o50`` that hold the frames, PNG of 128 x 128 (``core50_128x128.zip``).
Object ``o<k>`` has label k - 1; five objects in a row are of one category. Sessions 3, 7 and 10 are for testing in both
protocols:

    NI (new instances)  8 tasks, one training session each, with all 50 objects; after each task the accuracy on the
                        one fixed test set, so the accuracy matrix has 8 rows and one column
    NC (new classes)    9 tasks, 10 objects, then 8 x 5; the first task has the first object of each category. Which
                        objects make a task is fixed; runs of the paper differ in the order of the last eight

Not implemented: NIC, and labels by category.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from cl_plugins.task import Task

from ._seeds import CLASS_ORDER, check_seed, generator
from .benchmarks import crop_transforms, data_folder
from .class_incremental import ClassIncremental
from .data import Split
from .domains import DomainIncremental
from .image_files import ImageFiles, image_names, need, no_download
from .stream_data import StreamData

CATEGORIES = ("plug adapter", "mobile phone", "scissor", "light bulb", "can",
              "glass", "ball", "marker", "cup", "remote control")  # fmt: skip
NAMES = tuple(f"{category} {k}" for category in CATEGORIES for k in range(1, 6))
SESSIONS = tuple(range(1, 12))
TEST_SESSIONS = (3, 7, 10)
TRAIN_SESSIONS = tuple(s for s in SESSIONS if s not in TEST_SESSIONS)


def new_classes() -> list[list[int]]:
    """The objects of each NC task in the order of the published lists.

    The first task takes object 1 of all ten categories; then object 2 of the first five categories, object 2 of the
    other five, object 3 of the first five, and so on.

    Example:
        >>> [len(own) for own in new_classes()], new_classes()[2]
        ([10, 5, 5, 5, 5, 5, 5, 5, 5], [26, 31, 36, 41, 46])
    """
    halves = (range(5), range(5, 10))
    return [[5 * c for c in range(10)], *([5 * c + k for c in half] for k in range(1, 5) for half in halves)]


def _frames(root: str | None, download: bool) -> dict[int, ImageFiles]:
    """The frames of each session."""
    how = "get core50_128x128.zip from https://vlomonaco.github.io/core50 and unpack it there"
    no_download("CORe50", download, how)
    folder = data_folder(root, "CORe50", how)
    if (folder / "core50_128x128").is_dir():
        folder = folder / "core50_128x128"
    need("CORe50", folder, [f"s{s}" for s in SESSIONS], how)
    need("CORe50", folder, [f"s{s}/o{o}" for s in SESSIONS for o in range(1, 51)], how)
    sessions = {}
    for session in SESSIONS:
        paths: list[str] = []
        labels: list[int] = []
        for label in range(50):
            place = folder / f"s{session}" / f"o{label + 1}"
            files = image_names(place)
            if not files:
                raise FileNotFoundError(f"each object's folder must hold images, got none in {str(place)!r}; {how}")
            paths += [os.path.join(place, name) for name in files]
            labels += [label] * len(files)
        sessions[session] = ImageFiles(paths, labels, NAMES)
    return sessions


def _joined(parts: Sequence[ImageFiles]) -> ImageFiles:
    paths = [path for part in parts for path, _ in part.samples]
    return ImageFiles(paths, np.concatenate([part.targets for part in parts]), NAMES)


def load_core50(root: str | None = None, download: bool = False, size: int = 224) -> StreamData:
    """All frames of the eight training sessions and of the three test sessions.

    Args:
        root: ``core50_128x128``, or the folder that holds it.
        download: refused, since there is no checksummed source.
        size: of the images given out; 128 keeps the size of the files.

    Raises:
        ValueError: without a folder, or for ``download=True``.
        FileNotFoundError: when parts are not there, naming them.
    """
    sessions = _frames(root, download)
    transforms = crop_transforms(size, squash=True)
    return StreamData(
        _joined([sessions[s] for s in TRAIN_SESSIONS]),
        _joined([sessions[s] for s in TEST_SESSIONS]),
        class_names=NAMES,
        train_transform=transforms[0],
        eval_transform=transforms[1],
        n_tasks=10,
        name="core50",
    )


def core50_nc(
    root: str | None = None,
    download: bool = False,
    size: int = 224,
    order_seed: int | None = None,
    seed: int | None = None,
    **options: Any,
) -> ClassIncremental:
    """NC: new objects in each of nine tasks.

    The columns of the accuracy matrix are the test frames of each task's objects; the accuracy on all 50 objects, which
    the paper plots, is their sum.

    Args:
        root: ``core50_128x128``, or the folder that holds it.
        download: refused, since there is no checksummed source.
        size: of the images given out.
        order_seed: draws the order of the eight tasks behind the first; None keeps that of the published lists.
        seed: stands for ``order_seed`` and ``data_seed`` where these are not given.
        options: of :class:`ClassIncremental`.

    Raises:
        ValueError: without a folder, or for faulty arguments.
        FileNotFoundError: when parts are not there, naming them.
    """
    if options.get("n_tasks") not in (None, 9):
        raise ValueError(f"`n_tasks` must be 9 for core50-nc, whose tasks are fixed, got {options['n_tasks']!r}")
    if seed is not None:
        check_seed("seed", seed)
        order_seed = seed if order_seed is None and "classes" not in options else order_seed
        if options.get("data_seed") is None:
            options["data_seed"] = seed
    lists = new_classes()
    if order_seed is not None:
        drawn = generator(CLASS_ORDER, check_seed("order_seed", order_seed)).permutation(8)
        lists = [lists[0], *(lists[1 + int(k)] for k in drawn)]
    options.setdefault("classes", lists)
    options.setdefault("name", "core50-nc")
    stream = ClassIncremental(load_core50(root, download, size), **options)
    stream.seeds["order"] = order_seed
    return stream


class FixedTest(DomainIncremental):
    """Domains that are learned one after the other and tested on one common set after each.

    WHEN: as :class:`DomainIncremental`; there is one column in the accuracy matrix.

    Args:
        domains: training data, one per task.
        test: the test data.
        data: names of the classes and transforms; its training and test data are not used.
        options: of :class:`DomainIncremental`.

    Raises:
        ValueError: as there.
    """

    def __init__(self, domains: Sequence[Any], test: Any, data: StreamData, **options: Any) -> None:
        nothing = ImageFiles([], [], data.class_names or ())
        given = [
            StreamData(
                domain,
                nothing if k else test,
                class_names=data.class_names,
                train_transform=data.train_transform,
                eval_transform=data.eval_transform,
                name=data.name,
            )
            for k, domain in enumerate(domains)
        ]
        super().__init__(given, **options)
        split, every = self.test, self.class_order
        self.test = Split(split.source, split.labels, np.sort(split.indices), np.array([0, len(split.indices)]))
        texts = tuple(self.class_names[c] for c in every) if self.class_names else ()
        self.evaluation_tasks = (Task(0, every, name="all test data", class_names=texts),)

    def learned_after(self, task: int) -> int:
        """The one column, from the first task on."""
        return 1


def core50_ni(root: str | None = None, download: bool = False, size: int = 224, **options: Any) -> FixedTest:
    """NI: the same 50 objects in another session in each of eight tasks.

    Args:
        root: ``core50_128x128``, or the folder that holds it.
        download: refused, since there is no checksummed source.
        size: of the images given out.
        options: of :class:`DomainIncremental`; ``order_seed`` draws the order of the sessions, as the paper's runs do.

    Raises:
        ValueError: without a folder, or for faulty arguments.
        FileNotFoundError: when parts are not there, naming them.
    """
    sessions = _frames(root, download)
    transforms = crop_transforms(size, squash=True)
    test = _joined([sessions[s] for s in TEST_SESSIONS])
    data = StreamData(
        None, None, class_names=NAMES, train_transform=transforms[0], eval_transform=transforms[1], name="core50"
    )
    options.setdefault("name", "core50-ni")
    options.setdefault("names", [f"session {s}" for s in TRAIN_SESSIONS])
    return FixedTest([sessions[s] for s in TRAIN_SESSIONS], test, data, **options)
