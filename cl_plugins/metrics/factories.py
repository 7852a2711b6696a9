"""Ready-made collections; the metrics of each share one state, so a row is written once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection

from . import accuracy, forgetting, traces
from ._metric import MatrixMetric


def _collection(metrics: Sequence[MatrixMetric]) -> MetricCollection:
    return MetricCollection({metric.key: metric for metric in metrics})


def standard_metrics(n_tasks: int | None = None, **kwargs: Any) -> MetricCollection:
    """What every report should hold: accuracy, and forgetting by each definition in use.

    Args:
        n_tasks: columns, or None to grow with the columns that are written.
        **kwargs: ``learned_at``, ``nan_policy`` and further arguments of each metric.

    Example:
        >>> metrics = standard_metrics(2)
        >>> metrics.update(0, range(2), [9, 0], [10, -1])
        >>> metrics.update(1, range(2), [7, 8], [10, 10])
        >>> round(float(metrics.compute()["forgetting[peak,since=learned]"]), 2)
        0.2
    """
    return _collection(
        [
            accuracy.AverageAccuracy(n_tasks, **kwargs),
            accuracy.AverageIncrementalAccuracy(n_tasks, **kwargs),
            accuracy.LearningAccuracy(n_tasks, **kwargs),
            accuracy.WorstTaskAccuracy(n_tasks, **kwargs),
            accuracy.StabilityPlasticity(n_tasks, **kwargs),
            forgetting.Forgetting(n_tasks, **kwargs),
            forgetting.Forgetting(n_tasks, since="start", **kwargs),
            forgetting.Forgetting(n_tasks, clip=True, **kwargs),
            forgetting.Forgetting(n_tasks, peak="learned", **kwargs),
            forgetting.Forgetting(n_tasks, normalize="peak", **kwargs),
            forgetting.BackwardTransfer(n_tasks, **kwargs),
            forgetting.ForwardTransfer(n_tasks, **kwargs),
        ]
    )


def cil_metrics(n_tasks: int | None = None, **kwargs: Any) -> MetricCollection:
    """Class-incremental and few-shot streams: means over samples, as that literature reports. Arguments as above.

    Example:
        >>> sorted(cil_metrics(2))[:2]
        ['average_accuracy[micro]', 'average_incremental_accuracy[micro]']
    """
    return _collection(
        [
            accuracy.AverageAccuracy(n_tasks, average="micro", **kwargs),
            accuracy.AverageIncrementalAccuracy(n_tasks, average="micro", **kwargs),
            accuracy.PerformanceDrop(n_tasks, **kwargs),
            accuracy.HarmonicAccuracy(n_tasks, **kwargs),
            forgetting.Forgetting(n_tasks, **kwargs),
            forgetting.BackwardTransfer(n_tasks, **kwargs),
        ]
    )


def vlm_metrics(n_tasks: int | None = None, **kwargs: Any) -> MetricCollection:
    """Vision-language streams with zero-shot columns: transfer, average, last, and forgetting from both starts.

    Evaluate all tasks in every row. Arguments as for :func:`standard_metrics`.

    Example:
        >>> "forgetting[peak,since=start]" in vlm_metrics(2)
        True
    """
    return _collection(
        [
            forgetting.MTILScores(n_tasks, **kwargs),
            forgetting.TransferAccuracy(n_tasks, order="row", **kwargs),
            forgetting.ForwardTransfer(n_tasks, **kwargs),
            forgetting.Forgetting(n_tasks, **kwargs),
            forgetting.Forgetting(n_tasks, since="start", **kwargs),
            forgetting.BackwardTransfer(n_tasks, **kwargs),
        ]
    )


def online_metrics(
    n_tasks: int | None = None,
    *,
    every: int | None = None,
    window: int = 10,
    samples_seen: Tensor | None = None,
    **kwargs: Any,
) -> MetricCollection:
    """Evaluation inside tasks: a row per evaluation, ``learned_at`` the row at which each task ended.

    Args:
        n_tasks: columns, or None to grow with the columns that are written.
        every: training steps between evaluations, for the keys.
        window: evaluations in a window of windowed forgetting and plasticity.
        samples_seen: training samples at each row, for uneven evaluations.
        **kwargs: ``learned_at``, ``nan_policy`` and further arguments of each metric.

    Example:
        >>> sorted(online_metrics(2, every=10))[1]
        'min_accuracy@every=10'
    """
    return _collection(
        [
            traces.MinAccuracy(n_tasks, every=every, **kwargs),
            traces.WorstCaseAccuracy(n_tasks, every=every, **kwargs),
            traces.WindowedForgetting(n_tasks, window=window, every=every, **kwargs),
            traces.WindowedPlasticity(n_tasks, window=window, every=every, **kwargs),
            traces.StabilityGap(n_tasks, every=every, **kwargs),
            traces.AnytimeAccuracy(n_tasks, samples_seen=samples_seen, **kwargs),
        ]
    )
