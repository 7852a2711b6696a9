"""What a stream reads: sources of samples, the flat index of which task has which, and one task's view of both."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

from ._seeds import IMAGE, SPLIT, ForkedRandomness, words

Transform = Callable[[Any], Any]


@runtime_checkable
class BatchSource(Protocol):
    """A source that gives the inputs of many samples at once, faster than one by one."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def read_batch(self, indices: NDArray[np.int64]) -> Tensor:
        """Inputs of these samples as one batch."""
        ...


class TensorSource:
    """Samples that lie in memory.

    Args:
        inputs: ``(samples, ...)``; given out as they are.
        labels: ``(samples,)`` integers.

    Example:
        >>> TensorSource(torch.zeros(4, 3), torch.arange(4)).read_batch(np.array([1, 2])).shape
        torch.Size([2, 3])
    """

    def __init__(self, inputs: Tensor, labels: Tensor | NDArray[np.int64]) -> None:
        if len(inputs) != len(labels):
            raise ValueError(f"`labels` must be as many as `inputs`, {len(inputs)}, got {len(labels)}")
        self.inputs = inputs
        self.labels = np.asarray(labels)

    def __len__(self) -> int:
        return len(self.inputs)

    def read_batch(self, indices: NDArray[np.int64]) -> Tensor:
        """Inputs of these samples as one batch."""
        return self.inputs[torch.from_numpy(indices)]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.inputs[index], int(self.labels[index])


def rank_in_class(labels: NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Position of each sample among those of its class when they are sorted by ``keys``.

    Example:
        >>> rank_in_class(np.array([1, 0, 1]), np.array([9, 5, 3], np.uint64)).tolist()
        [1, 0, 0]
    """
    order = np.lexsort((keys, labels))
    first = np.concatenate([[0], np.cumsum(np.bincount(labels))[:-1]])
    rank = np.empty(len(labels), np.int64)
    rank[order] = np.arange(len(labels)) - first[labels[order]]
    return rank


@dataclass(frozen=True, eq=False)
class Split:
    """The samples of a source that tasks use: one flat array, grouped by task.

    Attributes:
        source: map dataset, or a :class:`BatchSource`.
        labels: ``(samples of the source,)`` int64.
        indices: ``(used samples,)`` int64, all of task 0, then all of task 1, ...
        offsets: ``(tasks + 1,)`` int64, where each task begins.
    """

    source: Any
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    offsets: NDArray[np.int64]

    @classmethod
    def by_class(cls, source: Any, labels: NDArray[np.int64], classes: Sequence[Sequence[int]]) -> Split:
        """Each sample goes to the task that teaches its class; samples of no task are left out."""
        largest = max([int(labels.max(initial=-1)), *(max(c) for c in classes)])
        kind = np.int16 if len(classes) < 2**15 else np.int64  # NumPy sorts 16-bit integers by radix
        owner = np.full(largest + 2, -1, kind)  # the last entry is for label -1, a sample that is not in this split
        for task, own in enumerate(classes):
            owner[list(own)] = task
        return cls.by_task(source, labels, owner[labels], len(classes))

    @classmethod
    def by_task(cls, source: Any, labels: NDArray[np.int64], task_of: NDArray[Any], n_tasks: int) -> Split:
        """Each sample goes to the task named for it; -1 leaves it out."""
        order = np.argsort(task_of, kind="stable")
        counts = np.bincount(task_of.astype(np.int64) + 1, minlength=n_tasks + 1)
        return cls(source, labels, order[counts[0] :], np.concatenate([[0], np.cumsum(counts[1:])]))

    def of(self, task: int) -> NDArray[np.int64]:
        """Indices into the source of one task's samples."""
        return self.indices[self.offsets[task] : self.offsets[task + 1]]

    def sizes(self) -> list[int]:
        """Samples per task."""
        return [int(n) for n in np.diff(self.offsets)]

    def hold_out(self, fraction: float, seed: int) -> tuple[Split, Split]:
        """Two disjoint splits: ``fraction`` of every class is in the second, drawn by ``seed``; one sample stays."""
        labels = self.labels[self.indices]
        rank = rank_in_class(labels, words(SPLIT, seed, self.indices))  # the same in every order of classes
        counts = np.bincount(labels)
        held = rank < np.minimum(np.round(fraction * counts), counts - 1)[labels]
        return self.only(~held), self.only(held)

    def only(self, keep: NDArray[np.bool_]) -> Split:
        """The used samples where ``keep`` is true, in the same tasks."""
        before = np.concatenate([[0], np.cumsum(keep)])
        return Split(self.source, self.labels, self.indices[keep], before[self.offsets])


def image_tensor(image: Image.Image) -> Tensor:
    """``(3, height, width)`` float32 in [0, 1]; what an image becomes when nobody gave a transform."""
    pixels = np.asarray(image.convert("RGB"), np.uint8)
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


class UnreadableSample(RuntimeError):
    """A sample's file is missing or damaged; the text names it."""


class _Stacked(tuple[Any, ...]):
    """A batch that needs no collation."""

    __slots__ = ()


@dataclass(frozen=True)
class Collate:
    """Stacks samples unless they are stacked already."""

    function: Callable[[list[Any]], Any] | None = None

    def __call__(self, batch: Any) -> Any:
        """A batch from what :class:`TaskView` gave."""
        return list(batch) if isinstance(batch, _Stacked) else (self.function or default_collate)(batch)


class TaskView(Dataset[Any]):
    """One task's samples, as ``(input, label)``.

    A sample's random augmentation is a function of ``(seed, task, epoch, sample)``: the generators of torch, NumPy and
    Python are seeded by it around the sample's transform and set back after the batch. So neither the order of samples,
    nor the number of workers, nor a resume changes an image, and the global generators never advance.

    Args:
        source: map dataset, or a :class:`BatchSource`.
        labels: of all samples of the source; they replace the label that a sample brings.
        indices: the task's samples.
        transform: for the input of a sample, or for the whole sample when it is a dict; None makes tensors of images.
        seed: data seed and task.
        collate_fn: makes a batch of a list of samples; None stacks, and reads whole batches where the source can.
        unreadable: "stop" at a sample whose file cannot be read, or "skip" it with a warning; batches are smaller then.
    """

    def __init__(
        self,
        source: Any,
        labels: NDArray[np.int64],
        indices: NDArray[np.int64],
        transform: Transform | None = None,
        seed: tuple[int, int] = (0, 0),
        collate_fn: Callable[[list[Any]], Any] | None = None,
        unreadable: Literal["stop", "skip"] = "stop",
    ) -> None:
        self.source = source
        self.labels = labels
        self.indices = indices
        self.transform = transform
        self.seed = seed
        self.collate = Collate(collate_fn)
        self.unreadable = unreadable
        self._in_batches = isinstance(source, BatchSource)  # asking a protocol takes longer than reading a sample
        # tensors draw nothing at random, so that no sample needs its own seed
        self._tensors = type(source) is TensorDataset and type(self)._label is TaskView._label

    def __len__(self) -> int:
        return len(self.indices)

    def joined(self, views: Sequence[Any]) -> TaskView | None:
        """The samples of several views of one data set, numbered through in their order; None where they differ.

        Each sample is what its own view gives, at a cost per batch and not per view.
        """
        alike = all(
            type(v) is TaskView
            and v.source is self.source
            and v.labels is self.labels
            and v.transform is self.transform
            and v.collate.function is self.collate.function
            and v.seed[0] == self.seed[0]
            and v.unreadable == "stop"
            for v in views
        )
        return _JoinedViews(views) if alike and len(views) else None

    def __getitem__(self, number: int | list[int]) -> Any:
        if isinstance(number, list):
            return self.collate(self.__getitems__(number))
        return self._samples(np.array([number]))[0]

    def __getitems__(self, numbers: Sequence[int]) -> Any:
        """The samples of a batch; ``number = epoch * len(self) + position``."""
        asked = np.asarray(numbers, np.int64)
        if self.collate.function is None and self.transform is None and (self._in_batches or self._tensors):
            chosen = self.indices[asked % len(self)]
            labels = torch.from_numpy(self.labels[chosen])
            if self._in_batches:
                return _Stacked((self.source.read_batch(chosen), labels))
            where = torch.from_numpy(chosen)
            first, *more = (tensor[where] for k, tensor in enumerate(self.source.tensors) if k != 1)
            return _Stacked((first, labels, *more))
        return self._samples(asked)

    def _samples(self, numbers: NDArray[np.int64]) -> list[Any]:
        epochs, positions = np.divmod(numbers, len(self))
        chosen = self.indices[positions]
        seeds = words(IMAGE, self.seed[0], self._task_of(positions), epochs, chosen)
        samples = []
        with ForkedRandomness() as randomness:
            for place, (index, seed) in enumerate(zip(chosen.tolist(), seeds.tolist(), strict=True), 1):
                randomness.seed(seed)
                try:
                    samples.append(self._sample(index))
                except UnreadableSample as error:
                    if self.unreadable == "stop":
                        raise
                    if not samples and place == len(chosen):
                        raise UnreadableSample(
                            f"{error}; none of the {len(chosen)} samples of this batch can be read, so there is nothing"
                            " to go on with; larger batches are seldom without any"
                        ) from error
                    warnings.warn(f"skipped: {error}", stacklevel=2)
        return samples

    def _task_of(self, positions: NDArray[np.int64]) -> Any:
        return self.seed[1]

    def _label(self, index: int) -> Any:
        return int(self.labels[index])

    def _sample(self, index: int) -> Any:
        label = self._label(index)
        if self._in_batches:
            item: Any = (self.source.read_batch(np.array([index]))[0], label)
        else:
            item = self._read(index)
        if isinstance(item, dict):
            return self._relabel(item, label)
        if isinstance(item, tuple | list):
            return (self._transformed(item[0]), label, *item[2:])
        return (self._transformed(item), label)

    def _transformed(self, value: Any) -> Any:
        if self.transform is not None:
            return self.transform(value)
        return image_tensor(value) if isinstance(value, Image.Image) else value

    def _relabel(self, item: dict[str, Any], label: Any) -> dict[str, Any]:
        changed = item if self.transform is None else self.transform(item)
        key = next((k for k in ("label", "labels", "y") if k in changed), "label")
        return {**changed, key: label}

    def _read(self, index: int) -> Any:
        try:
            return self.source[index]
        except OSError as error:
            paths = getattr(self.source, "samples", None)
            where = f" ({paths[index][0]})" if isinstance(paths, list) and isinstance(paths[index], tuple) else ""
            raise UnreadableSample(
                f"sample {index}{where} must be readable, got {type(error).__name__}: {error};"
                " repair or remove the file" + (', or pass `unreadable="skip"`' if self.unreadable == "stop" else "")
            ) from error


class _JoinedViews(TaskView):
    """What :meth:`TaskView.joined` gives; a number is a position in all views together."""

    def __init__(self, views: Sequence[TaskView]) -> None:
        first = views[0]
        super().__init__(
            first.source,
            first.labels,
            np.concatenate([view.indices for view in views]),
            first.transform,
            first.seed,
            first.collate.function,
            first.unreadable,
        )
        self.tasks = np.repeat([view.seed[1] for view in views], [len(view) for view in views])

    def _task_of(self, positions: NDArray[np.int64]) -> Any:
        return self.tasks[positions]
