"""Upper bounds of a stream: all its data at once (joint), or all data so far at every task (cumulative)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl_plugins.task import Task

from .data import Split, TaskView, Transform
from .multi_label import MultiLabelSplit, label_view
from .registry import build_scenario
from .stream import TaskStream


class _GrowingSplit(Split):
    """Task k has the samples of tasks 0 to k; the flat array is that of the plain split."""

    def of(self, task: int) -> NDArray[np.int64]:
        return self.indices[: self.offsets[task + 1]]

    def sizes(self) -> list[int]:
        return [int(n) for n in self.offsets[1:]]


class _GrowingLabelSplit(MultiLabelSplit):
    """The same, with an image once in a task although several tasks of the plain split have it."""

    def of(self, task: int) -> NDArray[np.int64]:
        return np.unique(self.indices[: self.offsets[task + 1]])

    def sizes(self) -> list[int]:
        first = np.unique(self.indices, return_index=True)[1]
        return [int(n) for n in np.searchsorted(np.sort(first), self.offsets[1:])]


def _merged(split: Split) -> Split:
    unique = np.unique(split.indices)
    return replace(split, indices=unique, offsets=np.array([0, len(unique)]))


def _growing(split: Split) -> Split:
    if isinstance(split, MultiLabelSplit):
        return _GrowingLabelSplit(split.source, split.labels, split.indices, split.offsets, split.targets)
    return _GrowingSplit(split.source, split.labels, split.indices, split.offsets)


def _settings(stream: TaskStream, kind: str) -> dict[str, Any]:
    return {
        "name": f"{stream.name}-{kind}",
        "class_order": stream.class_order,
        "seeds": stream.seeds,
        "evaluation_tasks": stream.evaluation_tasks,
        "train_transform": stream.train_transform,
        "eval_transform": stream.eval_transform,
        "batch_size": stream.batch_size,
        "eval_batch_size": stream.eval_batch_size,
        "num_workers": stream.num_workers,
        "pin_memory": stream.pin_memory,
        "drop_last": stream.drop_last,
        "uneven": stream.uneven,
        "collate_fn": stream.collate_fn,
        "single_pass": stream.single_pass,
        "unreadable": stream.unreadable,
    }


def _keep_texts(stream: TaskStream, original: TaskStream) -> None:
    """What a stream of texts, or of images and texts, says of its classes and answers."""
    stream.n_classes = original.n_classes
    for name in ("modality", "task_known", "open_vocabulary", "class_names", "class_texts", "predict", "tokenizer"):
        if hasattr(original, name):
            setattr(stream, name, getattr(original, name))


def _as_stream(stream: TaskStream | str) -> TaskStream:
    built = build_scenario(stream) if isinstance(stream, str) else stream
    if not isinstance(built, TaskStream):
        raise TypeError(f"`stream` must be a TaskStream or the name of a scenario, got {type(built).__name__}")
    return built


class _Reference(TaskStream):
    _original: TaskStream

    def _present(self, split: Split) -> set[int]:
        return self._original._present(split)

    def _view(self, split: Split, task: int, transform: Transform | None) -> TaskView:
        if isinstance(split, MultiLabelSplit):
            return label_view(self, split, task, transform)
        return super()._view(split, task, transform)


class Joint(_Reference):
    """Trains on all tasks at once and evaluates on each: what a stream could reach without forgetting.

    WHEN: there is one task to train, with all classes and samples; :attr:`evaluation_tasks` and :meth:`test_loader` are
    those of the original stream, so the accuracy matrix has one row and its columns.

    Args:
        stream: the original, or its name.

    Raises:
        TypeError: for anything else.

    Example:
        >>> reference = Joint("split-digits")
        >>> len(reference.tasks), len(reference.evaluation_tasks)
        (1, 5)
    """

    def __init__(self, stream: TaskStream | str) -> None:
        original = self._original = _as_stream(stream)
        texts = {c: t for task in original.tasks for c, t in zip(task.classes, task.class_names, strict=False)}
        names = tuple(texts[c] for c in original.class_order) if len(texts) == len(original.class_order) else ()
        super().__init__(
            [Task(0, original.class_order, name="all tasks", class_names=names)],
            _merged(original.train),
            original.test,
            None if original.validation is None else _merged(original.validation),
            **_settings(original, "joint"),
        )
        _keep_texts(self, original)

    def learned_after(self, task: int) -> int:
        """All of them."""
        return len(self.evaluation_tasks)


class Cumulative(_Reference):
    """Trains every task on its own data and those of all tasks before it: rehearsal without a limit.

    WHEN: task k has the classes and samples of tasks 0 to k; it is evaluated as the original stream is.

    Args:
        stream: the original, or its name.

    Raises:
        TypeError: for anything else.

    Example:
        >>> reference = Cumulative("split-digits")
        >>> reference.tasks[1].classes
        (0, 1, 2, 3)
    """

    def __init__(self, stream: TaskStream | str) -> None:
        original = self._original = _as_stream(stream)
        so_far: dict[int, str] = {}
        tasks = []
        for task in original.tasks:
            so_far.update(dict.fromkeys(task.classes, ""))
            so_far.update(dict(zip(task.classes, task.class_names, strict=False)))
            names = tuple(so_far.values()) if all(so_far.values()) else ()
            tasks.append(Task(task.index, tuple(so_far), task.name, task.description, names))
        super().__init__(
            tasks,
            _growing(original.train),
            original.test,
            None if original.validation is None else _growing(original.validation),
            shared_classes=True,
            **_settings(original, "cumulative"),
        )
        _keep_texts(self, original)
