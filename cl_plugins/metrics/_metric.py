"""What the metrics of an accuracy matrix have in common besides their state: the key, the reason for NaN, the plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ._state import MatrixState


class MatrixMetric(MatrixState):
    """A number, or several, that a pure function computes from the accuracy matrix.

    A subclass names the function, or overrides ``_value`` to pass arguments of its own to it.

    Args:
        n_tasks: columns, or None to grow with the columns that are written.
        **kwargs: ``learned_at``, ``nan_policy``, ``validate_args`` and arguments of ``torchmetrics.Metric``.
    """

    higher_is_better: bool | None = True
    plot_lower_bound: float | None = 0.0
    plot_upper_bound: float | None = 1.0

    name: ClassVar[str]
    function: ClassVar[Callable[..., Any]]

    def __init__(self, n_tasks: int | None = None, **kwargs: Any) -> None:
        super().__init__(n_tasks, **kwargs)
        self.undefined: str | None = None
        """Why the latest result is NaN; None when it is defined."""

    @property
    def needs(self) -> frozenset[str]:
        """What a value requires: ``"old"`` task, ``"second"`` boundary, ``"initial"`` row, or a reference by name."""
        return frozenset()

    @property
    def key(self) -> str:
        """Name of the value with its variant, such as ``forgetting[peak,since=learned]``."""
        variant = self._variant()
        if self.nan_policy == "omit":
            variant = [*variant, "omit"]
        return f"{self.name}[{','.join(variant)}]" if variant else self.name

    def _variant(self) -> list[str]:
        return []

    def _value(self, matrix: Tensor, common: dict[str, Any]) -> Any:
        return type(self).function(matrix, **common)

    def compute(self) -> Any:
        """The value for the rows written so far, float64; where it is NaN, ``undefined`` says why."""
        matrix = self.matrix
        value = self._value(matrix, self.common())
        parts = value.values() if isinstance(value, dict) else [value]
        missing = any(bool(part.isnan().all()) for part in parts)
        self.undefined = self._reason(matrix) if missing else None
        return value

    def _reason(self, matrix: Tensor) -> str:
        rows = len(matrix)
        if not rows:
            return "no evaluation was recorded"
        learned = [step for step in self.common()["learned_at"] if step is not None and 0 <= step < rows]
        if not learned:
            return "no task was learned by the last row"
        for name in sorted(self.needs - {"old", "second", "initial"}):
            if getattr(self, name) is None:
                return f"the reference `{name}` was not given"
        if "old" in self.needs and min(learned) == rows - 1:
            return "no task was learned before the last row, so there is no old task"
        if "second" in self.needs and len(set(learned)) < 2:
            return "only one task was learned"
        if "initial" in self.needs and self.initial is None:
            return "the initial row was not measured: evaluate before training and write row -1"
        hole = _first_hole(matrix, self.common()["learned_at"])
        if hole is not None:
            return f"row {hole[0]}, column {hole[1]} was not measured; nan_policy='omit' leaves such cells out"
        return "no task is left to average over"

    def reset_all(self) -> None:
        """Drop every row, as ``reset`` of other metrics does."""
        super().reset_all()
        self.undefined = None

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot the value, or a list of values over the stream, and return ``(figure, axes)``."""
        return self._plot(val, ax)


def _first_hole(matrix: Tensor, learned_at: list[int | None]) -> tuple[int, int] | None:
    """The first cell at or after learning that was not measured."""
    rows = len(matrix)
    learned = torch.tensor([rows if step is None or step < 0 else step for step in learned_at], device=matrix.device)
    seen = learned <= torch.arange(rows, device=matrix.device)[:, None]
    holes = (matrix.isnan() & seen).nonzero()
    return (int(holes[0, 0]), int(holes[0, 1])) if len(holes) else None
