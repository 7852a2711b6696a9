"""Forgetting and transfer as metrics; the formulas are in :mod:`cl_plugins.functional`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor

from cl_plugins import functional
from cl_plugins.functional._matrix import check_choice
from cl_plugins.functional.forgetting import Peak, Reduction, Since
from cl_plugins.functional.transfer import BackwardScheme, ForwardScheme

from ._metric import MatrixMetric


class Forgetting(MatrixMetric):
    """Earlier accuracy minus accuracy at the last row, over old tasks; the key says by which definition.

    WHEN: ``update`` per batch or evaluation, ``compute`` after each task; NaN until a second task was learned.

    Args:
        n_tasks: columns, or None to grow with the columns that are written.
        since: the peak runs over rows from ``"learned"`` on, or from the ``"start"``.
        peak: ``"max"`` takes the best earlier row, ``"learned"`` the row of learning.
        clip: count a task that improved as 0.
        normalize: ``"peak"`` divides by the peak.
        reduction: ``"mean"``, ``"max"`` (worst task) or ``"none"`` (a value per task).
        **kwargs: ``learned_at``, ``nan_policy``, ``validate_args`` and arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: for an unknown choice.

    Example:
        >>> metric = Forgetting(2)
        >>> metric.update_row(0, [9, 0], [10, -1])
        >>> metric.update_row(1, [7, 8], [10, 10])
        >>> metric.key, metric.compute()
        ('forgetting[peak,since=learned]', tensor(0.2000, dtype=torch.float64))
    """

    name = "forgetting"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.forgetting)
    higher_is_better = False
    plot_lower_bound = -1.0
    needs = frozenset({"old"})

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        since: Since = "learned",
        peak: Peak = "max",
        clip: bool = False,
        normalize: Literal["peak"] | None = None,
        reduction: Reduction = "mean",
        **kwargs: Any,
    ) -> None:
        super().__init__(n_tasks, **kwargs)
        check_choice("since", since, ("learned", "start"))
        check_choice("peak", peak, ("max", "learned"))
        check_choice("normalize", normalize, (None, "peak"))
        check_choice("reduction", reduction, ("mean", "max", "none"))
        self.options: dict[str, Any] = {
            "since": since,
            "peak": peak,
            "clip": clip,
            "normalize": normalize,
            "reduction": reduction,
        }

    def _variant(self) -> list[str]:
        options = self.options
        parts = ["learned"] if options["peak"] == "learned" else ["peak", f"since={options['since']}"]
        parts += ["clip"] if options["clip"] else []
        parts += ["relative"] if options["normalize"] else []
        return parts + ([options["reduction"]] if options["reduction"] != "mean" else [])

    def _value(self, matrix: Tensor, common: dict[str, Any]) -> Tensor:
        return functional.forgetting(matrix, **self.options, **common)


class BackwardTransfer(MatrixMetric):
    """What later training did to old tasks: accuracy minus accuracy right after learning.

    Args:
        n_tasks: columns, or None to grow with the columns that are written.
        scheme: ``"final"`` compares the last row, ``"running"`` averages over all boundaries.
        **kwargs: ``learned_at``, ``nan_policy``, ``validate_args`` and arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = BackwardTransfer(2, scheme="running")
        >>> metric.update_row(0, [9, 0], [10, -1])
        >>> metric.key, metric.compute(), metric.undefined
        ('backward_transfer[running]', tensor(nan, dtype=torch.float64), 'no task was learned before ... no old task')
    """

    name = "backward_transfer"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.backward_transfer)
    plot_lower_bound = -1.0
    needs = frozenset({"old"})

    def __init__(self, n_tasks: int | None = None, *, scheme: BackwardScheme = "final", **kwargs: Any) -> None:
        super().__init__(n_tasks, **kwargs)
        check_choice("scheme", scheme, ("final", "running"))
        self.scheme = scheme

    def _variant(self) -> list[str]:
        return [] if self.scheme == "final" else [self.scheme]

    def _value(self, matrix: Tensor, common: dict[str, Any]) -> Tensor:
        return functional.backward_transfer(matrix, scheme=self.scheme, **common)


class PositiveBackwardTransfer(MatrixMetric):
    """``max(BWT, 0)`` of the running backward transfer (BWT+)."""

    name = "positive_backward_transfer"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.positive_backward_transfer)
    needs = frozenset({"second"})


class Remembering(MatrixMetric):
    """``1 - abs(min(BWT, 0))`` of the running backward transfer (REM)."""

    name = "remembering"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.remembering)
    needs = frozenset({"second"})


class ForwardTransfer(MatrixMetric):
    """What earlier tasks did for a task before it was learned; needs the initial row (``update(-1, ...)``).

    Args:
        n_tasks: columns, or None to grow with the columns that are written.
        scheme: ``"previous"`` reads the boundary before learning, ``"triangle"`` all boundaries before it.
        baseline: ``"initial"`` subtracts the initial row, None subtracts nothing.
        **kwargs: ``learned_at``, ``nan_policy``, ``validate_args`` and arguments of ``torchmetrics.Metric``.

    Example:
        >>> metric = ForwardTransfer(2)
        >>> metric.update_row(0, [9, 3], [10, 10])
        >>> metric.update_row(1, [7, 8], [10, 10])
        >>> metric.compute(), metric.undefined
        (tensor(nan, dtype=torch.float64), 'the initial row was not measured: ...')
    """

    name = "forward_transfer"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.forward_transfer)
    plot_lower_bound = -1.0

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        scheme: ForwardScheme = "previous",
        baseline: Literal["initial"] | None = "initial",
        **kwargs: Any,
    ) -> None:
        super().__init__(n_tasks, **kwargs)
        check_choice("scheme", scheme, ("previous", "triangle"))
        check_choice("baseline", baseline, ("initial", None))
        self.scheme = scheme
        self.baseline = baseline

    @property
    def needs(self) -> frozenset[str]:
        """A second boundary, and the initial row for the default scheme."""
        reads_initial = self.scheme == "previous" and self.baseline == "initial"
        return frozenset({"second", "initial"}) if reads_initial else frozenset({"second"})

    def _variant(self) -> list[str]:
        if self.scheme == "triangle":
            return ["triangle"]
        return [] if self.baseline == "initial" else ["baseline=none"]

    def _value(self, matrix: Tensor, common: dict[str, Any]) -> Tensor:
        return functional.forward_transfer(matrix, scheme=self.scheme, baseline=self.baseline, **common)

    def _reason(self, matrix: Tensor) -> str:
        reason = super()._reason(matrix)
        return reason if "average over" not in reason else "a task was not evaluated before it was learned"


class TransferAccuracy(MatrixMetric):
    """Zero-shot accuracy on tasks before they are learned.

    Args:
        n_tasks: columns, or None to grow with the columns that are written.
        order: ``"column"`` averages over rows within each task first, ``"row"`` over tasks within each row first.
        **kwargs: ``learned_at``, ``nan_policy``, ``validate_args`` and arguments of ``torchmetrics.Metric``.
    """

    name = "transfer_accuracy"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.transfer_accuracy)

    def __init__(
        self, n_tasks: int | None = None, *, order: Literal["column", "row"] = "column", **kwargs: Any
    ) -> None:
        super().__init__(n_tasks, **kwargs)
        check_choice("order", order, ("column", "row"))
        self.order = order

    def _variant(self) -> list[str]:
        return [f"order={self.order}"]

    def _value(self, matrix: Tensor, common: dict[str, Any]) -> Tensor:
        return functional.transfer_accuracy(matrix, order=self.order, **common)

    def _reason(self, matrix: Tensor) -> str:
        reason = super()._reason(matrix)
        return reason if "average over" not in reason else "no task was evaluated before it was learned"


class MTILScores(MatrixMetric):
    """Transfer, average and last of multi-domain streams, as a dictionary.

    Example:
        >>> metric = MTILScores(2)
        >>> metric.update_row(0, [9, 3], [10, 10])
        >>> metric.update_row(1, [7, 8], [10, 10])
        >>> {key: round(float(value), 3) for key, value in metric.compute().items()}
        {'mtil_transfer': 0.3, 'mtil_average': 0.675, 'mtil_last': 0.75}
    """

    name = "mtil"
    function: ClassVar[Callable[..., Any]] = staticmethod(functional.mtil_scores)

    def _value(self, matrix: Tensor, common: dict[str, Any]) -> dict[str, Tensor]:
        return {f"mtil_{name}": value for name, value in functional.mtil_scores(matrix, **common).items()}
