"""The notation that every function of an accuracy matrix shares.

``R[i, j]`` is the accuracy on task j at evaluation i, in [0, 1]; NaN is a cell that was not measured. ``l(j)`` is the
row at which task j was learned, ``seen(i) = {j: l(j) <= i}``, ``old(i) = {j: l(j) < i}``. A boundary is a row at which
some task was learned. An evaluation before any training (zero-shot) is no row of the matrix but ``initial``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

NanPolicy: TypeAlias = Literal["propagate", "omit", "raise"]
LearnedAt: TypeAlias = Sequence[int | None] | Tensor | None
Average: TypeAlias = Literal["macro", "micro"]

_ROUNDING = 1e-6


def check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Raise a ValueError that lists the choices when ``value`` is none of them."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}")


def as_double(values: Any) -> Tensor:
    """``values`` as float64 where they are; Apple GPUs have no float64, so values from there move to the CPU."""
    if isinstance(values, Tensor) and values.device.type == "mps":
        values = values.cpu()
    return torch.as_tensor(values, dtype=torch.float64)


def nan_like(values: Tensor) -> Tensor:
    """NaN for each member of the batch: ``values`` without its last two dimensions."""
    return values.new_full(values.shape[:-2], torch.nan)


@dataclass(frozen=True)
class Table:
    """A checked accuracy matrix and what follows from when its tasks were learned.

    Attributes:
        cells: accuracy ``(..., rows, tasks)`` float64, NaN where not measured.
        learned: row of learning ``(tasks,)`` int64; the number of rows for tasks that were not reached.
        initial: accuracy before training ``(..., tasks)``, or None.
        weights: test samples ``(..., rows, tasks)``, or None.
        policy: what a cell that is read and not measured does.
        boundaries: the rows at which a task was learned, ascending ``(boundaries,)`` int64.
    """

    cells: Tensor
    learned: Tensor
    initial: Tensor | None
    weights: Tensor | None
    policy: NanPolicy
    boundaries: Tensor

    @property
    def rows(self) -> int:
        """Number of evaluations."""
        return self.cells.shape[-2]

    @property
    def last(self) -> int:
        """Index of the last evaluation."""
        return self.rows - 1

    @property
    def seen(self) -> Tensor:
        """Tasks learned by the last row ``(tasks,)`` bool."""
        return self.learned <= self.last

    @property
    def old(self) -> Tensor:
        """Tasks learned before the last row ``(tasks,)`` bool."""
        return self.learned < self.last

    @property
    def final(self) -> Tensor:
        """The last row ``(..., tasks)``."""
        return self.cells[..., -1, :]

    @property
    def row_index(self) -> Tensor:
        """Column of row numbers ``(rows, 1)``."""
        return torch.arange(self.rows, device=self.cells.device)[:, None]

    @property
    def at_boundary(self) -> Tensor:
        """Which rows are boundaries ``(rows, 1)`` bool."""
        return torch.isin(self.row_index, self.boundaries)

    def at(self, rows: Tensor) -> Tensor:
        """Cell ``[rows[j], j]`` of each column j ``(..., tasks)``; NaN for a row outside the matrix."""
        if self.rows == 0:
            return self.cells.new_full((*self.cells.shape[:-2], len(rows)), torch.nan)
        inside = (rows >= 0) & (rows < self.rows)
        picked = self.cells[..., torch.where(inside, rows, 0), torch.arange(len(rows), device=rows.device)]
        return torch.where(inside, picked, torch.nan)

    @property
    def diagonal(self) -> Tensor:
        """Accuracy right after learning ``(..., tasks)``; NaN for tasks that were not reached."""
        return self.at(self.learned)

    @property
    def previous(self) -> Tensor:
        """The boundary before a task was learned ``(tasks,)``; -1 for the first task and for tasks not reached."""
        earlier = self.boundaries[None, :] < self.learned[:, None]  # (tasks, boundaries)
        index = earlier.sum(-1) - 1
        found = self.boundaries[index.clamp(min=0)] if len(self.boundaries) else torch.zeros_like(index)
        return torch.where((index >= 0) & self.seen, found, -1)

    def mean(self, values: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean over the last dimension where ``mask`` holds, by the NaN policy; NaN over nothing."""
        return masked_mean(values, mask, self.policy, weights)

    def mean_cells(self, values: Tensor, mask: Tensor) -> Tensor:
        """Mean over rows and columns of ``(..., rows, tasks)`` where ``mask`` ``(rows, tasks)`` holds."""
        self.check(values, mask)
        return masked_mean(values.flatten(-2), mask.flatten(), self.policy)

    def reference(self, name: str, values: Any) -> Tensor | None:
        """A value per task ``(..., tasks)`` that is no part of the matrix, or None."""
        return _row(name, values, self.cells)

    def check(self, values: Tensor, mask: Tensor) -> None:
        """Under ``nan_policy="raise"``, raise for the first cell that is read and missing."""
        check_missing(values, mask, self.policy, ("row", "column"))


def check_missing(values: Tensor, mask: Tensor, policy: NanPolicy, names: Sequence[str] = ("column",)) -> None:
    """Under ``nan_policy="raise"``, raise for the first entry that is read and missing.

    Raises:
        ValueError: naming the entry by the last ``len(names)`` dimensions.
    """
    if policy != "raise":
        return
    missing = (values.isnan() & mask).nonzero()
    if len(missing):
        index = missing[0, -len(names) :].tolist()
        where = ", ".join(f"{name} {i}" for name, i in zip(names, index, strict=True))
        raise ValueError(
            f"`matrix` must hold every cell that is read, got NaN in {where}; measure it, or pass nan_policy='omit'"
        )


def masked_mean(values: Tensor, mask: Tensor, policy: NanPolicy, weights: Tensor | None = None) -> Tensor:
    """Weighted mean over the last dimension of the entries in ``mask``; NaN when there is none."""
    check_missing(values, mask, policy)
    if policy == "omit":
        mask = mask & ~values.isnan()
    share = mask.to(values.dtype) if weights is None else torch.where(mask, weights, 0.0)
    share = share.expand((share + values).shape)
    weight = share.sum(-1)
    total = torch.where(mask, values, 0.0).mul(share).sum(-1)
    return torch.where(weight > 0, total / weight, torch.nan)


def masked_extreme(values: Tensor, mask: Tensor, policy: NanPolicy, largest: bool) -> Tensor:
    """Largest or smallest entry of the last dimension in ``mask``; NaN when there is none."""
    check_missing(values, mask, policy)
    sign = 1.0 if largest else -1.0
    missing = values.isnan() & mask
    usable = mask & ~values.isnan()
    signed = torch.where(usable, sign * values, -torch.inf)
    found = sign * signed.amax(-1) if values.shape[-1] else values.new_full(values.shape[:-1], torch.nan)
    undefined = ~usable.any(-1) if policy == "omit" else ~usable.any(-1) | missing.any(-1)
    return torch.where(undefined, torch.nan, found)


def _row(name: str, values: Any, cells: Tensor) -> Tensor | None:
    if values is None:
        return None
    row = as_double(values).to(cells.device)
    if row.ndim < 1 or row.shape[-1] != cells.shape[-1]:
        raise ValueError(f"`{name}` must have one value per column ({cells.shape[-1]}), got shape {tuple(row.shape)}")
    return row


def _learned(learned_at: LearnedAt, rows: int, tasks: int, device: torch.device) -> Tensor:
    if learned_at is None:
        return torch.arange(tasks, device=device).clamp(max=rows)
    steps = learned_at.tolist() if isinstance(learned_at, Tensor) else list(learned_at)
    if len(steps) != tasks:
        raise ValueError(f"`learned_at` must have one row per column ({tasks}), got {learned_at!r}")
    never = [step is None or step < 0 or step >= rows for step in steps]
    return torch.tensor(
        [rows if n else int(s) for s, n in zip(steps, never, strict=True)], dtype=torch.int64, device=device
    )


def read_matrix(
    matrix: Tensor,
    learned_at: LearnedAt = None,
    initial: Tensor | None = None,
    nan_policy: NanPolicy = "propagate",
    n_test: Tensor | None = None,
) -> Table:
    """Check the arguments that all functions share and work out ``l(j)`` and the boundaries.

    A row without any measured cell at which nothing was learned is no evaluation and is left out.

    Args:
        matrix: accuracy ``(..., rows, tasks)`` in [0, 1], NaN where not measured.
        learned_at: row at which each column was learned, None or -1 for never; None for column j at row j.
        initial: accuracy before any training ``(..., tasks)``.
        nan_policy: what a cell that is read and missing does: ``"propagate"``, ``"omit"`` or ``"raise"``.
        n_test: test samples ``(tasks,)`` or ``(..., rows, tasks)``, for means over samples.

    Raises:
        ValueError: for a wrong shape, percent instead of fractions, or an unknown policy.
    """
    check_choice("nan_policy", nan_policy, ("propagate", "omit", "raise"))
    cells = as_double(matrix)
    if cells.ndim < 2:
        raise ValueError(f"`matrix` must have the shape (..., rows, tasks), got {tuple(cells.shape)}")
    if bool(((cells < -_ROUNDING) | (cells > 1 + _ROUNDING)).any()):
        worst = float(cells.nan_to_num(0.0).flatten()[cells.nan_to_num(0.0).abs().argmax()])
        raise ValueError(f"`matrix` must hold fractions in [0, 1], got {worst:g}; divide percent by 100")
    rows, tasks = cells.shape[-2:]
    learned = _learned(learned_at, rows, tasks, cells.device)
    weights = None
    if n_test is not None:
        weights = as_double(n_test).to(cells.device)
        if weights.shape[-1:] != (tasks,) or (weights.ndim > 1 and weights.shape[-2] != rows):
            raise ValueError(
                f"`n_test` must have the shape ({tasks},) or (..., {rows}, {tasks}), got {tuple(weights.shape)}"
            )
        weights = weights[None, :].expand(rows, tasks) if weights.ndim == 1 else weights
    measured = (~cells.isnan()).any(-1).unsqueeze(0).flatten(0, -2).any(0)
    keep = measured | torch.isin(torch.arange(rows, device=cells.device), learned)
    if not bool(keep.all()):
        cells = cells[..., keep, :]
        weights = None if weights is None else weights[..., keep, :]
        kept_before = torch.cat([keep.new_zeros(1, dtype=torch.int64), keep.cumsum(0)])
        learned = kept_before[learned]
    reached = set(learned.tolist()) - {cells.shape[-2]}
    boundaries = torch.tensor(sorted(reached), dtype=torch.int64, device=cells.device)
    return Table(cells, learned, _row("initial", initial, cells), weights, nan_policy, boundaries)
