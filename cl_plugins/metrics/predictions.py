"""Class-incremental accuracy and bias as metrics; they share one state, the counts of true against predicted class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from cl_plugins import functional
from cl_plugins.functional._matrix import check_choice

Unseen = Literal["mask", "count"]


class _ConfusionMetric(Metric):
    """Counts of true against predicted class ``(classes, classes)`` int64, summed over processes."""

    is_differentiable: bool | None = False
    higher_is_better: bool | None = None
    full_state_update: bool | None = False

    name: ClassVar[str]
    confusion: Tensor

    def __init__(
        self,
        task_of_class: Sequence[int],
        *,
        unseen: Unseen,
        seen_classes: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_choice("unseen", unseen, ("mask", "count"))
        if not task_of_class or min(task_of_class) < 0:
            raise ValueError(f"`task_of_class` must have a task of at least 0 per class, got {task_of_class!r}")
        self.task_of_class = list(task_of_class)
        self.unseen = unseen
        self.seen_classes = list(range(len(task_of_class))) if seen_classes is None else list(seen_classes)
        """Classes taught so far; set it when a task starts."""
        size = len(self.task_of_class)
        self.add_state("confusion", torch.zeros((size, size), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def key(self) -> str:
        """Name with its variant."""
        variant = self._variant()
        return f"{self.name}[{','.join(variant)}]" if variant else self.name

    def _variant(self) -> list[str]:
        return [f"unseen={self.unseen}"]

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add predictions.

        Args:
            preds: logits ``(batch, classes)``, or predicted classes ``(batch,)`` with ``unseen="count"``.
            target: true classes ``(batch,)``.

        Raises:
            ValueError: for predicted classes with ``unseen="mask"``, or another number of classes.
        """
        size = len(self.task_of_class)
        if preds.ndim == 2:
            if preds.shape[1] != size:
                raise ValueError(f"`preds` must have one logit per class ({size}), got shape {tuple(preds.shape)}")
            if self.unseen == "mask":
                hidden = torch.ones(size, dtype=torch.bool, device=preds.device)
                hidden[self.seen_classes] = False
                preds = preds.masked_fill(hidden, -torch.inf)
            preds = preds.argmax(1)
        elif self.unseen == "mask":
            raise ValueError('`preds` must be logits (batch, classes) with unseen="mask", got predicted classes')
        self.confusion = self.confusion + functional.class_confusion(preds, target, size).to(self.confusion.device)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the value, or a list of values, and return ``(figure, axes)``."""
        return self._plot(val, ax)


class SeenClassAccuracy(_ConfusionMetric):
    """Accuracy over the samples whose true class was seen.

    WHEN: ``update`` per batch, ``compute`` and ``reset`` per evaluation; set ``seen_classes`` when a task starts.

    Args:
        task_of_class: task of each class of the head, ascending in the order of learning.
        unseen: ``"mask"`` leaves logits of unseen classes out, ``"count"`` counts predictions there as errors.
        seen_classes: classes taught so far, None for all.
        average: ``"micro"`` over samples, ``"class"`` mean recall over classes that occur, ``"task"`` over tasks.
        **kwargs: arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = SeenClassAccuracy([0, 0, 1], unseen="mask", seen_classes=[0, 1])
        >>> metric.update(torch.tensor([[2.0, 1.0, 9.0], [0.0, 1.0, 2.0]]), torch.tensor([0, 1]))
        >>> metric.key, metric.compute()
        ('seen_class_accuracy[micro,unseen=mask]', tensor(1., dtype=torch.float64))
    """

    name = "seen_class_accuracy"
    higher_is_better = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def __init__(
        self,
        task_of_class: Sequence[int],
        *,
        unseen: Unseen,
        seen_classes: Sequence[int] | None = None,
        average: Literal["micro", "class", "task"] = "micro",
        **kwargs: Any,
    ) -> None:
        super().__init__(task_of_class, unseen=unseen, seen_classes=seen_classes, **kwargs)
        check_choice("average", average, ("micro", "class", "task"))
        self.average = average

    def _variant(self) -> list[str]:
        return [self.average, *super()._variant()]

    def compute(self) -> Tensor:
        """Accuracy in [0, 1], float64; NaN without a sample."""
        return functional.seen_class_accuracy(
            self.confusion, self.seen_classes, average=self.average, task_of_class=self.task_of_class
        )


class TaskConfusionMatrix(_ConfusionMetric):
    """Counts of true task (row) against predicted task (column). Arguments as for :class:`SeenClassAccuracy`.

    ``1 - trace/total`` is the share of samples whose task was mistaken.
    """

    name = "task_confusion_matrix"

    def compute(self) -> Tensor:
        """Counts ``(tasks, tasks)`` int64."""
        return functional.task_confusion_matrix(self.confusion, self.task_of_class)

    def plot(self, val: Tensor | None = None, ax: Any = None) -> Any:
        """Draw the counts as shares of each true task, and return ``(figure, axes)``."""
        from .matrix import AccuracyMatrix

        counts = (self.compute() if val is None else val).reshape(-1, 1 + max(self.task_of_class)).double()
        figure, axes = AccuracyMatrix().plot(counts / counts.sum(1, keepdim=True), ax)
        axes.set_xlabel("predicted task")
        axes.set_ylabel("true task")
        return figure, axes


class TaskRecencyBias(_ConfusionMetric):
    """Share of predictions in the newest task minus share of samples from it. Arguments as for SeenClassAccuracy."""

    name = "task_recency_bias"
    plot_lower_bound: float | None = -1.0
    plot_upper_bound: float | None = 1.0

    def compute(self) -> Tensor:
        """Bias in [-1, 1], float64, 0 for none; NaN before the second task."""
        return functional.task_recency_bias(self.confusion, self.seen_classes, self.task_of_class)


class TaskRecencyPull(_ConfusionMetric):
    """Share of the errors on old tasks that land in the newest one. Arguments as for :class:`SeenClassAccuracy`."""

    name = "task_recency_pull"
    higher_is_better = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    def compute(self) -> Tensor:
        """Share in [0, 1], float64; NaN before the second task and without an error."""
        return functional.task_recency_pull(self.confusion, self.seen_classes, self.task_of_class)


class NegativeFlipRate(Metric):
    """Share of samples that were right before and are wrong now.

    WHEN: ``update`` per batch with the predictions of both models, ``compute`` and ``reset`` per evaluation.

    Example:
        >>> metric = NegativeFlipRate()
        >>> metric.update(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([0, 1]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    is_differentiable: bool | None = False
    higher_is_better: bool | None = False
    full_state_update: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    key = "negative_flip_rate"

    flips: Tensor
    samples: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("flips", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, before: Tensor, after: Tensor, target: Tensor) -> None:
        """Add predictions ``(batch,)`` of the earlier and the present model, and the true classes."""
        if not before.shape == after.shape == target.shape:
            shapes = ", ".join(str(tuple(t.shape)) for t in (before, after, target))
            raise ValueError(f"`before`, `after` and `target` must have the same shape, got {shapes}")
        self.flips = self.flips + ((before == target) & (after != target)).sum()
        self.samples = self.samples + target.numel()

    def compute(self) -> Tensor:
        """Rate in [0, 1], float64; NaN without a sample."""
        return self.flips.double() / self.samples

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the value, or a list of values, and return ``(figure, axes)``."""
        return self._plot(val, ax)
