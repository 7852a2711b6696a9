"""Class streams with other boundaries: few shots, blurry tasks, classes that come back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Unpack

from ._seeds import MIXING, SHOTS, check_seed, generator, words
from .class_incremental import ClassIncremental, ClassOptions
from .data import Split, rank_in_class


class FewShot(ClassIncremental):
    """A base task with many classes and all their samples, then tasks of ``ways`` classes with ``shots`` samples each.

    WHEN: drawn when it is constructed. The published protocols are 60 base classes and eight 5-way 5-shot tasks for
    CIFAR-100 and mini-ImageNet, 100 and ten 10-way 5-shot tasks for CUB-200 (Tao et al., 2020, arXiv 2004.10956). The
    test data are whole.

    Args:
        data: as of :class:`ClassIncremental`.
        base_classes: classes of the first task.
        ways: classes of each later task; the last has fewer when they do not divide evenly.
        shots: training samples of each later class.
        shot_seed: draws them.
        options: as of :class:`ClassIncremental`.

    Raises:
        ValueError: for numbers below 1, or when a later class has fewer samples than ``shots``.

    Example:
        >>> stream = FewShot("digits", base_classes=6, ways=2, shots=5)
        >>> stream.provenance()["sizes"]["train"]
        [863, 10, 10]
    """

    prefix = "fewshot"

    def __init__(
        self,
        data: Any,
        base_classes: int = 60,
        ways: int = 5,
        shots: int = 5,
        shot_seed: int = 0,
        **options: Unpack[ClassOptions],
    ) -> None:
        check_counts(base_classes=base_classes, ways=ways, shots=shots)
        self.base_classes, self.ways, self.shots = base_classes, ways, shots
        self.shot_seed = check_seed("shot_seed", shot_seed)
        super().__init__(data, **options)

    def divide(self, n_classes: int) -> list[int] | None:
        """Sizes of the tasks."""
        if self.base_classes > n_classes:
            raise ValueError(
                f"`base_classes` must be at most {n_classes}, the number of classes, got {self.base_classes!r}"
            )
        rest = n_classes - self.base_classes
        return [self.base_classes, *(min(self.ways, rest - i) for i in range(0, rest, self.ways))]

    def arrange(self, train: Split, lists: list[list[int]]) -> tuple[Split, list[list[int]]]:
        """Keep ``shots`` samples of every class behind the first task."""
        labels = train.labels[train.indices]
        counts = np.bincount(labels)
        short = next((c for own in lists[1:] for c in own if counts[c] < self.shots), None)
        if short is not None:
            raise ValueError(
                f"`shots` must be at most the samples of every later class, got {self.shots!r} for class {short} with"
                f" {counts[short]}"
            )
        rank = rank_in_class(labels, words(SHOTS, self.shot_seed, train.indices))
        later = np.arange(len(labels)) >= train.offsets[1]
        return train.only(~later | (rank < self.shots)), lists

    def further_seeds(self) -> dict[str, int | None]:
        """The seed of the shots."""
        return {"shot": self.shot_seed}


def check_counts(**counts: Any) -> None:
    """Refuse counts that are no integers of 1 or more.

    Raises:
        ValueError: naming the argument.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be an integer of 1 or more, got {value!r}")


class Blurry(ClassIncremental):
    """Tasks whose boundaries are blurred: some classes appear, thinly, in every task.

    WHEN: drawn when it is constructed. ``i-Blurry-N-M`` (Koh, Kim, Ha, Choi, 2022, arXiv 2110.10031) is ``disjoint=N,
    blurry=M``: N % of the classes appear in their own task only; of the others, M % of the samples are spread evenly
    over the other tasks. ``disjoint=0`` is the blurry-M of Rainbow Memory (Bang et al., 2021, arXiv 2103.17230). The
    columns of the accuracy matrix are the tasks' own classes; ``Task.classes`` are all that occur in a task's data.

    Args:
        data: as of :class:`ClassIncremental`.
        n_tasks: as there.
        disjoint: percentage of classes that stay in one task.
        blurry: percentage of the other classes' samples that go elsewhere.
        mixing_seed: draws which.
        options: as of :class:`ClassIncremental`.

    Raises:
        ValueError: for a percentage outside [0, 100], or a task that is left without samples.

    Example:
        >>> stream = Blurry("digits", n_tasks=5, disjoint=0, blurry=10)
        >>> len(stream.tasks[0].classes), stream.evaluation_tasks[0].classes
        (10, (0, 1))
    """

    prefix = "blurry"

    def __init__(
        self,
        data: Any,
        n_tasks: int | None = None,
        disjoint: float = 50.0,
        blurry: float = 10.0,
        mixing_seed: int = 0,
        **options: Unpack[ClassOptions],
    ) -> None:
        for name, value in (("disjoint", disjoint), ("blurry", blurry)):
            if not 0 <= value <= 100:
                raise ValueError(f"`{name}` must be a percentage from 0 to 100, got {value!r}")
        self.disjoint, self.blurry = disjoint, blurry
        self.mixing_seed = check_seed("mixing_seed", mixing_seed)
        super().__init__(data, n_tasks, **options)

    def arrange(self, train: Split, lists: list[list[int]]) -> tuple[Split, list[list[int]]]:
        """Send samples of the blurry classes to other tasks."""
        n_tasks = len(lists)
        order = [c for own in lists for c in own]
        shuffled = generator(MIXING, self.mixing_seed, 0).permutation(sorted(order))
        blurred = set(shuffled[round(len(order) * self.disjoint / 100) :].tolist())
        labels = train.labels[train.indices]
        owner = np.repeat(np.arange(n_tasks), train.sizes())
        if n_tasks > 1 and self.blurry > 0 and blurred:
            rank = rank_in_class(labels, words(MIXING, self.mixing_seed, 1, train.indices))
            moved = np.isin(labels, sorted(blurred)) & (
                rank < np.round(np.bincount(labels) * self.blurry / 100)[labels]
            )
            # evenly over the other tasks, beginning elsewhere for each class
            start = (words(MIXING, self.mixing_seed, 2, labels[moved]) % np.uint64(n_tasks)).astype(np.int64)
            owner[moved] = (owner[moved] + 1 + (start + rank[moved]) % (n_tasks - 1)) % n_tasks
        return _regroup(train, owner, lists)

    def further_seeds(self) -> dict[str, int | None]:
        """The seed of the mixing."""
        return {"mixing": self.mixing_seed}


class Repetition(ClassIncremental):
    """Classes come back: after its first task a class occurs in each later one with a given probability.

    WHEN: drawn when it is constructed. Class-incremental learning with repetition (Hemati et al., 2023, arXiv
    2301.11396): the samples of a class are divided evenly among the tasks in which it occurs, so none is given twice.
    The columns of the accuracy matrix are the classes that a task introduces.

    Args:
        data: as of :class:`ClassIncremental`.
        n_tasks: as there.
        repeat: probability that a class occurs in a task after its first, in [0, 1].
        mixing_seed: draws the occurrences.
        options: as of :class:`ClassIncremental`.

    Raises:
        ValueError: for a probability outside [0, 1].

    Example:
        >>> [len(task.classes) for task in Repetition("digits", n_tasks=5, repeat=1.0).tasks]
        [2, 4, 6, 8, 10]
    """

    prefix = "repetition"

    def __init__(
        self,
        data: Any,
        n_tasks: int | None = None,
        repeat: float = 0.2,
        mixing_seed: int = 0,
        **options: Unpack[ClassOptions],
    ) -> None:
        if not 0 <= repeat <= 1:
            raise ValueError(f"`repeat` must be a probability from 0 to 1, got {repeat!r}")
        self.repeat = repeat
        self.mixing_seed = check_seed("mixing_seed", mixing_seed)
        super().__init__(data, n_tasks, **options)

    def arrange(self, train: Split, lists: list[list[int]]) -> tuple[Split, list[list[int]]]:
        """Divide each class's samples among its occurrences."""
        n_tasks = len(lists)
        labels = train.labels[train.indices]
        first = np.zeros(int(labels.max()) + 1, np.int64)
        for task, own in enumerate(lists):
            first[own] = task
        draws = generator(MIXING, self.mixing_seed, 3).random((len(first), n_tasks))
        tasks = np.arange(n_tasks)
        occurs = (draws < self.repeat) & (tasks > first[:, None]) | (tasks == first[:, None])
        turns = np.argsort(~occurs, axis=1, kind="stable")  # (classes, tasks): where a class occurs, in order
        rank = rank_in_class(labels, words(MIXING, self.mixing_seed, 4, train.indices))
        return _regroup(train, turns[labels, rank % occurs.sum(1)[labels]], lists)

    def further_seeds(self) -> dict[str, int | None]:
        """The seed of the occurrences."""
        return {"mixing": self.mixing_seed}


def _regroup(train: Split, owner: NDArray[np.int64], lists: list[list[int]]) -> tuple[Split, list[list[int]]]:
    """The split with ``owner`` as each sample's task, and the classes of each task, its own first."""
    task_of = np.full(len(train.labels), -1, np.int64)
    task_of[train.indices] = owner
    split = Split.by_task(train.source, train.labels, task_of, len(lists))
    place = {c: i for i, c in enumerate(c for own in lists for c in own)}
    taught = []
    for task, own in enumerate(lists):
        present = set(np.unique(train.labels[split.of(task)]).tolist())
        taught.append([*(c for c in own if c in present), *sorted(present - set(own), key=place.__getitem__)])
    return split, taught
