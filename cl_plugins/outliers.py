"""Virtual outliers around a task's features, and the energy loss that pushes them away (VOR).

"OVOR: OnePrompt with Virtual Outlier Regularization for Rehearsal-Free Class-Incremental Learning", Wei-Cheng Huang,
Chun-Fu (Richard) Chen and Hsiang Hsu, ICLR 2024, arXiv 2402.04129. The outliers follow "Non-Parametric Outlier
Synthesis", Leitian Tao, Xuefeng Du, Xiaojin Zhu and Yixuan Li, ICLR 2023, arXiv 2303.02966.

Formulas, for features ``f`` of one task with ``C`` classes, ``x = f / |f|``, draws ``z ~ N(0, I)``::

    s(q)  = squared distance of q to its K-th nearest x                    K = neighbors
    mode "boundary":  candidates b + noise_scale * z around the n_boundary features b of largest s(x_b)
    mode "reference": candidates noise_scale * z, each n_boundary times (the authors' code, which never adds b)
    both keep the per_class * C candidates of largest s
    E(l)  = -logsumexp(l) over the task's C logits
    VOR   = id_weight * mean rho(relu(E_id - id_threshold)) + ood_weight * mean rho(relu(ood_threshold - E_outlier))
    rho(h) = h^2 / 2 for h < 1, else h - 1/2 (huber); h^2 otherwise

Everything is a pure function of its tensors; noise comes in as an argument. A repeated outlier is one row and a count.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cl_plugins.neighbors import boundary_samples, full_precision, kth_neighbor_distance, kth_smallest, normalize_rows

Mode = Literal["reference", "boundary"]
_MODES: tuple[Mode, ...] = ("reference", "boundary")


class OutlierSet(NamedTuple):
    """Virtual outliers, from the least dense place on.

    Args:
        rows: distinct outliers ``(rows, dim)``.
        counts: how often each row stands in the set ``(rows,)``, int64.
        scores: squared distance of each row to its K-th nearest normalized feature ``(rows,)``.
        candidate: the draw that made the row; in boundary mode ``boundary position * draws + draw`` ``(rows,)``.
    """

    rows: Tensor
    counts: Tensor
    scores: Tensor
    candidate: Tensor


class VORTerms(NamedTuple):
    """The regularizer and what it acted on, all device scalars.

    Args:
        loss: the weighted sum of both terms.
        id_energy: mean energy of the samples.
        ood_energy: mean energy of the outliers.
        id_active: share of samples whose hinge is above 0.
        ood_active: share of outliers whose hinge is above 0.
    """

    loss: Tensor
    id_energy: Tensor
    ood_energy: Tensor
    id_active: Tensor
    ood_active: Tensor


def ovor_learning_rate(epoch: int, total: int, base: float) -> float:
    """Learning rate of an epoch in CODA-Prompt and OVOR: ``base * cos(99 pi max(epoch - 1, 0) / (200 (total - 1)))``.

    Epochs 0 and 1 both use ``base``, as in the published code.

    Args:
        epoch: epoch within the task, from 0; head epochs continue the count.
        total: epochs of the task, head epochs included.
        base: learning rate at the start.

    Raises:
        ValueError: if ``epoch`` is not in ``[0, total)``.

    Example:
        >>> [round(ovor_learning_rate(e, total=5, base=1.0), 3) for e in range(5)]
        [1.0, 1.0, 0.925, 0.713, 0.394]
    """
    if not 0 <= epoch < total:
        raise ValueError(f"`epoch` must be in [0, {total}), got {epoch!r}; `total` counts all epochs of a task")
    return base * math.cos(99 * math.pi * max(epoch - 1, 0) / (200 * max(total - 1, 1)))


def _clamped(neighbors: int, available: int) -> int:
    if neighbors <= available:
        return neighbors
    warnings.warn(
        f"`neighbors` is {neighbors} but the task has {available} samples;"
        " the distance to the farthest sample is used instead",
        stacklevel=3,
    )
    return available


def _reference(unit: Tensor, candidates: Tensor, n_out: int, neighbors: int, repeats: int) -> OutlierSet:
    distinct = -(-n_out // repeats)
    scores, index = kth_neighbor_distance(candidates, unit, neighbors).topk(distinct)
    counts = torch.full((distinct,), repeats)
    counts[-1] = n_out - repeats * (distinct - 1)
    return OutlierSet(candidates[index], counts.to(unit.device), scores, index)


def _boundary(
    features: Tensor, unit: Tensor, noise: Tensor, n_out: int, neighbors: int, n_boundary: int, normalize: bool
) -> OutlierSet:
    # |b + z - x|^2 = |b + z|^2 + |x|^2 - 2 (b.x + z.x): two small products instead of one over all candidates
    edge = features[boundary_samples(features, neighbors, n_boundary)]  # (n_boundary, dim)
    norms = edge.square().sum(1)[:, None] + noise.square().sum(1) + 2 * edge @ noise.T  # (n_boundary, draws)
    scale = norms.clamp_min(1e-24).rsqrt() if normalize else torch.ones_like(norms)
    from_edge, from_noise, points = edge @ unit.T, noise @ unit.T, unit.square().sum(1)
    scores, work = torch.empty_like(norms), torch.empty_like(from_noise)
    for row, ahead, factor in zip(scores, from_edge, -2 * scale, strict=True):
        torch.add(from_noise, ahead, out=work).mul_(factor[:, None]).add_(points)  # (draws, samples)
        row.copy_(kth_smallest(work, neighbors))
    scores += norms * scale.square()
    values, index = scores.flatten().topk(n_out)
    rows = edge[index // len(noise)] + noise[index % len(noise)]
    return OutlierSet(rows, torch.ones_like(index), values.clamp_min(0), index)


def synthesize_outliers(
    features: Tensor,
    noise: Tensor,
    n_out: int,
    *,
    neighbors: int = 50,
    n_boundary: int = 50,
    noise_scale: float = 0.1,
    mode: Mode = "reference",
    normalize_candidates: bool = True,
) -> OutlierSet:
    """Virtual outliers for the features of one task.

    ``mode="reference"`` is what the published code does: noise around the origin, every kept draw ``n_boundary`` times;
    scoring each draw once gives the same set. ``mode="boundary"`` is what the paper describes: noise around boundary
    features.

    Args:
        features: ``(samples, dim)``; any float dtype, computed in float32 at least.
        noise: standard normal draws ``(draws, dim)``, shared by all boundary features.
        n_out: outliers to keep, repeats counted; fewer when there are not as many candidates.
        neighbors: rank K of the neighbor that measures density; clamped, with a warning, to the number of samples.
        n_boundary: boundary features in boundary mode, repeats of a draw in reference mode.
        noise_scale: standard deviation of the noise.
        mode: ``"reference"`` or ``"boundary"``.
        normalize_candidates: in boundary mode, measure the distance of the candidate's direction (NPOS) rather than of
            the candidate itself, whose norm would decide nearly alone.

    Returns:
        The outliers; empty when there are no samples.

    Raises:
        ValueError: for an unknown mode, tensors that are not two matrices of one width, or ``n_out`` below 1.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> f, z = torch.randn(200, 16, generator=g), torch.randn(600, 16, generator=g)
        >>> out = synthesize_outliers(f, z, n_out=160)
        >>> out.rows.shape, out.counts.tolist()
        (torch.Size([4, 16]), [50, 50, 50, 10])
    """
    if mode not in _MODES:
        raise ValueError(f"`mode` must be one of {_MODES}, got {mode!r}")
    if features.ndim != 2 or noise.ndim != 2 or features.shape[1] != noise.shape[1]:
        raise ValueError(
            "`features` and `noise` must be matrices of one width,"
            f" got shapes {tuple(features.shape)} and {tuple(noise.shape)}"
        )
    if n_out < 1:
        raise ValueError(f"`n_out` must be 1 or more, got {n_out!r}")
    with torch.autocast(features.device.type, enabled=False), torch.no_grad():
        features = full_precision(features)
        noise = noise.to(features) * noise_scale
        if not len(features) or not len(noise):
            empty = features.new_empty(0)
            return OutlierSet(noise[:0], empty.long(), empty, empty.long())
        neighbors = _clamped(neighbors, len(features))
        n_boundary = min(n_boundary, len(features))
        n_out = min(n_out, n_boundary * len(noise))
        unit = normalize_rows(features)
        if mode == "reference":
            return _reference(unit, noise, n_out, neighbors, n_boundary)
        return _boundary(features, unit, noise, n_out, neighbors, n_boundary, normalize_candidates)


def energy(logits: Tensor) -> Tensor:
    """Free energy ``-logsumexp`` of each row ``(rows, classes)``, in float32 at least; low for rows a head knows."""
    return -full_precision(logits).logsumexp(dim=1)


def _hinge_term(hinge: Tensor, counts: Tensor | None, huber: bool) -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.ones_like(hinge) if counts is None else counts.to(hinge)
    weights = weights / weights.sum().clamp_min(1e-12)  # an empty set stays an empty sum, which is 0
    rho = torch.where(hinge < 1, hinge.square() / 2, hinge - 0.5) if huber else hinge.square()
    return (weights * rho).sum(), (weights * (hinge > 0)).sum(), weights


def vor_loss(
    id_logits: Tensor,
    ood_logits: Tensor,
    *,
    id_threshold: float = -15.0,
    ood_threshold: float = -3.0,
    id_weight: float = 0.1,
    ood_weight: float = 0.1,
    huber: bool = True,
    id_counts: Tensor | None = None,
    ood_counts: Tensor | None = None,
) -> VORTerms:
    """Virtual outlier regularizer: samples get an energy below one threshold, outliers one above another.

    Args:
        id_logits: logits of samples over the current task's classes ``(samples, classes)``.
        ood_logits: logits of outliers over the same classes ``(outliers, classes)``; with no row its term is 0.
        id_threshold: energy that samples should stay below.
        ood_threshold: energy that outliers should stay above.
        id_weight: weight of the samples' term (published: one weight 0.1 for both).
        ood_weight: weight of the outliers' term.
        huber: quadratic below a hinge of 1 and linear above, as in the published default; else squared.
        id_counts: multiplicity of each sample ``(samples,)``.
        ood_counts: multiplicity of each outlier ``(outliers,)``.

    Returns:
        The loss, mean energies and shares of active hinges.

    Example:
        >>> terms = vor_loss(torch.full((2, 4), 20.0), torch.zeros(3, 4))
        >>> terms.loss.item(), terms.id_active.item(), terms.ood_active.item()
        (0.0, 0.0, 0.0)
    """
    with torch.autocast(id_logits.device.type, enabled=False):
        id_energy, ood_energy = energy(id_logits), energy(ood_logits)
        id_term, id_active, id_share = _hinge_term((id_energy - id_threshold).relu(), id_counts, huber)
        ood_term, ood_active, ood_share = _hinge_term((ood_threshold - ood_energy).relu(), ood_counts, huber)
        return VORTerms(
            id_weight * id_term + ood_weight * ood_term,
            (id_share * id_energy.detach()).sum(),
            (ood_share * ood_energy.detach()).sum(),
            id_active,
            ood_active,
        )


@dataclass(frozen=True)
class VirtualOutliers:
    """Every setting of virtual outlier regularization, with its published default.

    Acts through :meth:`synthesize` and :meth:`loss`; any method whose model splits into ``feature(x)`` and ``head(f)``
    can use it, :func:`cl_plugins.head_phase.tune_head` drives both. Published: the released configuration of the
    authors, one for all data sets. Its outliers have small norms, so with few classes per task their hinge may never
    act: the share ``ood_active`` shows it, a larger ``noise_scale`` or a larger ``ood_threshold`` changes it.

    Args:
        neighbors: rank K of the neighbor that measures density (50).
        n_boundary: boundary samples; in reference mode the repeats of a draw (50).
        draws: Gaussian draws (600).
        noise_scale: standard deviation of the draws (0.1 in the released configuration, called ``cov`` there).
        per_class: outliers to keep per class of the task (40).
        batch_size: features in a batch of the head phase (128).
        id_threshold: energy that samples should stay below (-15).
        ood_threshold: energy that outliers should stay above (-3).
        id_weight: weight of the samples' term (0.1).
        ood_weight: weight of the outliers' term (0.1; the published code has one weight for both).
        huber: Huber hinges (True), else squared ones.
        mode: ``"reference"`` as in the published code, ``"boundary"`` as in the paper.
        normalize_candidates: in boundary mode, compare directions (True, as in NPOS).

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> vor = VirtualOutliers(noise_scale=1.0, mode="boundary")
        >>> features = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> vor.synthesize(features, 2, torch.Generator().manual_seed(1)).rows.shape
        torch.Size([80, 8])
    """

    neighbors: int = 50
    n_boundary: int = 50
    draws: int = 600
    noise_scale: float = 0.1
    per_class: int = 40
    batch_size: int = 128
    id_threshold: float = -15.0
    ood_threshold: float = -3.0
    id_weight: float = 0.1
    ood_weight: float = 0.1
    huber: bool = True
    mode: Mode = "reference"
    normalize_candidates: bool = True

    def __post_init__(self) -> None:
        for name in ("neighbors", "n_boundary", "draws", "per_class", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of 1 or more, got {value!r}")
        for name in ("noise_scale", "id_weight", "ood_weight"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"`{name}` must be a finite number of 0 or more, got {value!r}")
        for name in ("id_threshold", "ood_threshold"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"`{name}` must be a finite energy, got {getattr(self, name)!r}")
        if self.mode not in _MODES:
            raise ValueError(f"`mode` must be one of {_MODES}, got {self.mode!r}")

    def noise(self, dim: int, generator: torch.Generator) -> Tensor:
        """Standard normal draws ``(draws, dim)`` from ``generator``, on its device."""
        return torch.randn(self.draws, dim, generator=generator, device=generator.device)

    def synthesize(self, features: Tensor, n_classes: int, noise: Tensor | torch.Generator) -> OutlierSet:
        """Outliers for the features ``(samples, dim)`` of a task with ``n_classes`` classes, empty ones included.

        Args:
            features: any device and float dtype.
            n_classes: number of classes of the task.
            noise: a generator, or standard normal draws ``(draws, dim)``.
        """
        if isinstance(noise, torch.Generator):
            noise = self.noise(features.shape[1], noise)
        return synthesize_outliers(
            features,
            noise,
            self.per_class * n_classes,
            neighbors=self.neighbors,
            n_boundary=self.n_boundary,
            noise_scale=self.noise_scale,
            mode=self.mode,
            normalize_candidates=self.normalize_candidates,
        )

    def loss(self, id_logits: Tensor, ood_logits: Tensor, ood_counts: Tensor | None = None) -> VORTerms:
        """The regularizer of :func:`vor_loss` with these settings; logits limited to the task's classes."""
        return vor_loss(
            id_logits,
            ood_logits,
            id_threshold=self.id_threshold,
            ood_threshold=self.ood_threshold,
            id_weight=self.id_weight,
            ood_weight=self.ood_weight,
            huber=self.huber,
            ood_counts=ood_counts,
        )
