"""Forgetting and backward transfer: what old tasks lost, in the variants that the literature mixes up.

For tasks j learned before the last row, averaged over them unless said otherwise::

    forgetting            max over l(j) <= l < last of R[l, j]  -  R[last, j]        (Chaudhry et al., 2018)
      since="start"       the peak over all earlier rows, also before the task was learned
      clip=True           the peak may be the last row, so the term is never negative
      peak="learned"      R[l(j), j] - R[last, j], which is minus the backward transfer
      normalize="peak"    divided by the peak; tasks with peak 0 are left out
    backward_transfer     R[last, j] - R[l(j), j]                                    (Lopez-Paz and Ranzato, 2017)
      scheme="running"    over all boundaries i and tasks learned before i           (Diaz-Rodriguez et al., 2018)
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ._matrix import LearnedAt, Marked, NanPolicy, at_learning, mark, masked_max, masked_mean


def _terms(
    marked: Marked,
    since: Literal["learned", "start"],
    peak: Literal["best", "learned"],
    clip: bool,
    nan_policy: NanPolicy,
) -> tuple[Tensor, Tensor]:
    """Term and peak of each task, ``(..., tasks)``."""
    rows = marked.values.shape[-2]
    last = marked.values[..., -1, :]
    if peak == "learned":
        best = at_learning(marked)
    else:
        index = torch.arange(rows, device=last.device)[:, None]
        window = marked.seen if since == "learned" else torch.ones_like(marked.seen)
        best = masked_max(marked.values, window & (index < rows - 1), nan_policy if since == "learned" else "omit", -2)
        if since == "start":  # cells before learning need not be measured, seen ones must
            learned = masked_max(marked.values, marked.seen & (index < rows - 1), nan_policy, -2)
            best = torch.where(learned.isnan(), learned, best)
    term = best - last
    return (term.clamp_min(0.0) if clip else term), best


def forgetting(
    matrix: Tensor,
    *,
    learned_at: LearnedAt = None,
    since: Literal["learned", "start"] = "learned",
    peak: Literal["best", "learned"] = "best",
    clip: bool = False,
    normalize: Literal["peak"] | None = None,
    reduction: Literal["mean", "max", "none"] = "mean",
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """How much accuracy the old tasks lost, as peak since learned minus final accuracy unless told otherwise.

    Args:
        matrix: ``(..., rows, tasks)`` in [0, 1].
        learned_at: row at which each task was learned; None for row j and task j.
        since: where the peak is looked for: from the row of learning, or from the first row.
        peak: the best accuracy, or the one right after learning.
        clip: count gains as 0.
        normalize: "peak" divides each term by its peak.
        reduction: over the old tasks; "none" gives ``(..., tasks)`` with NaN for tasks that are not old.
        nan_policy: for a missing cell that counts: "propagate", "omit" or "raise".

    Returns:
        ``(...)`` float64 in [-1, 1], lower is better; NaN with a single task.

    Raises:
        ValueError: for faulty arguments.

    Example:
        >>> matrix = torch.tensor([[0.9, 0.0, 0.0], [0.7, 0.8, 0.0], [0.8, 0.6, 0.9]])
        >>> forgetting(matrix), forgetting(matrix, reduction="max")
        (tensor(0.1500, dtype=torch.float64), tensor(0.2000, dtype=torch.float64))
    """
    for name, value, allowed in (
        ("since", since, ("learned", "start")),
        ("peak", peak, ("best", "learned")),
        ("normalize", normalize, (None, "peak")),
        ("reduction", reduction, ("mean", "max", "none")),
    ):
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(map(str, allowed))}, got {value!r}")
    marked = mark(matrix, learned_at)
    terms, best = _terms(marked, since, peak, clip, nan_policy)
    old = marked.old[-1].expand_as(terms)
    if normalize == "peak":
        old = old & (best != 0)
        terms = terms / best
    if reduction == "none":
        return torch.where(old, terms, torch.nan)
    if reduction == "max":
        masked_mean(terms, old, nan_policy)  # refuses what the policy refuses
        return masked_max(terms[..., None, :], old[..., None, :], nan_policy, -1)[..., 0]
    return masked_mean(terms, old, nan_policy)


def backward_transfer(
    matrix: Tensor,
    *,
    learned_at: LearnedAt = None,
    scheme: Literal["final", "running"] = "final",
    nan_policy: NanPolicy = "propagate",
) -> Tensor:
    """What learning later tasks gave to old ones: accuracy now minus accuracy right after learning.

    Args:
        matrix: ``(..., rows, tasks)`` in [0, 1].
        learned_at: row at which each task was learned; None for row j and task j.
        scheme: "final" compares the last row, "running" averages over all rows at which a task was learned.
        nan_policy: for a missing cell that counts: "propagate", "omit" or "raise".

    Returns:
        ``(...)`` float64 in [-1, 1], higher is better; NaN with a single task.

    Example:
        >>> backward_transfer(torch.tensor([[0.9, 0.0], [0.6, 0.8]]))
        tensor(-0.3000, dtype=torch.float64)
    """
    if scheme not in ("final", "running"):
        raise ValueError(f"`scheme` must be final or running, got {scheme!r}")
    marked = mark(matrix, learned_at)
    change = marked.values - at_learning(marked)[..., None, :]
    if scheme == "final":
        return masked_mean(change[..., -1, :], marked.old[-1], nan_policy)
    return masked_mean(change, marked.old & marked.boundary[:, None], nan_policy, dim=(-2, -1))


def positive_backward_transfer(
    matrix: Tensor, *, learned_at: LearnedAt = None, nan_policy: NanPolicy = "propagate"
) -> Tensor:
    """The running backward transfer where it is a gain, else 0 (BWT+ of Diaz-Rodriguez et al., 2018)."""
    value = backward_transfer(matrix, learned_at=learned_at, scheme="running", nan_policy=nan_policy)
    return value.clamp_min(0.0)


def remembering(matrix: Tensor, *, learned_at: LearnedAt = None, nan_policy: NanPolicy = "propagate") -> Tensor:
    """1 minus the running backward transfer where it is a loss (REM of Diaz-Rodriguez et al., 2018)."""
    value = backward_transfer(matrix, learned_at=learned_at, scheme="running", nan_policy=nan_policy)
    return 1 - value.clamp_max(0.0).abs()
