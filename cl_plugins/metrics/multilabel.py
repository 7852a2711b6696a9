"""Multi-label measures as metrics; the formulas are in :mod:`cl_plugins.functional`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from cl_plugins import functional


class _CountMetric(Metric):
    is_differentiable: bool | None = False
    higher_is_better: bool | None = True
    full_state_update: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    name: ClassVar[str]
    counts: Tensor

    def __init__(self, n_classes: int, *, threshold: float = 0.5, k: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if n_classes < 1 or (k is not None and k < 1):
            raise ValueError(f"`n_classes` and `k` must be at least 1, got {n_classes!r} and {k!r}")
        self.threshold = threshold
        self.k = k
        self.add_state("counts", torch.zeros((3, n_classes), dtype=torch.int64), dist_reduce_fx="sum")

    @property
    def key(self) -> str:
        """Name with the threshold, or with k."""
        return f"{self.name}[{f'threshold={self.threshold}' if self.k is None else f'k={self.k}'}]"

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Add scores and 0/1 labels, both ``(batch, classes)``."""
        counts = functional.multilabel_counts(scores, labels, threshold=self.threshold, k=self.k)
        self.counts = self.counts + counts.to(self.counts.device)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the value, or a list of values, and return ``(figure, axes)``."""
        return self._plot(val, ax)


class MultilabelCF1(_CountMetric):
    """Harmonic mean of mean precision and mean recall over classes; not the mean of the classes' F1.

    WHEN: ``update`` per batch, ``compute`` and ``reset`` per evaluation.

    Args:
        n_classes: number of classes.
        threshold: a class with a score of at least this is predicted.
        k: predict the k classes with the highest scores instead.
        **kwargs: arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = MultilabelCF1(2)
        >>> metric.update(torch.tensor([[0.9, 0.2], [0.6, 0.7]]), torch.tensor([[1, 1], [0, 1]]))
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    name = "multilabel_cf1"

    def compute(self) -> Tensor:
        """CF1 in [0, 1], float64."""
        return functional.multilabel_cf1(self.counts)


class MultilabelOF1(_CountMetric):
    """F1 of the counts pooled over classes. Arguments as for :class:`MultilabelCF1`."""

    name = "multilabel_of1"

    def compute(self) -> Tensor:
        """OF1 in [0, 1], float64."""
        return functional.multilabel_of1(self.counts)


class SeenLabelMAP(Metric):
    """Mean average precision over the seen classes that occur; keeps all scores of the evaluation.

    Args:
        seen_classes: classes taught so far, None for all; set it when a task starts.
        **kwargs: arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = SeenLabelMAP([0])
        >>> metric.update(torch.tensor([[0.9, 0.2], [0.8, 0.7], [0.7, 0.1]]), torch.tensor([[1, 1], [0, 1], [1, 0]]))
        >>> metric.compute()
        tensor(0.8333, dtype=torch.float64)
    """

    is_differentiable: bool | None = False
    higher_is_better: bool | None = True
    full_state_update: bool | None = False
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    key = "seen_label_map"

    scores: list[Tensor] | Tensor
    labels: list[Tensor] | Tensor

    def __init__(self, seen_classes: Sequence[int] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen_classes = None if seen_classes is None else list(seen_classes)
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Add scores and 0/1 labels, both ``(batch, classes)``."""
        if scores.shape != labels.shape or scores.ndim != 2:
            shapes = f"{tuple(scores.shape)} and {tuple(labels.shape)}"
            raise ValueError(f"`scores` and `labels` must both have the shape (batch, classes), got {shapes}")
        assert isinstance(self.scores, list)
        assert isinstance(self.labels, list)
        self.scores.append(scores.detach())
        self.labels.append(labels.detach())

    def compute(self) -> Tensor:
        """MAP in [0, 1], float64; NaN when no seen class occurs."""
        return functional.seen_label_map(dim_zero_cat(self.scores), dim_zero_cat(self.labels), self.seen_classes)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the value, or a list of values, and return ``(figure, axes)``."""
        return self._plot(val, ax)
