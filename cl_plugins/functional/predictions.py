"""Class-incremental accuracy and bias, from the counts of true against predicted classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ._matrix import as_double, check_choice


def class_confusion(preds: Tensor, target: Tensor, n_classes: int) -> Tensor:
    """Counts of true class (row) against predicted class (column).

    Args:
        preds: predicted classes ``(samples,)`` int.
        target: true classes ``(samples,)`` int.
        n_classes: size of the head.

    Returns:
        ``(n_classes, n_classes)`` int64.

    Raises:
        ValueError: for different numbers of samples, or a class outside the head.

    Example:
        >>> class_confusion(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2)
        tensor([[1, 1],
                [0, 1]])
    """
    preds, target = preds.flatten().long(), target.flatten().long()
    if preds.shape != target.shape:
        raise ValueError(f"`preds` must have one entry per target ({len(target)}), got {len(preds)}")
    for name, labels in (("preds", preds), ("target", target)):
        if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= n_classes):
            found = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"`{name}` must hold classes from 0 to {n_classes - 1}, got {found}")
    return torch.bincount(target * n_classes + preds, minlength=n_classes**2).reshape(n_classes, n_classes)


def seen_class_accuracy(
    confusion: Tensor,
    seen_classes: Sequence[int],
    *,
    average: Literal["micro", "class", "task"] = "micro",
    task_of_class: Sequence[int] | None = None,
) -> Tensor:
    """Accuracy over the samples whose true class was seen.

    A prediction outside the seen classes counts as wrong. Classes that do not occur in the sample are left out of
    ``"class"``, where a plain macro average would count a class as 0 as soon as it is predicted once.

    Args:
        confusion: counts of true against predicted class ``(classes, classes)``.
        seen_classes: classes taught so far.
        average: ``"micro"`` over samples, ``"class"`` mean recall, or ``"task"`` mean over tasks.
        task_of_class: task of each class, for ``"task"``.

    Returns:
        Scalar float64 in [0, 1], higher is better; NaN without a sample.

    Example:
        >>> confusion = torch.tensor([[8, 2, 0], [0, 1, 1], [0, 0, 0]])
        >>> seen_class_accuracy(confusion, [0, 1]), seen_class_accuracy(confusion, [0, 1], average="class")
        (tensor(0.7500, dtype=torch.float64), tensor(0.6500, dtype=torch.float64))
    """
    check_choice("average", average, ("micro", "class", "task"))
    counts = as_double(confusion)
    seen = torch.zeros(len(counts), dtype=torch.bool, device=counts.device)
    seen[list(seen_classes)] = True
    right = torch.where(seen, counts.diagonal(), 0.0)
    samples = torch.where(seen, counts.sum(1), 0.0)
    if average == "micro":
        return right.sum() / samples.sum()
    if average == "task":
        tasks = _tasks(task_of_class, len(counts), counts.device)
        groups = torch.zeros(int(tasks.max()) + 1, dtype=counts.dtype, device=counts.device)
        right, samples = groups.index_add(0, tasks, right), groups.index_add(0, tasks, samples)
    return (right / samples)[samples > 0].mean()


def _tasks(task_of_class: Sequence[int] | Tensor | None, classes: int, device: torch.device) -> Tensor:
    if task_of_class is None or len(task_of_class) != classes:
        raise ValueError(f"`task_of_class` must have one task per class ({classes}), got {task_of_class!r}")
    return torch.as_tensor(task_of_class, dtype=torch.int64, device=device)


def task_confusion_matrix(confusion: Tensor, task_of_class: Sequence[int]) -> Tensor:
    """Counts of true task (row) against predicted task (column); errors inside a task are on the diagonal.

    Args:
        confusion: counts of true against predicted class ``(classes, classes)``.
        task_of_class: task of each class.

    Returns:
        ``(tasks, tasks)``, of the type of ``confusion``.

    Example:
        >>> task_confusion_matrix(torch.tensor([[8, 2, 0], [0, 1, 1], [1, 0, 2]]), [0, 0, 1])
        tensor([[11,  1],
                [ 1,  2]])
    """
    tasks = _tasks(task_of_class, len(confusion), confusion.device)
    size = int(tasks.max()) + 1
    rows = confusion.new_zeros(size, len(confusion)).index_add(0, tasks, confusion)
    return confusion.new_zeros(size, size).index_add(1, tasks, rows)


def task_id_accuracy(confusion: Tensor, task_of_class: Sequence[int]) -> Tensor:
    """Share of samples whose predicted class belongs to the right task, in [0, 1].

    Example:
        >>> task_id_accuracy(torch.tensor([[8, 2, 0], [0, 1, 1], [1, 0, 2]]), [0, 0, 1])
        tensor(0.8667, dtype=torch.float64)
    """
    counts = as_double(task_confusion_matrix(confusion, task_of_class))
    return counts.trace() / counts.sum()


def _newest(task_of_class: Sequence[int], seen_classes: Sequence[int]) -> int:
    return max((task_of_class[c] for c in seen_classes), default=-1)


def _is_newest(confusion: Tensor, seen_classes: Sequence[int], task_of_class: Sequence[int]) -> Tensor | None:
    tasks = _tasks(task_of_class, len(confusion), confusion.device)
    newest = tasks == _newest(task_of_class, seen_classes)
    seen = tasks[list(seen_classes)]
    return newest if bool((seen != seen.max()).any()) else None


def task_recency_bias(confusion: Tensor, seen_classes: Sequence[int], task_of_class: Sequence[int]) -> Tensor:
    """Share of predictions in the newest task minus share of samples from it, in [-1, 1]; 0 is no bias.

    Args:
        confusion: counts of true against predicted class ``(classes, classes)``.
        seen_classes: classes taught so far; the newest task is the last one among them.
        task_of_class: task of each class, ascending in the order of learning.

    Returns:
        Scalar float64; NaN before the second task.

    Example:
        >>> task_recency_bias(torch.tensor([[6, 4], [0, 10]]), [0, 1], [0, 1])
        tensor(0.2000, dtype=torch.float64)
    """
    counts = as_double(confusion)
    newest = _is_newest(counts, seen_classes, task_of_class)
    if newest is None:
        return counts.new_tensor(torch.nan)
    return (counts[:, newest].sum() - counts[newest].sum()) / counts.sum()


def task_recency_pull(confusion: Tensor, seen_classes: Sequence[int], task_of_class: Sequence[int]) -> Tensor:
    """Share of the errors on old tasks that land in the newest task, in [0, 1].

    Arguments as for :func:`task_recency_bias`; NaN before the second task, and without an error.

    Example:
        >>> task_recency_pull(torch.tensor([[6, 1, 3], [1, 9, 0], [0, 0, 5]]), [0, 1, 2], [0, 0, 1])
        tensor(0.6000, dtype=torch.float64)
    """
    counts = as_double(confusion)
    newest = _is_newest(counts, seen_classes, task_of_class)
    if newest is None:
        return counts.new_tensor(torch.nan)
    seen = torch.zeros_like(newest)
    seen[list(seen_classes)] = True
    old = counts[seen & ~newest]
    wrong = old.sum() - counts.diagonal()[seen & ~newest].sum()
    return old[:, newest].sum() / wrong if bool(wrong > 0) else counts.new_tensor(torch.nan)


def negative_flip_rate(before: Tensor, after: Tensor, target: Tensor) -> Tensor:
    """Share of samples that were right before and are wrong now, in [0, 1], lower is better.

    Args:
        before: earlier predictions ``(samples,)``.
        after: predictions now ``(samples,)``.
        target: true classes ``(samples,)``.

    Example:
        >>> negative_flip_rate(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 0, 0, 0]), torch.tensor([0, 1, 0, 0]))
        tensor(0.2500, dtype=torch.float64)
    """
    return as_double((before == target) & (after != target)).mean()
