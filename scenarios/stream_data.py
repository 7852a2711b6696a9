"""What every scenario over a data set starts from: the sources, their labels, the text of the classes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cl_plugins._text import did_you_mean
from cl_plugins.task import Task

from .data import Transform
from .labels import FoundLabels, Labels, align_labels, find_labels


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
        template: text of a class with ``{}`` for its name, for streams of images and texts; empty for their default.
        found: labels of the training, test and validation data when they are known already; -1 leaves a sample out, so
            that several of them may share one source.
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
    template: str = ""
    found: tuple[FoundLabels, FoundLabels, FoundLabels | None] | None = None


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

    def numbers(self, argument: str, labels: Any) -> Any:
        """The labels with class names as numbers; what are no lists, and names of nameless data, stay as they are.

        Raises:
            ValueError: for a text that is no class name, or the name of several classes.
        """
        if isinstance(labels, int | str) or not self.names:
            return labels
        return [self._number(argument, label) if isinstance(label, str) else label for label in labels]

    def _number(self, argument: str, text: str) -> int:
        places = [i for i, name in enumerate(self.names) if name == text]
        if len(places) > 1:
            raise ValueError(f"`{argument}` must name one class, got {text!r} for {places}; pass its number")
        if not places:
            raise ValueError(
                f"`{argument}` must name classes of the data, got {text!r}{did_you_mean(text, self.names)}"
            )
        return places[0]

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
    if data.found is not None:
        return Prepared(data, *data.found, _present(data.found[0]))
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
        validation = align_labels(train, find_labels(data.validation, for_all, data.class_names), "validation")
    return Prepared(data, train, test, validation, _present(train))


def report_left_out(found: Prepared) -> None:
    """Warn of test samples that no task will have, because no training sample has their class."""
    values = found.test.values
    lost = values[(values >= 0) & ~np.isin(values, found.present)]
    if len(lost):
        warnings.warn(
            f"{len(lost)} of {int((values >= 0).sum())} test samples are left out, since no training sample has their"
            f" class: {str(np.unique(lost)[:10].tolist())[1:-1]}",
            stacklevel=3,
        )


def _present(train: FoundLabels) -> list[int]:
    present = np.unique(train.values[train.values >= 0]).tolist()
    if not present:
        raise ValueError("`data` must hold training samples, got none")
    return [int(c) for c in present]
