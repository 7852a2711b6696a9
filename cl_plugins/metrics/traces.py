"""Measures inside tasks as metrics: a row per evaluation, several a task, ``learned_at`` the task's end.

The evaluation period is part of the key (``min_accuracy@every=10``), since values with others do not compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from cl_plugins import functional
from cl_plugins.functional._matrix import check_choice

from ._metric import MatrixMetric


class _TraceMetric(MatrixMetric):
    def __init__(self, n_tasks: int | None = None, *, every: int | None = None, **kwargs: Any) -> None:
        super().__init__(n_tasks, **kwargs)
        if every is not None and every < 1:
            raise ValueError(f"`every` must be at least 1 training step, or None, got {every!r}")
        self.every = every

    @property
    def key(self) -> str:
        """Name with its variant and the evaluation period."""
        return super().key if self.every is None else f"{super().key}@every={self.every}"


class MinAccuracy(_TraceMetric):
    """Mean over finished tasks of the smallest accuracy since the end of the task (min-ACC).

    Args:
        n_tasks: columns, or None to grow with the columns that are written.
        every: training steps between evaluations, for the key.
        **kwargs: ``learned_at``, ``nan_policy``, ``validate_args`` and arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = MinAccuracy(2, learned_at=[0, 2], every=10)
        >>> for row, correct in enumerate(([9, 1], [4, 5], [6, 8])):
        ...     metric.update_row(row, correct, [10, 10])
        >>> metric.key, metric.compute()
        ('min_accuracy@every=10', tensor(0.4000, dtype=torch.float64))
    """

    name = "min_accuracy"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.min_accuracy)
    needs = frozenset({"old"})


class WorstCaseAccuracy(_TraceMetric):
    """The current task now and all others at their worst since they ended (WC-ACC). Arguments as for MinAccuracy."""

    name = "worst_case_accuracy"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.worst_case_accuracy)


class _Windowed(_TraceMetric):
    def __init__(self, n_tasks: int | None = None, *, window: int = 10, **kwargs: Any) -> None:
        super().__init__(n_tasks, **kwargs)
        if window < 2:
            raise ValueError(f"`window` must hold at least 2 evaluations, got {window!r}")
        self.window = window

    def _variant(self) -> list[str]:
        return [f"window={self.window}"]

    def _value(self, matrix: Tensor, common: dict[str, Any]) -> Tensor:
        chosen = {name: common[name] for name in ("learned_at", "nan_policy")}
        value: Tensor = type(self).function(matrix, self.window, **chosen)
        return value


class WindowedForgetting(_Windowed):
    """Mean over tasks of the largest fall inside any ``window`` consecutive evaluations (WF).

    Args:
        n_tasks: columns, or None to grow with the columns that are written.
        window: number of evaluations, at least 2.
        every: training steps between evaluations, for the key.
        **kwargs: ``learned_at``, ``nan_policy``, ``validate_args`` and arguments of ``torchmetrics.Metric``.
    """

    name = "windowed_forgetting"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.windowed_forgetting)
    higher_is_better = False


class WindowedPlasticity(_Windowed):
    """Mean over tasks of the largest rise inside a window (WP). Arguments as for :class:`WindowedForgetting`."""

    name = "windowed_plasticity"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.windowed_plasticity)


class StabilityGap(_TraceMetric):
    """Dip of finished tasks after each switch to another task, averaged over tasks and switches, as a dictionary.

    ``stability_gap[depth]`` and ``stability_gap[residual]`` are means over all old tasks and switches. Where accuracy
    fell, ``stability_gap[recovered]`` is the share that came back before the next switch and
    ``stability_gap[recovery_steps]`` the evaluations that took; a task that did not fall, as one that stays at zero, is
    in neither.
    Arguments as for :class:`MinAccuracy`.
    """

    name = "stability_gap"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.stability_gap)
    higher_is_better = False
    needs = frozenset({"old"})

    def _value(self, matrix: Tensor, common: dict[str, Any]) -> dict[str, Tensor]:
        learned_at = common["learned_at"]
        (depth, _, steps, residual), stops = functional.stability_gaps(matrix, learned_at)
        ends = torch.tensor([len(matrix) if end is None or end < 0 else end for end in learned_at])
        old = ends <= torch.tensor(stops, dtype=torch.int64)[:, None]
        keep = old.to(depth.device) & (~depth.isnan() if self.nan_policy == "omit" else True)
        depth, steps, residual = depth[keep], steps[keep], residual[keep]
        values = {
            "depth": depth.mean(),
            "recovered": torch.where(depth.isnan(), torch.nan, (~steps.isnan()).double())[~(depth <= 0)].mean(),
            "recovery_steps": steps[depth > 0].nanmean(),
            "residual": residual.mean(),
        }
        return {self.key.replace(self.name, f"{self.name}[{part}]", 1): value for part, value in values.items()}


class AnytimeAccuracy(MatrixMetric):
    """Area under the curve of accuracy over training samples (A_AUC); a row per evaluation.

    A row's accuracy is over all samples counted in it: evaluate the classes seen so far. The initial row is sample 0:
    it is part of the trapezoid and not of the rectangle.

    Args:
        n_tasks: columns; 1 when rows are not split by task.
        rule: ``"rectangle"`` is the plain mean of the reference code, ``"trapezoid"`` integrates over uneven grids.
        samples_seen: training samples at each row ``(rows,)``; None for evenly spaced rows.
        **kwargs: ``validate_args`` and arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = AnytimeAccuracy()
        >>> for row, correct in enumerate((5, 7)):
        ...     metric.update(row, 0, correct, 10)
        >>> metric.compute()
        tensor(0.6000, dtype=torch.float64)
    """

    name = "anytime_accuracy"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.anytime_accuracy)

    def __init__(
        self,
        n_tasks: int | None = 1,
        *,
        rule: Literal["rectangle", "trapezoid"] = "rectangle",
        samples_seen: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(n_tasks, **kwargs)
        check_choice("rule", rule, ("rectangle", "trapezoid"))
        self.rule = rule
        self.samples_seen = samples_seen

    def _variant(self) -> list[str]:
        return [self.rule]

    def _value(self, matrix: Tensor, common: dict[str, Any]) -> Tensor:
        rows = len(matrix)
        seen = torch.arange(1, rows + 1) if self.samples_seen is None else self.samples_seen[:rows]
        correct, total = self.correct[: rows + 1].sum(1), self.total[: rows + 1].sum(1)
        curve = functional.accuracy_matrix(correct, total)
        with_start = self.rule == "trapezoid" and common["initial"] is not None
        curve, seen = (curve, torch.cat([seen.new_zeros(1), seen])) if with_start else (curve[1:], seen)
        if self.nan_policy == "omit":
            measured = ~curve.isnan()
            curve, seen = curve[measured], seen.to(measured.device)[measured]
        return functional.anytime_accuracy(curve, seen, rule=self.rule)


class LearningCurveArea(MatrixMetric):
    """Mean over tasks of the accuracy after 0 to ``beta`` mini-batches of the task (LCA); row b is after b of them.

    Args:
        n_tasks: columns, or None to grow with the columns that are written.
        beta: last mini-batch that counts.
        **kwargs: ``nan_policy``, ``validate_args`` and arguments of ``torchmetrics.Metric``.
    """

    name = "learning_curve_area"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.learning_curve_area)

    def __init__(self, n_tasks: int | None = None, *, beta: int = 10, **kwargs: Any) -> None:
        super().__init__(n_tasks, **kwargs)
        if beta < 0:
            raise ValueError(f"`beta` must be at least 0, got {beta!r}")
        self.beta = beta

    def _variant(self) -> list[str]:
        return [f"beta={self.beta}"]

    def _value(self, matrix: Tensor, common: dict[str, Any]) -> Tensor:
        curves = matrix.mT
        if self.nan_policy == "omit":
            curves = curves[~curves[:, : self.beta + 1].isnan().any(1)]
        return functional.learning_curve_area(curves, self.beta)
