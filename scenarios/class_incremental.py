"""Class-incremental streams: every task brings new classes, and the model must tell all classes so far apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from typing_extensions import Unpack

from cl_plugins.task import Task

from ._seeds import check_seed
from .assignment import assign_classes
from .data import Split, Transform
from .labels import FoundLabels, Labels, align_labels, find_labels
from .stream import LoaderOptions, TaskStream


@dataclass(frozen=True, eq=False)
class StreamData:
    """Training and test data of one data set, with what belongs to them.

    Attributes:
        train: map dataset.
        test: map dataset.
        validation: map dataset; None takes ``validation_fraction`` of the training data.
        labels: how the labels are found, see :func:`cl_plugins.scenarios.find_labels`.
        class_names: text of each label.
        train_transform: for the inputs in training, unless the stream is given another.
        eval_transform: for the inputs everywhere else, likewise.
        n_tasks: number of tasks when nobody says otherwise.
        name: short, lower case.
    """

    train: Any
    test: Any
    validation: Any = None
    labels: Labels | None = None
    class_names: tuple[str, ...] | None = None
    train_transform: Transform | None = None
    eval_transform: Transform | None = None
    n_tasks: int | None = None
    name: str = ""


def as_stream_data(
    data: Any, test: Any, root: str | None, download: bool, options: dict[str, Any] | None = None
) -> StreamData:
    """What a scenario was given, as :class:`StreamData`.

    Raises:
        ValueError: for an unknown name, or without test data.
    """
    if isinstance(data, StreamData):
        return data
    if isinstance(data, str):
        from .registry import load_data

        return load_data(data, root=root, download=download, **(options or {}))
    if test is None and isinstance(data, tuple) and len(data) == 2:
        data, test = data
    for name, value in (("data", data), ("test", test)):
        if value is not None and not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
            raise TypeError(
                f"`{name}` must be a data set with a length and items by index, got {type(value).__name__};"
                " a stream of samples must be collected first"
            )
    return StreamData(data, test, name=type(data).__name__.lower())


@dataclass(frozen=True, eq=False)
class Prepared:
    """Labels and splits that all class-based scenarios start from.

    Attributes:
        data: the sources.
        train: labels of the training data.
        test: labels of the test data, in the same numbers.
        validation: labels of the validation data; None without one.
        present: labels that have training samples, ascending.
    """

    data: StreamData
    train: FoundLabels
    test: FoundLabels
    validation: FoundLabels | None
    present: list[int]

    @property
    def names(self) -> tuple[str, ...]:
        """Text of each label by its number, or nothing."""
        return self.train.names if len(self.train.names) > max(self.present) else ()

    def task(self, index: int, classes: Sequence[int], name: str = "", description: str = "") -> Task:
        """A task with the texts of its classes."""
        texts = tuple(self.names[c] for c in classes) if self.names else ()
        return Task(index, tuple(classes), name=name, description=description, class_names=texts)


def prepare(data: StreamData, labels: Labels | None) -> Prepared:
    """Find the labels of every split.

    Raises:
        ValueError: when they cannot be found, or when there is no test data.
    """
    if data.test is None:
        raise ValueError(
            "`test` must be given, got None; pass `test=` or a pair (train, test), or split the data set in two first"
        )
    how = data.labels if labels is None else labels
    for_all = how if how is None or isinstance(how, str) or callable(how) else None
    if how is not None and for_all is None:
        raise ValueError(
            "`labels` must be a name or a function when there are training and test data, got one value per sample;"
            " use stream_from, which takes arrays for both"
        )
    train = find_labels(data.train, for_all, data.class_names)
    test = align_labels(train, find_labels(data.test, for_all, data.class_names))
    validation = None
    if data.validation is not None:
        validation = align_labels(train, find_labels(data.validation, for_all, data.class_names))
    present = np.unique(train.values).tolist()
    if not present:
        raise ValueError("`data` must hold training samples, got none")
    return Prepared(data, train, test, validation, present)


class ClassIncremental(TaskStream):
    """Divides the classes of a data set among tasks; each task's data are the samples of its classes.

    WHEN: the stream is drawn when it is constructed, without reading an image; see :class:`TaskStream` for the rest.

    Three seeds are separate: ``order_seed`` for the order of the classes, ``data_seed`` for the order of the samples
    and their augmentation, and the runner's ``seed`` for what is initialized. ``split_seed`` draws the validation
    samples and seldom needs a change. Labels stay those of the data set, whatever the order.

    Args:
        data: a registered name (``"cifar100"``, ``"digits"``, or a stream such as ``"split-digits"``), a map dataset, a
            pair (train, test), or :class:`StreamData`.
        n_tasks: number of tasks; classes are divided evenly, none is lost. None takes the data set's usual number.
        test: test data, when ``data`` is the training data alone.
        classes: the labels of each task, instead of ``n_tasks``; labels in no list are left out.
        first_task_classes: how many classes the first task has.
        class_order: labels in the order in which they are learned; None is ascending or drawn by ``order_seed``.
        order_seed: draws the order of the classes; None keeps it ascending.
        data_seed: orders and augments the samples.
        split_seed: draws the validation samples.
        seed: stands for ``order_seed`` and ``data_seed`` where these are not given.
        validation_fraction: share of each class's training samples that becomes validation data, in [0, 1).
        labels: where the labels are, see :func:`find_labels`.
        root: folder of data that is not bundled.
        download: allow to download it.
        data_options: of the registered data set, such as ``{"size": 32}`` for smaller images of CIFAR-100.
        options: of :class:`TaskStream`: transforms, batch sizes, workers.

    Raises:
        ValueError: for a class in two tasks, an empty task, more tasks than classes, labels that cannot be found.

    Example:
        >>> stream = ClassIncremental("digits", n_tasks=3)
        >>> [task.classes for task in stream.tasks]
        [(0, 1, 2, 3), (4, 5, 6), (7, 8, 9)]
    """

    def __init__(
        self,
        data: Any,
        n_tasks: int | None = None,
        *,
        test: Any = None,
        classes: Sequence[Sequence[int]] | None = None,
        first_task_classes: int | None = None,
        class_order: Sequence[int] | None = None,
        order_seed: int | None = None,
        data_seed: int | None = None,
        split_seed: int = 0,
        seed: int | None = None,
        validation_fraction: float = 0.0,
        labels: Labels | None = None,
        root: str | None = None,
        download: bool = False,
        data_options: dict[str, Any] | None = None,
        **options: Unpack[LoaderOptions],
    ) -> None:
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must be in [0, 1), got {validation_fraction!r}")
        if seed is not None:
            check_seed("seed", seed)
            if order_seed is None and class_order is None and classes is None:
                order_seed = seed
            data_seed = seed if data_seed is None else data_seed
        found = prepare(as_stream_data(data, test, root, download, data_options), labels)
        source = found.data
        lists = assign_classes(
            found.present,
            n_tasks=source.n_tasks if n_tasks is None and classes is None else n_tasks,
            classes=classes,
            first_task_classes=first_task_classes,
            class_order=class_order,
            order_seed=order_seed,
        )
        train = Split.by_class(source.train, found.train.values, lists)
        validation = None
        if found.validation is not None:
            validation = Split.by_class(source.validation, found.validation.values, lists)
        elif validation_fraction:
            train, validation = train.hold_out(validation_fraction, check_seed("split_seed", split_seed))
        options.setdefault("name", f"split-{source.name}")
        options.setdefault("train_transform", source.train_transform)
        options.setdefault("eval_transform", source.eval_transform)
        super().__init__(
            [found.task(i, own) for i, own in enumerate(lists)],
            train,
            Split.by_class(source.test, found.test.values, lists),
            validation,
            seeds={"order": order_seed, "data": 0 if data_seed is None else data_seed, "split": split_seed},
            **options,
        )
        self.class_names = found.names
        self.label_mapping = found.train.mapping
