"""Cost of a stream as metrics: one number per task goes in, an efficiency comes out.

The numbers are the same on every process, so nothing is summed: the ratios saturate at 1, log the raw numbers as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_plugins import functional

from ._state import RestoredMetric


class _SeriesMetric(RestoredMetric):
    """A number per task, in order; ``state_dict`` holds them, processes are expected to agree."""

    is_differentiable: bool | None = False
    higher_is_better: bool | None = True
    full_state_update: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0
    width = 1

    series: Tensor

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("sync_on_compute", False)
        super().__init__(**kwargs)
        empty = torch.zeros((0, self.width), dtype=torch.float64)
        self.add_state("series", empty, dist_reduce_fx="max", persistent=True)

    def _append(self, *values: float) -> None:
        if any(value < 0 for value in values):
            raise ValueError(f"a cost must be at least 0, got {values!r}")
        self.series = torch.cat([self.series, self.series.new_tensor([values])])

    def _nan(self) -> Tensor:
        return self.series.new_tensor(torch.nan)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the value, or a list of values, and return ``(figure, axes)``."""
        return self._plot(val, ax)


class ModelSizeEfficiency(_SeriesMetric):
    """``min(1, mean_i size_1 / size_i)`` (MS).

    WHEN: ``update`` once after each task.

    Example:
        >>> metric = ModelSizeEfficiency()
        >>> for size in (100, 200, 400):
        ...     metric.update(size)
        >>> metric.compute()
        tensor(0.5833, dtype=torch.float64)
    """

    key = "model_size_efficiency"

    def update(self, parameters: float) -> None:
        """Add the number of parameters after a task."""
        self._append(parameters)

    def compute(self) -> Tensor:
        """Efficiency in [0, 1], float64; NaN before the first task."""
        return functional.model_size_efficiency(self.series[:, 0]) if len(self.series) else self._nan()


class ParameterGrowth(_SeriesMetric):
    """Parameters after the last task over those after the first; ``update`` once after each task."""

    higher_is_better: bool | None = False
    plot_upper_bound: float | None = None
    key = "parameter_growth"

    def update(self, parameters: float) -> None:
        """Add the number of parameters after a task."""
        self._append(parameters)

    def compute(self) -> Tensor:
        """Ratio, float64; NaN before the first task."""
        return functional.parameter_growth(self.series[:, 0]) if len(self.series) else self._nan()


class SampleStorageEfficiency(_SeriesMetric):
    """``1 - min(1, mean_i stored_i / total)`` (SSS); ``update`` once after each task.

    Args:
        total: training samples of the whole stream, above 0.
        **kwargs: arguments of ``torchmetrics.Metric``.
    """

    key = "sample_storage_efficiency"

    def __init__(self, total: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if total <= 0:
            raise ValueError(f"`total` must be above 0, got {total!r}")
        self.total = total

    def update(self, stored: float) -> None:
        """Add the number of samples in memory after a task."""
        self._append(stored)

    def compute(self) -> Tensor:
        """Efficiency in [0, 1], float64; NaN before the first task."""
        if not len(self.series):
            return self._nan()
        return functional.sample_storage_efficiency(self.series[:, 0], self.total)


class ComputeEfficiency(_SeriesMetric):
    """``min(1, mean_i eps * up_i / (1 + ops_i))`` (CE); ``update`` once after each task.

    Args:
        eps: scale, above 1 to make small shares visible.
        **kwargs: arguments of ``torchmetrics.Metric``.
    """

    key = "compute_efficiency"
    width = 2

    def __init__(self, eps: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.eps = eps

    def update(self, operations: float, pass_operations: float) -> None:
        """Add the operations to learn a task, and those of one forward and backward pass over its samples."""
        self._append(operations, pass_operations)

    def compute(self) -> Tensor:
        """Efficiency in [0, 1], float64; NaN before the first task."""
        if not len(self.series):
            return self._nan()
        return functional.compute_efficiency(self.series[:, 0], self.series[:, 1], self.eps)
