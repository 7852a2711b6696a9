"""Metrics of continual learning as torchmetrics classes; the pure functions are in :mod:`cl_plugins.functional`."""

from .matrix import AccuracyMatrix, MatrixMetric
from .scores import (
    AverageAccuracy,
    AverageIncrementalAccuracy,
    BackwardTransfer,
    Forgetting,
    ForwardTransfer,
    LearningAccuracy,
    standard_metrics,
)

__all__ = [
    "AccuracyMatrix",
    "AverageAccuracy",
    "AverageIncrementalAccuracy",
    "BackwardTransfer",
    "Forgetting",
    "ForwardTransfer",
    "LearningAccuracy",
    "MatrixMetric",
    "standard_metrics",
]
