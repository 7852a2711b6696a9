"""The numbers of an accuracy matrix as torchmetrics metrics; each is a thin class around its pure function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from torchmetrics import MetricCollection

from cl_plugins import functional as F

from .matrix import MatrixMetric


class AverageAccuracy(MatrixMetric):
    """Mean over the tasks seen of the accuracy at the last row.

    Example:
        >>> import torch
        >>> metric = AverageAccuracy(2)
        >>> metric.update_row(1, torch.tensor([6, 8]), torch.tensor([10, 10]))
        >>> round(metric.compute().item(), 3)
        0.7
    """

    name = "average_accuracy"

    def value(self, matrix: Tensor) -> Tensor:
        """:func:`cl_plugins.functional.average_accuracy`."""
        return F.average_accuracy(matrix, learned_at=self.learned_at)


class AverageIncrementalAccuracy(MatrixMetric):
    """Mean over the rows of the accuracy over the tasks seen there."""

    name = "average_incremental_accuracy"

    def value(self, matrix: Tensor) -> Tensor:
        """:func:`cl_plugins.functional.average_incremental_accuracy`."""
        return F.average_incremental_accuracy(matrix, learned_at=self.learned_at)


class LearningAccuracy(MatrixMetric):
    """Mean over the tasks seen of the accuracy right after learning the task."""

    name = "learning_accuracy"

    def value(self, matrix: Tensor) -> Tensor:
        """:func:`cl_plugins.functional.learning_accuracy`."""
        return F.learning_accuracy(matrix, learned_at=self.learned_at)


class Forgetting(MatrixMetric):
    """How much accuracy the old tasks lost; the arguments choose among the definitions of the literature.

    Args:
        n_tasks: number of tasks.
        since: "learned" or "start": where the peak is looked for.
        peak: "max" accuracy, or the one right after learning ("learned").
        clip: count gains as 0.
        normalize: "peak" divides by the peak.
        reduction: "mean" or "max" over the old tasks.
        kwargs: of :class:`AccuracyMatrix`.

    Example:
        >>> Forgetting(3, clip=True).key
        'forgetting[peak=best,since=learned,clip]'
    """

    higher_is_better = False
    plot_lower_bound = -1.0

    def __init__(
        self,
        n_tasks: int,
        *,
        since: Literal["learned", "start"] = "learned",
        peak: Literal["max", "learned"] = "max",
        clip: bool = False,
        normalize: Literal["peak"] | None = None,
        reduction: Literal["mean", "max"] = "mean",
        learned_at: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(n_tasks, learned_at=learned_at, **kwargs)
        self.since = since
        self.peak = peak
        self.clip = clip
        self.normalize = normalize
        self.reduction = reduction

    @property
    def key(self) -> str:
        """Name with its variant."""
        parts = [f"peak={self.peak}", f"since={self.since}"]
        parts += ["clip"] if self.clip else []
        parts += ["relative"] if self.normalize else []
        parts += ["max"] if self.reduction == "max" else []
        return f"forgetting[{','.join(parts)}]"

    def value(self, matrix: Tensor) -> Tensor:
        """:func:`cl_plugins.functional.forgetting`."""
        return F.forgetting(
            matrix,
            learned_at=self.learned_at,
            since=self.since,
            peak=self.peak,
            clip=self.clip,
            normalize=self.normalize,
            reduction=self.reduction,
        )


class BackwardTransfer(MatrixMetric):
    """What learning later tasks gave to old ones.

    Args:
        n_tasks: number of tasks.
        scheme: "final" reads the last row, "running" all rows.
        kwargs: of :class:`AccuracyMatrix`.
    """

    plot_lower_bound = -1.0

    def __init__(self, n_tasks: int, *, scheme: Literal["final", "running"] = "final", **kwargs: Any) -> None:
        super().__init__(n_tasks, **kwargs)
        self.scheme = scheme

    @property
    def key(self) -> str:
        """Name with its variant."""
        return f"backward_transfer[{self.scheme}]"

    def value(self, matrix: Tensor) -> Tensor:
        """:func:`cl_plugins.functional.backward_transfer`."""
        return F.backward_transfer(matrix, learned_at=self.learned_at, scheme=self.scheme)


class ForwardTransfer(MatrixMetric):
    """Accuracy on tasks just before they are learned, above that of the untrained model; needs the initial row.

    Args:
        n_tasks: number of tasks.
        baseline: subtract the initial row, without which the number is undefined.
        scheme: "previous" reads the row before learning, "triangle" all rows before it.
        kwargs: of :class:`AccuracyMatrix`.
    """

    plot_lower_bound = -1.0

    def __init__(
        self,
        n_tasks: int,
        *,
        baseline: bool = True,
        scheme: Literal["previous", "triangle"] = "previous",
        **kwargs: Any,
    ) -> None:
        super().__init__(n_tasks, **kwargs)
        self.baseline = baseline
        self.scheme = scheme

    @property
    def key(self) -> str:
        """Name with its variant."""
        above = "initial" if self.baseline and self.scheme == "previous" else "none"
        return f"forward_transfer[{self.scheme},baseline={above}]"

    def value(self, matrix: Tensor) -> Tensor:
        """:func:`cl_plugins.functional.forward_transfer`."""
        return F.forward_transfer(
            matrix,
            initial=self.initial,
            learned_at=self.learned_at,
            baseline="initial" if self.baseline else None,
            scheme=self.scheme,
        )

    def _reason(self, matrix: Tensor) -> str:
        if self.baseline and self.scheme == "previous" and self.initial is None:
            return "no evaluation before training; pass evaluate_initial=True to fit_stream"
        return super()._reason(matrix)


def standard_metrics(n_tasks: int, learned_at: Sequence[int] | None = None) -> MetricCollection:
    """The usual numbers of a stream, each under its key; they share one state.

    Example:
        >>> sorted(standard_metrics(3))[:2]
        ['average_accuracy', 'average_incremental_accuracy']
    """
    members = [
        AverageAccuracy(n_tasks, learned_at=learned_at),
        AverageIncrementalAccuracy(n_tasks, learned_at=learned_at),
        LearningAccuracy(n_tasks, learned_at=learned_at),
        Forgetting(n_tasks, learned_at=learned_at),
        BackwardTransfer(n_tasks, learned_at=learned_at),
    ]
    return MetricCollection({m.key: m for m in members})
