"""Change of features and confidences as metrics, from sums that add up over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from cl_plugins.functional._matrix import as_double
from cl_plugins.functional.representation import (
    calibration_bins,
    calibration_error,
    cka_from_products,
    spectrum_rank,
)

from ._state import RestoredMetric


class _SumMetric(Metric):
    is_differentiable: bool | None = False
    full_state_update: bool | None = False
    plot_lower_bound: float | None = 0.0

    def _add_sum(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the value, or a list of values, and return ``(figure, axes)``."""
        return self._plot(val, ax)


class EffectiveRank(_SumMetric):
    """Effective rank (RankMe) of the features of a fixed probe set, not centered.

    WHEN: ``update`` per batch of the probe set, ``compute`` and ``reset`` once it is through. The sums are float64 of
    size ``(dim, dim)``.

    Args:
        dim: size of the features.
        **kwargs: arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = EffectiveRank(3)
        >>> metric.update(torch.eye(3))
        >>> metric.compute()
        tensor(3.0000, dtype=torch.float64)
    """

    higher_is_better: bool | None = True
    key = "effective_rank"

    products: Tensor
    samples: Tensor

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sum("products", dim, dim)
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, features: Tensor) -> None:
        """Add features ``(batch, dim)``."""
        _check_features("features", features, len(self.products))
        values = as_double(features)
        self.products = self.products + values.mT @ values
        self.samples = self.samples + len(values)

    def compute(self) -> Tensor:
        """Rank from 1 to ``min(samples, dim)``, float64; NaN for features that are all 0."""
        squares = torch.linalg.eigvalsh(self.products).clamp(min=0.0)
        kept = squares.flip(0)[: int(self.samples)]
        return spectrum_rank(kept.sqrt()) if len(kept) else squares.new_tensor(torch.nan)


class LinearCKA(_SumMetric):
    """Similarity of two sets of features of the same probe samples, over the whole set.

    WHEN: ``update`` per batch of the probe set, ``compute`` and ``reset`` once it is through.

    Args:
        dim: size of the first features.
        other_dim: size of the second ones, None for the same.
        **kwargs: arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = LinearCKA(2)
        >>> features = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]])
        >>> for batch in features.split(2):
        ...     metric.update(batch, 5 * batch)
        >>> metric.compute()
        tensor(1.0000, dtype=torch.float64)
    """

    higher_is_better: bool | None = True
    plot_upper_bound: float | None = 1.0
    key = "linear_cka"

    cross: Tensor
    first: Tensor
    second: Tensor
    first_sum: Tensor
    second_sum: Tensor
    samples: Tensor

    def __init__(self, dim: int, other_dim: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        other = dim if other_dim is None else other_dim
        self._add_sum("cross", dim, other)
        self._add_sum("first", dim, dim)
        self._add_sum("second", other, other)
        self._add_sum("first_sum", dim)
        self._add_sum("second_sum", other)
        self._add_sum("samples")

    def update(self, first: Tensor, second: Tensor) -> None:
        """Add features ``(batch, dim)`` and ``(batch, other_dim)`` of the same samples."""
        _check_features("first", first, len(self.first_sum))
        _check_features("second", second, len(self.second_sum))
        if len(first) != len(second):
            raise ValueError(f"`second` must have one row per row of `first` ({len(first)}), got {len(second)}")
        x, y = as_double(first), as_double(second)
        self.cross = self.cross + x.mT @ y
        self.first = self.first + x.mT @ x
        self.second = self.second + y.mT @ y
        self.first_sum = self.first_sum + x.sum(0)
        self.second_sum = self.second_sum + y.sum(0)
        self.samples = self.samples + len(x)

    def _similarity(self) -> Tensor:
        x, y, n = self.first_sum, self.second_sum, self.samples
        cross = self.cross - torch.outer(x, y) / n
        return cka_from_products(cross, self.first - torch.outer(x, x) / n, self.second - torch.outer(y, y) / n)

    def compute(self) -> Tensor:
        """CKA in [0, 1], float64; NaN for constant features."""
        return self._similarity()


class RepresentationDrift(LinearCKA):
    """``1 - linear_cka`` between the features before and after training. Arguments as for :class:`LinearCKA`."""

    higher_is_better: bool | None = False
    key = "representation_drift"

    def compute(self) -> Tensor:
        """Drift in [0, 1], float64; NaN for constant features."""
        return 1.0 - self._similarity()


class CalibrationDrift(_SumMetric, RestoredMetric):
    """Calibration error of each task now minus the one right after it was learned.

    WHEN: ``update`` per batch of an evaluation, with the row and column as for an accuracy matrix; ``reset`` drops
    everything. States are part of ``state_dict``.

    Args:
        n_tasks: columns, and rows unless ``n_rows`` says otherwise.
        bins: number of equal bins.
        closed: the edge that belongs to a bin, ``"left"`` as in torchmetrics or ``"right"`` as in Guo et al.
        learned_at: row at which each column was learned, None for never; None for column j at row j.
        n_rows: number of evaluations.
        **kwargs: arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = CalibrationDrift(1, bins=1, n_rows=2)
        >>> metric.update(0, 0, torch.tensor([0.9, 0.9]), torch.tensor([1, 1]))
        >>> metric.update(1, 0, torch.tensor([0.9, 0.9]), torch.tensor([1, 0]))
        >>> metric.compute()
        tensor(0.3000, dtype=torch.float64)
    """

    higher_is_better: bool | None = False
    plot_lower_bound: float | None = -1.0
    plot_upper_bound: float | None = 1.0
    key = "calibration_drift"

    counts: Tensor

    def __init__(
        self,
        n_tasks: int,
        *,
        bins: int = 15,
        closed: Literal["left", "right"] = "left",
        learned_at: Sequence[int | None] | None = None,
        n_rows: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.bins = bins
        self.closed: Literal["left", "right"] = closed
        self.learned_at = list(range(n_tasks)) if learned_at is None else list(learned_at)
        if len(self.learned_at) != n_tasks:
            raise ValueError(f"`learned_at` must have one row per task ({n_tasks}), got {learned_at!r}")
        self._add_sum("counts", n_rows or n_tasks, n_tasks, 3, bins)
        self.persistent(True)

    def update(self, row: int, column: int, confidence: Tensor, correct: Tensor) -> None:
        """Add confidences in [0, 1] and whether the predictions were right, both ``(batch,)``."""
        rows, columns = self.counts.shape[:2]
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(f"`row` and `column` must lie in a matrix of {rows} x {columns}, got {row!r}, {column!r}")
        counts = self.counts.clone()
        counts[row, column] += calibration_bins(confidence, correct, self.bins, self.closed).to(counts.device)
        self.counts = counts

    @property
    def errors(self) -> Tensor:
        """Calibration error of each cell ``(rows, tasks)`` float64, NaN where not measured."""
        return calibration_error(self.counts)

    def compute(self) -> Tensor:
        """Mean over the tasks learned before the last measured row, float64; NaN without one."""
        errors = self.errors
        measured = (~errors.isnan()).any(1).nonzero()
        if not len(measured):
            return errors.new_tensor(torch.nan)
        last = int(measured[-1])
        old = [(step, j) for j, step in enumerate(self.learned_at) if step is not None and 0 <= step < last]
        drift = [errors[last, j] - errors[step, j] for step, j in old]
        return torch.stack(drift).mean() if drift else errors.new_tensor(torch.nan)


def _check_features(name: str, features: Tensor, dim: int) -> None:
    if features.ndim != 2 or features.shape[1] != dim:
        raise ValueError(f"`{name}` must have the shape (batch, {dim}), got {tuple(features.shape)}")
