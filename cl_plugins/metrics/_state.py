"""The state that all metrics of an accuracy matrix share: integer counts, one cell per evaluation and task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import Self

from cl_plugins.functional import accuracy_matrix
from cl_plugins.functional._matrix import LearnedAt, NanPolicy, check_choice

Counts: TypeAlias = int | Sequence[int] | Tensor
_FIRST_ROWS = 8
_NARROW = ("half", "float16", "bfloat16", "float8")


def _counts(name: str, values: Counts, device: torch.device) -> Tensor:
    tensor = torch.as_tensor(values, device=device).reshape(-1)
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"`{name}` must be integer counts, got {tensor.dtype}; pass the number of samples, not a share")
    return tensor.long()


class RestoredMetric(Metric):
    """Loads tensor states as copies on its own device, and counts as updated then."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        names = [name for name in self._defaults if prefix + name in state_dict]
        devices = {name: getattr(self, name).device for name in names}
        super()._load_from_state_dict(state_dict, prefix, *args)
        for name in names:
            setattr(self, name, getattr(self, name).to(devices[name], copy=True))
        if names:
            self._update_count = max(1, self._update_count)  # else ``compute`` warns that nothing was updated
            self._computed = None


class MatrixState(RestoredMetric):
    """Counts per evaluation and task, and how they are written, synchronized and restored.

    The state is ``correct`` and ``total`` ``(rows + 1, tasks)`` int64, summed over processes, the initial row first.
    Rows grow by doubling, and so do columns when ``n_tasks`` is None. It is part of ``state_dict``.

    WHEN: ``update`` adds counts to cells, per batch or per evaluation. ``compute`` must run on every process. ``reset``
    drops only the row being filled, since Lightning resets a logged metric every epoch: log values, not the metric.

    Args:
        n_tasks: columns, or None to grow with the columns that are written.
        learned_at: row at which each column was learned, None for never; None for column j at row j.
        nan_policy: what a cell that is read and was not measured does: ``"propagate"``, ``"omit"`` or ``"raise"``.
        validate_args: check that counts fit each other; False saves a device synchronization per update.
        **kwargs: arguments of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Raises:
        ValueError: for an unknown policy, or fewer than one task.
    """

    is_differentiable: bool | None = False
    full_state_update: bool | None = False

    correct: Tensor
    total: Tensor
    open_row: Tensor

    def __init__(
        self,
        n_tasks: int | None = None,
        *,
        learned_at: LearnedAt = None,
        nan_policy: NanPolicy = "propagate",
        validate_args: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if n_tasks is not None and n_tasks < 1:
            raise ValueError(f"`n_tasks` must be at least 1, or None to grow, got {n_tasks!r}")
        if n_tasks is not None and learned_at is not None and len(learned_at) != n_tasks:
            raise ValueError(f"`learned_at` must have one row per task ({n_tasks}), got {learned_at!r}")
        check_choice("nan_policy", nan_policy, ("propagate", "omit", "raise"))
        self.n_tasks = n_tasks
        self.learned_at = learned_at
        self.nan_policy: NanPolicy = nan_policy
        self.validate_args = validate_args
        shape = (1 + (n_tasks or _FIRST_ROWS), n_tasks or _FIRST_ROWS)
        self.add_state("correct", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum", persistent=True)
        self.add_state("total", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum", persistent=True)
        self.add_state("open_row", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max", persistent=True)

    # Writing

    def update(self, row: int, column: Counts, correct: Counts, total: Counts) -> None:
        """Add counts to cells of a row.

        Args:
            row: index of the evaluation, -1 for the one before any training.
            column: task, or several; ``range(n_tasks)`` writes a whole row.
            correct: right predictions, one per column.
            total: samples, one per column; -1 where nothing was measured.

        Raises:
            ValueError: for an index outside the matrix, or counts that do not fit each other.
            TypeError: for counts that are not integers.
        """
        self._add(row, column, correct, total)
        self.open_row.fill_(row + 2)  # row of the state, plus one: 0 is none

    def update_row(self, row: int, correct: Counts, total: Counts) -> None:
        """Write a finished row over whatever it held; ``reset`` keeps it. Arguments as for :meth:`update`.

        Metrics of a collection share their state through ``collection.update``; there, write rows with
        ``collection.update(row, range(n_tasks), correct, total)``.
        """
        width = _counts("correct", correct, self.correct.device).numel()
        self._grow(row, width - 1)
        self.correct[row + 1].zero_()
        self.total[row + 1].zero_()
        self._add(row, range(width), correct, total)
        self.open_row.zero_()
        self._computed = None
        self._update_count += 1

    def update_rows(self, correct: Tensor, total: Tensor) -> None:
        """Write all rows at once, in place of what was there.

        Args:
            correct: correct predictions ``(rows, tasks)`` int64.
            total: samples, likewise; 0 where not measured.

        Raises:
            ValueError: for counts outside 0 to their totals, or of another shape.
        """
        if correct.shape != total.shape or correct.ndim != 2:
            raise ValueError(f"`correct` and `total` must be one matrix each, got {correct.shape} and {total.shape}")
        if bool(((correct > total) | (correct < 0)).any()):
            raise ValueError("`correct` must lie between 0 and `total` in every cell")
        rows, columns = correct.shape
        if rows and columns:
            self._grow(rows - 1, columns - 1)
        for name, table in (("correct", correct), ("total", total)):
            state: Tensor = getattr(self, name)
            state.zero_()
            state[1 : rows + 1, :columns] = table.to(state)
        self.open_row.zero_()
        self._computed = None
        self._update_count += 1

    def finish_row(self) -> None:
        """Declare the row being filled complete, so that ``reset`` keeps it."""
        self.open_row.zero_()

    def _add(self, row: int, column: Counts, correct: Counts, total: Counts) -> None:
        device = self.correct.device
        columns = _counts("column", column, device)
        right, samples = _counts("correct", correct, device), _counts("total", total, device)
        if not len(columns) == len(right) == len(samples):
            sizes = f"{len(columns)}, {len(right)} and {len(samples)}"
            raise ValueError(f"`column`, `correct` and `total` must have one entry per task, got {sizes} entries")
        if not len(columns):
            return
        measured = samples >= 0
        if self.validate_args and bool(((right > samples) | (right < 0))[measured].any()):
            raise ValueError(f"`correct` must lie between 0 and `total`, got {right.tolist()} of {samples.tolist()}")
        if self.validate_args and bool((columns < 0).any()):
            raise ValueError(f"`column` must be at least 0, got {columns.tolist()}")
        self._grow(row, int(columns.max()))
        self.correct[row + 1].index_add_(0, columns, torch.where(measured, right, 0))
        self.total[row + 1].index_add_(0, columns, torch.where(measured, samples, 0))

    def _grow(self, row: int, column: int) -> None:
        if row < -1:
            raise ValueError(f"`row` must be at least -1 (the evaluation before training), got {row!r}")
        if self.n_tasks is not None and column >= self.n_tasks:
            raise ValueError(f"`column` must be below `n_tasks` ({self.n_tasks}), got {column!r}")
        rows, columns = self.correct.shape
        while rows < row + 2:
            rows = 2 * rows - 1
        while columns < column + 1:
            columns = 2 * columns
        self._pad(rows, columns)

    def _pad(self, rows: int, columns: int) -> None:
        if (rows, columns) != tuple(self.correct.shape):
            for name in ("correct", "total"):
                old: Tensor = getattr(self, name)
                new = old.new_zeros(rows, columns)
                new[: old.shape[0], : old.shape[1]] = old
                setattr(self, name, new)

    # Reading

    def _size(self) -> tuple[int, int]:
        """Rows and columns in use; the initial row is not counted."""
        used = self.total > 0
        rows, columns = used.any(1)[1:].nonzero(), used.any(0).nonzero()
        width = self.n_tasks or (int(columns[-1]) + 1 if len(columns) else 0)
        return int(rows[-1]) + 1 if len(rows) else 0, width

    @property
    def matrix(self) -> Tensor:
        """Accuracy ``(rows, tasks)`` float64 of this process, NaN where not measured, up to the last row written."""
        rows, columns = self._size()
        return accuracy_matrix(self.correct, self.total)[1 : rows + 1, :columns]

    @property
    def initial(self) -> Tensor | None:
        """Accuracy before any training ``(tasks,)``, None when it was not measured."""
        columns = self._size()[1]
        row = accuracy_matrix(self.correct[0, :columns], self.total[0, :columns])
        return None if bool(row.isnan().all()) else row

    @property
    def n_test(self) -> Tensor:
        """Test samples ``(rows, tasks)`` int64, 0 where not measured."""
        rows, columns = self._size()
        return self.total[1 : rows + 1, :columns]

    def _learned(self, columns: int) -> list[int | None]:
        if self.learned_at is None:
            return list(range(columns))
        steps = self.learned_at.tolist() if isinstance(self.learned_at, Tensor) else list(self.learned_at)
        return (steps + [None] * columns)[:columns]

    def common(self) -> dict[str, Any]:
        """The arguments that every function of an accuracy matrix takes."""
        learned = self._learned(self._size()[1])
        return {"learned_at": learned, "initial": self.initial, "nan_policy": self.nan_policy}

    # The parts of torchmetrics that assume a state of fixed shape which an epoch starts anew

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add the counts and return the value so far (not of this batch alone, which is no matrix)."""
        self.correct, self.total, self.open_row = self.correct.clone(), self.total.clone(), self.open_row.clone()
        self.update(*args, **kwargs)
        return self.compute()

    def reset(self) -> None:
        """Drop the row being filled; rows that were finished, or followed by another row, stay."""
        row = int(self.open_row) - 1
        if row >= 0:
            self.correct[row].zero_()
            self.total[row].zero_()
        self.finish_row()
        self._computed = None
        self._forward_cache = None

    def reset_all(self) -> None:
        """Drop every row, as ``reset`` of other metrics does."""
        super().reset()

    def set_dtype(self, dst_type: str | torch.dtype) -> Self:
        """Leave the counts as they are, and refuse types that could not hold the result.

        Raises:
            ValueError: for a floating type below float32.
        """
        if any(name in str(dst_type) for name in _NARROW):
            raise ValueError(f"`dst_type` must be float32 or float64, got {dst_type!r}: counts need whole numbers")
        return self

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        shape = torch.tensor(self.correct.shape, device=self.correct.device)
        shapes = torch.stack(dist_sync_fn(shape, group=process_group or self.process_group))
        rows, columns = shapes.amax(0).tolist()
        self._pad(rows, columns)
        super()._sync_dist(dist_sync_fn, process_group)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        shapes = [self.correct.shape, incoming_state["correct"].shape]
        rows, columns = (max(sizes) for sizes in zip(*shapes, strict=True))
        self._pad(rows, columns)
        padded = {
            name: nn.functional.pad(incoming_state[name], (0, columns - shapes[1][1], 0, rows - shapes[1][0]))
            for name in ("correct", "total")
        }
        super()._reduce_states({**incoming_state, **padded})
