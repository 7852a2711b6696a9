"""Which task teaches which classes."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from ._seeds import CLASS_ORDER, check_seed, generator


def split_evenly(n: int, parts: int) -> list[int]:
    """Sizes of ``parts`` that differ by one at most and sum to ``n``; the larger ones come first.

    Example:
        >>> split_evenly(10, 3)
        [4, 3, 3]
    """
    return [n // parts + (i < n % parts) for i in range(parts)]


def order_classes(present: Sequence[int], class_order: Sequence[int] | None, order_seed: int | None) -> list[int]:
    """The labels in the order in which they are learned.

    Args:
        present: labels of the data, ascending.
        class_order: the same labels in the wanted order.
        order_seed: draws the order; None with ``class_order=None`` keeps it ascending.

    Raises:
        ValueError: for an order that is not one of exactly these labels.
    """
    if class_order is None:
        if order_seed is None:
            return list(present)
        order = generator(CLASS_ORDER, check_seed("order_seed", order_seed)).permutation(len(present))
        return [present[i] for i in order]
    if order_seed is not None:
        raise ValueError(f"`order_seed` must be None when `class_order` is given, got {order_seed!r}; pass one of them")
    given = [_label("class_order", c) for c in class_order]
    lost, unknown = sorted(set(present) - set(given)), sorted(set(given) - set(present))
    if lost or unknown or len(given) != len(present):
        twice = sorted({c for c in given if given.count(c) > 1})
        raise ValueError(
            f"`class_order` must name each of the {len(present)} labels once,"
            f" got {len(given)}: {unknown[:5]} are not in the data, {twice[:5]} stand twice, {lost[:5]} are missing"
        )
    return given


def assign_classes(
    present: Sequence[int],
    *,
    n_tasks: int | None = None,
    classes: Sequence[Sequence[int]] | None = None,
    sizes: Sequence[int] | None = None,
    first_task_classes: int | None = None,
    class_order: Sequence[int] | None = None,
    order_seed: int | None = None,
) -> list[list[int]]:
    """The classes of each task; with ``n_tasks`` every label is in exactly one task.

    Args:
        present: labels of the data, ascending.
        n_tasks: number of tasks.
        classes: the classes of each task, instead of ``n_tasks``.
        sizes: how many classes each task has, instead of ``n_tasks``.
        first_task_classes: how many classes the first task has; the others share the rest.
        class_order: labels in the order in which they are learned.
        order_seed: draws that order.

    Raises:
        ValueError: for a class in two tasks, an empty task, an unknown class, or more tasks than classes.

    Example:
        >>> assign_classes(range(7), n_tasks=3, first_task_classes=4)
        [[0, 1, 2, 3], [4, 5], [6]]
    """
    if classes is not None:
        for name, value in (
            ("first_task_classes", first_task_classes),
            ("class_order", class_order),
            ("order_seed", order_seed),
        ):
            if value is not None:
                raise ValueError(f"`{name}` must be None when `classes` is given, which says it all, got {value!r}")
        if n_tasks is not None and n_tasks != len(classes):
            raise ValueError(f"`n_tasks` must be {len(classes)}, the length of `classes`, or None, got {n_tasks!r}")
        return _check_lists(present, classes)
    order = order_classes(present, class_order, order_seed)
    if sizes is not None:
        return _cut(order, sizes)
    if n_tasks is None:
        raise ValueError("`n_tasks` or `classes` must be given, got neither")
    if isinstance(n_tasks, bool) or not isinstance(n_tasks, int) or n_tasks < 1:
        raise ValueError(f"`n_tasks` must be an integer of 1 or more, got {n_tasks!r}")
    if n_tasks > len(order):
        raise ValueError(f"`n_tasks` must be at most {len(order)}, the number of classes, got {n_tasks!r}")
    if first_task_classes is None:
        return _cut(order, split_evenly(len(order), n_tasks))
    if isinstance(first_task_classes, bool) or not isinstance(first_task_classes, int):
        raise ValueError(f"`first_task_classes` must be an integer of 1 or more, got {first_task_classes!r}")
    most = len(order) - (n_tasks - 1)
    least = most if n_tasks == 1 else 1
    if not least <= first_task_classes <= most:
        raise ValueError(
            f"`first_task_classes` must be between {least} and {most}, so that each of the {n_tasks} tasks"
            f" gets a class and no class is lost, got {first_task_classes!r}"
        )
    rest = split_evenly(len(order) - first_task_classes, n_tasks - 1) if n_tasks > 1 else []
    return _cut(order, [first_task_classes, *rest])


def _label(name: str, value: object) -> int:
    if not hasattr(value, "__index__"):
        raise ValueError(
            f"`{name}` must hold the labels as integers, got {value!r}; text labels are numbered in alphabetical order"
        )
    return operator.index(value)


def _cut(order: list[int], sizes: Sequence[int]) -> list[list[int]]:
    lists, start = [], 0
    for size in sizes:
        lists.append(order[start : start + size])
        start += size
    return lists


def _check_lists(present: Sequence[int], classes: Sequence[Sequence[int]]) -> list[list[int]]:
    if not len(classes):
        raise ValueError("`classes` must hold a list of labels for each task, got none")
    known, owner = set(present), dict[int, int]()
    for task, own in enumerate(classes):
        if isinstance(own, int | str):
            raise ValueError(
                f"`classes` must hold one list per task, got {own!r} for task {task}; write [[0, 1], [2, 3]]"
            )
        if not len(own):
            raise ValueError(f"every task must have a class, got an empty list for task {task} in `classes`")
        for label in own:
            if label not in known:
                raise ValueError(
                    f"`classes` must name labels of the data, got {label!r} in task {task};"
                    f" the {len(known)} labels run from {min(known)} to {max(known)}"
                )
            if label in owner:
                raise ValueError(
                    f"`classes` must name a class once, got class {label} in task {owner[label]} and task {task}"
                )
            owner[label] = task
    return [[int(c) for c in own] for own in classes]
