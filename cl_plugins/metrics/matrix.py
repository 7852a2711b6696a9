"""The accuracy matrix as a torchmetrics metric: integer counts that add up over processes.

Row ``i`` of the matrix is the evaluation after task ``i``; the row before any training is kept apart. All metrics of this
package share this state, so a ``MetricCollection`` updates it once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric


class AccuracyMatrix(Metric):
    """Accuracy of every task after every task.

    WHEN: :meth:`update` adds the counts of one batch, :meth:`update_row` writes a whole evaluation. In several processes each
    adds what it has seen and :meth:`compute` sums; the numbers equal those of one process. :meth:`reset` drops the row that
    was filled last, so an evaluation can be repeated; :meth:`reset_all` drops everything. The state is in checkpoints.

    Args:
        n_tasks: number of tasks, the columns.
        learned_at: row at which each task was learned; None for row j and task j.
        n_rows: number of evaluations; as many as tasks when None.
        kwargs: of ``torchmetrics.Metric``.

    Raises:
        ValueError: for a number of tasks or rows below 1.

    Example:
        >>> metric = AccuracyMatrix(2)
        >>> metric.update(0, 0, correct=9, total=10)
        >>> metric.update_row(1, torch.tensor([6, 8]), torch.tensor([10, 10]))
        >>> metric.compute()
        tensor([[0.9000,    nan],
                [0.6000, 0.8000]], dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    correct: Tensor
    total: Tensor

    def __init__(
        self, n_tasks: int, *, learned_at: Sequence[int] | None = None, n_rows: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("n_tasks", n_tasks), ("n_rows", n_tasks if n_rows is None else n_rows)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a whole number of 1 or more, got {value!r}")
        self.n_tasks = n_tasks
        self.learned_at = None if learned_at is None else list(learned_at)
        self.undefined: str | None = None
        """Why the last :meth:`compute` gave NaN; None when it did not."""
        shape = (1 + (n_rows or n_tasks), n_tasks)  # row 0 is the one before any training
        for name in ("correct", "total"):
            self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum", persistent=True)
        self._row: int | None = None

    def update(self, row: int, task: int, correct: int | Tensor, total: int | Tensor) -> None:
        """Add counts of one batch.

        Args:
            row: the evaluation, -1 for the one before any training.
            task: whose test data the batch is from.
            correct: correct predictions.
            total: samples.

        Raises:
            IndexError: for a row or task outside the matrix.
        """
        self._check(row)
        if not 0 <= task < self.n_tasks:
            raise IndexError(f"`task` must be from 0 to {self.n_tasks - 1}, got {task!r}")
        self._row = row
        self.correct[row + 1, task] += correct
        self.total[row + 1, task] += total

    def update_row(self, row: int, correct: Tensor, total: Tensor) -> None:
        """Write the counts of a whole evaluation ``(tasks,)`` int64, below 0 for tasks that were not evaluated.

        Raises:
            IndexError: for a row outside the matrix.
            ValueError: for counts of another length, or more correct than samples.
        """
        self._check(row)
        if correct.shape != (self.n_tasks,) or total.shape != (self.n_tasks,):
            raise ValueError(f"`correct` and `total` must have shape ({self.n_tasks},), got {tuple(correct.shape)}")
        if bool((correct > total).any()):
            raise ValueError(f"`correct` must not exceed `total`, got {correct.tolist()} of {total.tolist()}")
        self._row = row
        self.correct[row + 1] = correct.clamp_min(0).to(self.correct.device)
        self.total[row + 1] = total.clamp_min(0).to(self.total.device)
        self._update_count += 1
        self._computed = None

    def _check(self, row: int) -> None:
        if not -1 <= row < len(self.total) - 1:
            raise IndexError(f"`row` must be from -1 to {len(self.total) - 2}, got {row!r}")

    @property
    def matrix(self) -> Tensor:
        """Accuracy ``(rows, tasks)`` float64, NaN where not measured, up to the last row with a measured cell."""
        total = self.total[1:]
        filled = (total > 0).any(1).nonzero()
        rows = int(filled.max()) + 1 if len(filled) else 0
        ratio = self.correct[1 : rows + 1].double() / total[:rows]
        return torch.where(total[:rows] > 0, ratio, torch.nan)

    @property
    def initial(self) -> Tensor | None:
        """Accuracy ``(tasks,)`` before any training; None when it was not measured."""
        if not bool((self.total[0] > 0).any()):
            return None
        return torch.where(self.total[0] > 0, self.correct[0].double() / self.total[0], torch.nan)

    def compute(self) -> Tensor:
        """The matrix ``(rows, tasks)`` float64, NaN where not measured."""
        return self.matrix

    def reset(self) -> None:
        """Drop the row that was filled last."""
        if self._row is not None:
            self.correct[self._row + 1] = 0
            self.total[self._row + 1] = 0
        self._computed = None

    def reset_all(self) -> None:
        """Drop everything."""
        super().reset()
        self._row = None

    def set_dtype(self, dst_type: str | torch.dtype) -> AccuracyMatrix:
        """Refused below float32: torchmetrics would cast the counts as well.

        Raises:
            ValueError: for half precision.
        """
        if dst_type in (torch.float16, torch.bfloat16):
            raise ValueError(f"`dst_type` must be float32 or float64, got {dst_type!r}; counts would be rounded")
        return self

    def plot(self, val: Tensor | None = None, ax: Any = None) -> tuple[Any, Any]:
        """Draw the matrix as a heat map; cells that were not measured stay empty.

        Args:
            val: a matrix in place of the metric's own.
            ax: matplotlib axes; new ones when None.

        Returns:
            Figure and axes.
        """
        import matplotlib.pyplot as plt

        values = (self.matrix if val is None else val).cpu()
        if ax is None:
            _, ax = plt.subplots(figsize=(1.5 + 0.5 * values.shape[1], 1.0 + 0.5 * len(values)), layout="constrained")
        image = ax.imshow(values.numpy(), vmin=0, vmax=1, cmap="cividis", aspect="auto")
        if values.numel() <= 225:
            for (i, j), v in zip(torch.cartesian_prod(*map(torch.arange, values.shape)).tolist(), values.flatten(), strict=True):
                if v == v:
                    ax.text(j, i, f"{float(v):.2f}", ha="center", va="center", color="black" if v > 0.6 else "white")
        ax.set_xlabel("task")
        ax.set_ylabel("after task")
        ax.figure.colorbar(image, ax=ax, label="accuracy")
        return ax.figure, ax


class MatrixMetric(AccuracyMatrix):
    """Base of the metrics that are one number of the accuracy matrix."""

    name: ClassVar[str] = ""

    def value(self, matrix: Tensor) -> Tensor:
        """The number for a matrix with at least one row."""
        raise RuntimeError(f"`{type(self).__name__}` has no value; use one of its subclasses")

    @property
    def key(self) -> str:
        """The metric's name with its variant, as it should stand in a table."""
        return self.name

    def compute(self) -> Tensor:
        """The number, a float64 scalar; NaN with the reason in :attr:`undefined` where it is not defined."""
        matrix = self.matrix
        if not len(matrix):
            self.undefined = "nothing was evaluated"
            return torch.tensor(torch.nan, dtype=torch.float64)
        result = self.value(matrix)
        self.undefined = self._reason(matrix) if bool(result.isnan()) else None
        return result

    def _reason(self, matrix: Tensor) -> str:
        if len(matrix) < 2:
            return "it compares tasks, and only one row was measured"
        return "a cell that it reads was not measured"
