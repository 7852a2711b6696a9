"""A task, and what the runner asks of a stream of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch.utils.data import DataLoader


@dataclass(frozen=True)
class Task:
    """One step of a stream.

    Args:
        index: position in the stream, from 0.
        classes: original labels that the task teaches; the columns of the head that belong to it.
        name: short text for tables and figures; ``"task 0"`` when empty.
        description: a sentence about the task, for methods that compare tasks by their text.
        class_names: one text per class, or nothing.

    Raises:
        ValueError: for a negative index, no class, a repeated class or names that do not match the classes.

    Example:
        >>> Task(0, classes=(3, 7)).name
        'task 0'
    """

    index: int
    classes: tuple[int, ...]
    name: str = ""
    description: str = ""
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(int(c) for c in self.classes))
        object.__setattr__(self, "class_names", tuple(self.class_names))
        if self.index < 0:
            raise ValueError(f"`index` must be 0 or more, got {self.index!r}")
        if not self.classes:
            raise ValueError(f"`classes` of task {self.index} must hold at least one label, got {self.classes!r}")
        if len(set(self.classes)) != len(self.classes) or min(self.classes) < 0:
            raise ValueError(f"`classes` must be distinct labels of 0 or more, got {self.classes!r}")
        if self.class_names and len(self.class_names) != len(self.classes):
            raise ValueError(f"`class_names` must hold {len(self.classes)} names, got {len(self.class_names)}")
        if not self.name:
            object.__setattr__(self, "name", f"task {self.index}")


@runtime_checkable
class Stream(Protocol):
    """What :func:`cl_plugins.fit_stream` needs; :class:`cl_plugins.scenarios.TaskStream` is one."""

    name: str
    tasks: Sequence[Task]
    n_classes: int
    class_order: tuple[int, ...]
    task: int

    def train_dataloader(self) -> DataLoader[Any]:
        """Training data of the current task, shuffled."""
        ...

    def test_loader(self, index: int) -> DataLoader[Any]:
        """Test data of task ``index`` in a fixed order."""
        ...

    def train_loader_for_features(self, index: int) -> DataLoader[Any]:
        """Training data of task ``index`` in a fixed order, without augmentation, nothing dropped."""
        ...

    def provenance(self) -> dict[str, Any]:
        """Plain values that say what the stream is: name, seeds, sizes, class order."""
        ...


def check_tasks(tasks: Sequence[Task], *, shared_classes: bool = False) -> None:
    """Refuse a stream whose tasks are out of order or share classes.

    Args:
        tasks: the whole stream.
        shared_classes: allow a class in several tasks (domain-incremental streams).

    Raises:
        ValueError: naming the task and the class.
    """
    if not tasks:
        raise ValueError("`tasks` must hold at least one task, got none")
    owner: dict[int, int] = {}
    for position, task in enumerate(tasks):
        if task.index != position:
            raise ValueError(f"`tasks` must be in order: task at position {position} has index {task.index}")
        for label in task.classes:
            if label in owner and not shared_classes:
                raise ValueError(
                    f"`tasks` must not share classes, got class {label} in task {owner[label]} and task {position};"
                    " give each class to one task, or use a domain-incremental stream if this is meant"
                )
            owner[label] = position
