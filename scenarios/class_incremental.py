"""Class-incremental streams: every task brings new classes, and the model must tell all classes so far apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import Unpack

from ._seeds import check_seed, spread_seed
from .assignment import assign_classes
from .data import Split
from .labels import Labels
from .stream import LoaderOptions, TaskStream
from .stream_data import as_stream_data, prepare, report_left_out


class ClassOptions(LoaderOptions, total=False):
    """Keyword arguments of :class:`ClassIncremental` that scenarios built on it pass on."""

    test: Any
    classes: Sequence[Sequence[int | str]] | None
    first_task_classes: int | None
    class_order: Sequence[int | str] | None
    order_seed: int | None
    data_seed: int | None
    split_seed: int
    seed: int | None
    validation_fraction: float
    labels: Labels | None
    root: str | None
    download: bool
    data_options: dict[str, Any] | None


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
        classes: the labels of each task, instead of ``n_tasks``, as numbers or as class names where the data have
            names; labels in no list are left out.
        first_task_classes: how many classes the first task has.
        class_order: labels, likewise, in the order in which they are learned; None is ascending or drawn by
            ``order_seed``.
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
        classes: Sequence[Sequence[int | str]] | None = None,
        first_task_classes: int | None = None,
        class_order: Sequence[int | str] | None = None,
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
        if not isinstance(validation_fraction, int | float) or not 0 <= validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must be in [0, 1), got {validation_fraction!r}")
        fixed_order = class_order is not None or classes is not None
        order_seed, data_seed = spread_seed(seed, order_seed, data_seed, fixed_order=fixed_order)
        found = prepare(as_stream_data(data, test, root, download, data_options), labels)
        report_left_out(found)
        source = found.data
        sizes = self.divide(len(found.present))
        lists = assign_classes(
            found.present,
            n_tasks=source.n_tasks if n_tasks is None and classes is None and sizes is None else n_tasks,
            classes=None if classes is None else [found.numbers("classes", own) for own in classes],
            sizes=sizes,
            first_task_classes=first_task_classes,
            class_order=None if class_order is None else found.numbers("class_order", class_order),
            order_seed=order_seed,
        )
        train = Split.by_class(source.train, found.train.values, lists)
        validation = None
        if found.validation is not None:
            validation = Split.by_class(source.validation, found.validation.values, lists)
        elif validation_fraction:
            train, validation = train.hold_out(validation_fraction, check_seed("split_seed", split_seed))
        train, taught = self.arrange(train, lists)
        options.setdefault("name", f"{self.prefix}-{source.name}")
        options.setdefault("train_transform", source.train_transform)
        options.setdefault("eval_transform", source.eval_transform)
        columns = [found.task(i, own) for i, own in enumerate(lists)]
        super().__init__(
            columns if taught == lists else [found.task(i, own) for i, own in enumerate(taught)],
            train,
            Split.by_class(source.test, found.test.values, lists),
            validation,
            class_order=[c for own in lists for c in own],
            seeds={
                "order": order_seed,
                "data": 0 if data_seed is None else data_seed,
                "split": split_seed,
                **self.further_seeds(),
            },
            shared_classes=taught != lists,
            evaluation_tasks=columns,
            **options,
        )
        self.class_names = found.names
        self.label_mapping = found.train.mapping

    prefix = "split"

    def divide(self, n_classes: int) -> list[int] | None:
        """Number of classes of each task; None divides them as the arguments say."""
        return None

    def arrange(self, train: Split, lists: list[list[int]]) -> tuple[Split, list[list[int]]]:
        """What each task trains on, and the classes among it; scenarios with other boundaries override this.

        Args:
            train: the training samples, each in the task that owns its class.
            lists: the classes that each task owns, which are the columns of the accuracy matrix.
        """
        return train, lists

    def further_seeds(self) -> dict[str, int | None]:
        """Seeds of :meth:`arrange`, for the provenance."""
        return {}


class TaskIncremental(ClassIncremental):
    """The class-incremental stream, evaluated with the task known: the model chooses among the task's own classes.

    WHEN: nothing differs in training. Every evaluation counts both, the choice among all classes so far and the choice
    among the task's own, in one pass; :attr:`task_known` says which one is this stream's number. A result has it as
    ``average_accuracy_task_known`` and ``accuracy_matrix_task_known``; its other numbers, such as ``forgetting``, are
    of the choice among all classes: :func:`cl_plugins.functional.forgetting` of that matrix is the one with the task
    known.

    Args:
        data: as of :class:`ClassIncremental`.
        n_tasks: as there.
        options: as there.

    Raises:
        ValueError: as there.

    Example:
        >>> TaskIncremental("digits", n_tasks=5).provenance()["task_known"]
        True
    """

    task_known = True
    prefix = "task"

    def __init__(self, data: Any, n_tasks: int | None = None, **options: Unpack[ClassOptions]) -> None:
        super().__init__(data, n_tasks, **options)
