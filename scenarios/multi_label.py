"""Multi-label class-incremental streams: an image has several classes, and a task tells of its own alone.

A training sample of a task is every image with at least one of the task's classes; what else is on it is hidden. An
image therefore comes back in every task that has one of its classes. The protocol is that of MULTI-LANE.

    targets  ``(batch, classes)`` float32: 1 present, 0 absent, -1 hidden, not annotated in this task
    training and validation  hidden outside the task's classes; a loss is taken where the target is not -1
    test  images with at least one class of the evaluated task, nothing hidden; the evaluation looks at seen classes
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import Unpack

from cl_plugins.task import Task

from ._seeds import check_seed, words
from .assignment import assign_classes
from .data import Split, TaskView, Transform
from .glyphs import SPLIT_FACES, Stencils, glyph_name, render, stream_classes
from .stream import LoaderOptions, TaskStream

_SPLITS = ("train", "validation", "test")


class _Targets:
    """Rows of a target matrix, with -1 outside ``classes``; None hides nothing."""

    def __init__(self, matrix: NDArray[np.bool_], classes: Sequence[int] | None) -> None:
        self.matrix, self.classes = matrix, None if classes is None else list(classes)

    def __getitem__(self, index: Any) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = self.matrix[index].astype(np.float32)
        if self.classes is None:
            return rows
        shown: NDArray[np.float32] = np.full_like(rows, -1)
        shown[..., self.classes] = rows[..., self.classes]
        return shown


class _View(TaskView):
    def _label(self, index: int) -> Any:
        return torch.from_numpy(self.labels[index])


@dataclass(frozen=True, eq=False)
class MultiLabelSplit(Split):
    """Samples by task, where one may belong to several.

    Attributes:
        targets: ``(samples of the source, classes)`` bool.
    """

    targets: NDArray[np.bool_]

    @classmethod
    def by_targets(cls, source: Any, targets: NDArray[np.bool_], classes: Sequence[Sequence[int]]) -> MultiLabelSplit:
        """Each sample goes to every task that has one of its classes."""
        own = [np.flatnonzero(targets[:, list(c)].any(1)) for c in classes]
        offsets = np.concatenate([[0], np.cumsum([len(o) for o in own])])
        return cls(source, targets.argmax(1), np.concatenate(own), offsets, targets)


def check_targets(targets: Any, samples: int, name: str = "targets") -> NDArray[np.bool_]:
    """A target matrix ``(samples, classes)`` of zeros and ones as bool.

    Raises:
        ValueError: for another shape or other values.
    """
    matrix = np.asarray(targets)
    if matrix.ndim != 2 or len(matrix) != samples:
        raise ValueError(f"`{name}` must be ({samples}, classes), one row per sample, got shape {matrix.shape}")
    if not np.isin(matrix, (0, 1)).all():
        raise ValueError(f"`{name}` must hold 0 and 1 alone, got {np.unique(matrix)[:5].tolist()}; use one-hot rows")
    return matrix.astype(np.bool_)


def label_view(stream: TaskStream, split: MultiLabelSplit, task: int, transform: Transform | None) -> TaskView:
    """One task's samples with rows of targets; outside the test data the classes of other tasks are hidden."""
    shown = None if split is stream.test else stream.tasks[task].classes
    return _View(
        split.source,
        _Targets(split.targets, shown),  # type: ignore[arg-type]  # read by index alone
        split.of(task),
        transform,
        (stream.data_seed, task),
        stream.collate_fn,
        stream.unreadable,
    )


class MultiLabel(TaskStream):
    """Divides the classes of a multi-label data set among tasks; each task shows the labels of its classes alone.

    WHEN: as :class:`ClassIncremental`; the targets of a batch are rows of 1, 0 and, for what is hidden, -1.

    Args:
        train: data with a ``targets`` array ``(samples, classes)`` of zeros and ones.
        test: the same for the evaluation.
        n_tasks: number of tasks.
        validation: the same for validation; None for none.
        classes: the labels of each task, instead of ``n_tasks``.
        first_task_classes: how many classes the first task has.
        class_order: labels in the order in which they are learned.
        order_seed: draws that order; None keeps it ascending.
        data_seed: orders and augments the samples.
        class_names: one per class.
        options: of :class:`TaskStream`.

    Raises:
        ValueError: for targets of another shape, a class in two tasks, a task without samples.

    Example:
        >>> stream = multilabel_glyphs(n_classes=4, n_tasks=2, train_images=20, test_images=8)
        >>> images, targets = next(iter(stream.train_dataloader()))
        >>> sorted(set(targets[:, 2:].flatten().tolist()))  # the classes of the other task
        [-1.0]
    """

    modality = "multi-label"

    def __init__(
        self,
        train: Any,
        test: Any,
        n_tasks: int | None = None,
        *,
        validation: Any = None,
        classes: Sequence[Sequence[int]] | None = None,
        first_task_classes: int | None = None,
        class_order: Sequence[int] | None = None,
        order_seed: int | None = None,
        data_seed: int = 0,
        class_names: Sequence[str] = (),
        **options: Unpack[LoaderOptions],
    ) -> None:
        given = {"train": train, "test": test, "validation": validation}
        targets = {k: check_targets(v.targets, len(v), f"{k}.targets") for k, v in given.items() if v is not None}
        widths = {k: v.shape[1] for k, v in targets.items()}
        if len(set(widths.values())) != 1:
            raise ValueError(f"`targets` must have the same classes in every split, got {widths}")
        width = widths["train"]
        if class_names and len(class_names) != width:
            raise ValueError(f"`class_names` must hold {width} names, got {len(class_names)}")
        lists = assign_classes(
            range(width),
            n_tasks=n_tasks,
            classes=classes,
            first_task_classes=first_task_classes,
            class_order=class_order,
            order_seed=order_seed,
        )
        splits = {k: MultiLabelSplit.by_targets(given[k], m, lists) for k, m in targets.items()}
        options.setdefault("name", "multilabel")
        super().__init__(
            [
                Task(i, tuple(own), class_names=tuple(class_names[c] for c in own) if class_names else ())
                for i, own in enumerate(lists)
            ],
            splits["train"],
            splits["test"],
            splits.get("validation"),
            seeds={"order": order_seed, "data": check_seed("data_seed", data_seed)},
            **options,
        )
        self.class_names = tuple(class_names)

    def _present(self, split: Split) -> set[int]:
        assert isinstance(split, MultiLabelSplit)
        return set(np.flatnonzero(split.targets[split.indices].any(0)).tolist())

    def _view(self, split: Split, task: int, transform: Transform | None) -> TaskView:
        assert isinstance(split, MultiLabelSplit)
        return label_view(self, split, task, transform)


class MultiGlyphSource:
    """Images of one to three characters in the cells of a 2 x 2 grid; image i is a function of (split, seed, i).

    Args:
        code_points: one per class, in label order.
        split: ``"train"``, ``"validation"`` or ``"test"``; each has fonts of its own.
        images: number of images; image i always has class ``i % classes``, so that none is missing.
        seed: draws the images.
        strength: of the distortions.

    Raises:
        ValueError: for an unknown split or fewer images than classes.
    """

    def __init__(
        self, code_points: Sequence[int], split: str, images: int, seed: int = 0, strength: float = 1.0
    ) -> None:
        if split not in SPLIT_FACES:
            raise ValueError(f"`split` must be one of {_SPLITS}, got {split!r}")
        if images < len(code_points):
            raise ValueError(f"`images` must be at least {len(code_points)}, the number of classes, got {images!r}")
        self.split, self.seed, self.strength = split, seed, strength
        n, where = len(code_points), _SPLITS.index(split)
        numbers = np.arange(images)
        draws = [words(where, seed, 7, numbers, slot) for slot in range(4)]
        self._classes = np.stack([numbers % n, *((d % n).astype(np.int64) for d in draws[1:3])], 1)
        self._used = 1 + (draws[0] % 3).astype(np.int64)
        self._turn = (draws[3] % 4).astype(np.int64)
        self._stencils = Stencils(code_points, SPLIT_FACES[split])
        self.targets: NDArray[np.bool_] = np.zeros((images, n), np.bool_)
        for slot in range(3):
            there = self._used > slot
            self.targets[numbers[there], self._classes[there, slot]] = True

    def __len__(self) -> int:
        return len(self.targets)

    def read_batch(self, indices: NDArray[np.int64]) -> Tensor:
        """Images ``(batch, 3, 32, 32)`` in [0, 1] of these samples."""
        canvas = torch.zeros(len(indices), 3, 32, 32)
        for slot in range(3):
            rows = np.flatnonzero(self._used[indices] > slot)
            if not len(rows):
                continue
            chosen = indices[rows]
            seeds = words(_SPLITS.index(self.split), self.seed, 8, chosen, slot)
            small = F.avg_pool2d(render(self._stencils, self._classes[chosen, slot], seeds, self.strength), 2)
            cells = (self._turn[chosen] + slot) % 4
            for cell in range(4):
                inside = torch.from_numpy(np.flatnonzero(cells == cell))
                top, left = 16 * (cell // 2), 16 * (cell % 2)
                canvas[torch.from_numpy(rows)[inside], :, top : top + 16, left : left + 16] = small[inside]
        return canvas


def multilabel_glyphs(
    n_classes: int = 20,
    n_tasks: int = 5,
    train_images: int = 2000,
    test_images: int = 500,
    image_seed: int = 0,
    strength: float = 1.0,
    **options: Any,
) -> MultiLabel:
    """One to three characters on an image of 32 x 32 pixels, each 16 pixels high.

    Args:
        n_classes: number of characters.
        n_tasks: number of tasks.
        train_images: training images in all.
        test_images: test images in all, in other fonts.
        image_seed: draws the images.
        strength: of the distortions.
        options: of :class:`MultiLabel`.

    Raises:
        ValueError: for fewer images than classes.
    """
    code_points = stream_classes(n_classes)
    if options.get("classes") is None:
        options["n_tasks"] = n_tasks
    options.setdefault("name", "multilabel-glyphs")
    options.setdefault("class_names", tuple(glyph_name(c) for c in code_points))
    return MultiLabel(
        MultiGlyphSource(code_points, "train", train_images, image_seed, strength),
        MultiGlyphSource(code_points, "test", test_images, image_seed, strength),
        **options,
    )
