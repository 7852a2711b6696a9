"""Measures against models trained another way, as metrics; the formulas are in :mod:`cl_plugins.functional`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor

from cl_plugins import functional
from cl_plugins.functional._matrix import check_choice

from ._metric import MatrixMetric


class PlasticityGain(MatrixMetric):
    """Accuracy right after learning minus that of a model trained on the task alone, over tasks after the first.

    Args:
        n_tasks: columns, or None to grow with the columns that are written.
        independent: accuracy of a model for each task alone ``(tasks,)``, in [0, 1].
        **kwargs: ``learned_at``, ``nan_policy``, ``validate_args`` and arguments of ``torchmetrics.Metric``.
    """

    name = "plasticity_gain"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.plasticity_gain)
    plot_lower_bound = -1.0
    needs = frozenset({"second", "independent"})

    def __init__(self, n_tasks: int | None = None, *, independent: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(n_tasks, **kwargs)
        self.independent = independent

    def _value(self, matrix: Tensor, common: dict[str, Any]) -> Tensor:
        return functional.plasticity_gain(matrix, self.independent, **common)


class Intransigence(MatrixMetric):
    """Accuracy of joint training on the tasks so far minus accuracy right after learning.

    Args:
        n_tasks: columns, or None to grow with the columns that are written.
        joint_upto: accuracy on task j of a model trained on all tasks up to j ``(tasks,)``, in [0, 1].
        reduction: ``"mean"`` over seen tasks, or the task learned ``"last"``.
        **kwargs: ``learned_at``, ``nan_policy``, ``validate_args`` and arguments of ``torchmetrics.Metric``.
    """

    name = "intransigence"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.intransigence)
    higher_is_better = False
    plot_lower_bound = -1.0
    needs = frozenset({"joint_upto"})

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        joint_upto: Tensor | None = None,
        reduction: Literal["mean", "last"] = "mean",
        **kwargs: Any,
    ) -> None:
        super().__init__(n_tasks, **kwargs)
        check_choice("reduction", reduction, ("mean", "last"))
        self.joint_upto = joint_upto
        self.reduction = reduction

    def _variant(self) -> list[str]:
        return [] if self.reduction == "mean" else [self.reduction]

    def _value(self, matrix: Tensor, common: dict[str, Any]) -> Tensor:
        return functional.intransigence(matrix, self.joint_upto, reduction=self.reduction, **common)


class ForgettingRatio(MatrixMetric):
    """Where the final accuracy lies between guessing (-1) and joint training (0).

    Args:
        n_tasks: columns, or None to grow with the columns that are written.
        joint: accuracy of a model trained on all tasks at once ``(tasks,)``, in [0, 1].
        random: accuracy of guessing ``(tasks,)``, in [0, 1].
        **kwargs: ``learned_at``, ``nan_policy``, ``validate_args`` and arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = ForgettingRatio(2)
        >>> metric.update_row(0, [9, 3], [10, 10])
        >>> metric.compute(), metric.undefined
        (tensor(nan, dtype=torch.float64), 'the reference `joint` was not given')
    """

    name = "forgetting_ratio"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.forgetting_ratio)
    plot_lower_bound = -1.0
    needs = frozenset({"joint", "random"})

    def __init__(
        self, n_tasks: int | None = None, *, joint: Tensor | None = None, random: Tensor | None = None, **kwargs: Any
    ) -> None:
        super().__init__(n_tasks, **kwargs)
        self.joint = joint
        self.random = random

    def _value(self, matrix: Tensor, common: dict[str, Any]) -> Tensor:
        return functional.forgetting_ratio(matrix, self.joint, self.random, **common)


class NormalizedAccuracy(MatrixMetric):
    """Final accuracy as a share of joint training's, over seen tasks.

    Args:
        n_tasks: columns, or None to grow with the columns that are written.
        joint: accuracy of a model trained on all tasks at once ``(tasks,)``, in [0, 1].
        **kwargs: ``learned_at``, ``nan_policy``, ``validate_args`` and arguments of ``torchmetrics.Metric``.
    """

    name = "normalized_accuracy"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.normalized_accuracy)
    plot_upper_bound = None
    needs = frozenset({"joint"})

    def __init__(self, n_tasks: int | None = None, *, joint: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(n_tasks, **kwargs)
        self.joint = joint

    def _value(self, matrix: Tensor, common: dict[str, Any]) -> Tensor:
        return functional.normalized_accuracy(matrix, self.joint, **common)
