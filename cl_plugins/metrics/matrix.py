"""The accuracy matrix itself as a metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ._state import MatrixState


class AccuracyMatrix(MatrixState):
    """Accuracy of every task at every evaluation, as integer counts of right predictions and samples.

    ``compute`` returns ``(rows, tasks)`` float64 in [0, 1] with NaN where nothing was measured. Counts are summed over
    processes, so each process writes the counts of its own samples; where every process already holds the total, pass
    ``sync_on_compute=False``.

    WHEN: ``update`` adds the counts of a batch or of an evaluation to a cell, ``update_row`` writes a finished row.
    ``reset`` drops only the row being filled, ``reset_all`` everything. Part of ``state_dict``.

    Args:
        n_tasks: columns, or None to grow with the columns that are written.
        **kwargs: ``learned_at``, ``nan_policy``, ``validate_args`` and arguments of ``torchmetrics.Metric``.

    Example:
        >>> matrix = AccuracyMatrix(2)
        >>> matrix.update(row=0, column=0, correct=9, total=10)
        >>> matrix.update_row(1, correct=[7, 8], total=[10, 10])
        >>> matrix.compute()
        tensor([[0.9000,    nan],
                [0.7000, 0.8000]], dtype=torch.float64)
    """

    higher_is_better: bool | None = True

    def compute(self) -> Tensor:
        """Accuracy ``(rows, tasks)`` float64, up to the last row written."""
        return self.matrix

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        inner = super()._wrap_compute(compute)

        def keep_shape(*args: Any, **kwargs: Any) -> Tensor:
            value: Tensor = inner(*args, **kwargs)
            return value.reshape(1, 1) if value.ndim == 0 else value  # the base class squeezes a single cell

        return keep_shape

    def plot(self, val: Tensor | None = None, ax: Any = None, names: Sequence[str] | None = None) -> Any:
        """Draw the matrix as a heat map with the value in each cell; cells that were not measured stay empty.

        Args:
            val: a matrix to draw, in place of the current one.
            ax: matplotlib axes to draw into.
            names: a label per column.

        Returns:
            ``(figure, axes)``.
        """
        import matplotlib.pyplot as plt

        cells = (self.compute() if val is None else val).detach().cpu()
        rows, columns = cells.shape
        if ax is None:
            _, ax = plt.subplots(figsize=(1.5 + 0.7 * min(columns, 40), 1.2 + 0.6 * min(rows, 40)))
        ax.imshow(cells.numpy(), vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
        ax.set_xlabel("task")
        ax.set_ylabel("after row")
        ax.set_xticks(range(columns), labels=names if names is not None else [str(j) for j in range(columns)])
        ax.set_yticks(range(rows))
        if rows * columns <= 400:
            for i, j in (~cells.isnan()).nonzero().tolist():
                color = "white" if cells[i, j] < 0.6 else "black"
                ax.text(j, i, f"{float(cells[i, j]):.2f}", ha="center", va="center", color=color, fontsize=8)
        return ax.figure, ax
