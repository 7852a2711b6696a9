"""Accuracy of the stream as metrics; the formulas are in :mod:`cl_plugins.functional`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor

from cl_plugins import functional
from cl_plugins.functional._matrix import Average, check_choice

from ._metric import MatrixMetric


class _AveragedAccuracy(MatrixMetric):
    def __init__(self, n_tasks: int | None = None, *, average: Average = "macro", **kwargs: Any) -> None:
        super().__init__(n_tasks, **kwargs)
        check_choice("average", average, ("macro", "micro"))
        self.average = average

    def _variant(self) -> list[str]:
        return [] if self.average == "macro" else [self.average]

    def _value(self, matrix: Tensor, common: dict[str, Any]) -> Tensor:
        value: Tensor = type(self).function(matrix, average=self.average, n_test=self.n_test, **common)
        return value


class AverageAccuracy(_AveragedAccuracy):
    """Mean over seen tasks of the last row ("last accuracy", A_B).

    WHEN: ``update`` per batch or evaluation, ``compute`` after each task.

    Args:
        n_tasks: columns, or None to grow with the columns that are written.
        average: ``"macro"`` weights tasks equally, ``"micro"`` by their test samples.
        **kwargs: ``learned_at``, ``nan_policy``, ``validate_args`` and arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = AverageAccuracy(2)
        >>> metric.update_row(0, [9, 0], [10, -1])
        >>> metric.update_row(1, [7, 8], [10, 10])
        >>> metric.compute()
        tensor(0.7500, dtype=torch.float64)
    """

    name = "average_accuracy"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.average_accuracy)


class AverageIncrementalAccuracy(_AveragedAccuracy):
    """Mean over boundaries of the average accuracy there (A-bar). Arguments as for :class:`AverageAccuracy`.

    Example:
        >>> metric = AverageIncrementalAccuracy(2)
        >>> metric.update_row(0, [9, 0], [10, -1])
        >>> metric.update_row(1, [7, 8], [10, 10])
        >>> metric.compute()
        tensor(0.8250, dtype=torch.float64)
    """

    name = "average_incremental_accuracy"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.average_incremental_accuracy)


class AccuracyOverTime(MatrixMetric):
    """Mean over all cells at or after learning; late rows weigh more."""

    name = "accuracy_over_time"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.accuracy_over_time)


class LearningAccuracy(MatrixMetric):
    """Mean over seen tasks of the accuracy right after learning."""

    name = "learning_accuracy"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.learning_accuracy)


class WorstTaskAccuracy(MatrixMetric):
    """Smallest accuracy of a seen task in the last row."""

    name = "worst_task_accuracy"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.worst_task_accuracy)


class Stability(MatrixMetric):
    """Mean over old tasks of the last row."""

    name = "stability"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.stability)
    needs = frozenset({"old"})


class Plasticity(MatrixMetric):
    """The same as :class:`LearningAccuracy`, under the name that goes with :class:`Stability`."""

    name = "plasticity"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.plasticity)


class StabilityPlasticity(MatrixMetric):
    """Harmonic mean of :class:`Stability` and :class:`Plasticity`."""

    name = "stability_plasticity"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.stability_plasticity)
    needs = frozenset({"old"})


class PerformanceDrop(MatrixMetric):
    """Accuracy over all samples seen after the base session, minus after the last one (few-shot streams)."""

    name = "performance_drop"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.performance_drop)
    higher_is_better = False
    plot_lower_bound = -1.0

    def _value(self, matrix: Tensor, common: dict[str, Any]) -> Tensor:
        return functional.performance_drop(matrix, self.n_test, **common)


class HarmonicAccuracy(MatrixMetric):
    """Harmonic mean of final accuracy on the base session's tasks and on all later ones (few-shot streams)."""

    name = "harmonic_accuracy"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.harmonic_accuracy)
    needs = frozenset({"second"})

    def _value(self, matrix: Tensor, common: dict[str, Any]) -> Tensor:
        return functional.harmonic_accuracy(matrix, self.n_test, **common)
