"""How features and confidences change: effective rank, linear CKA, calibration.

* ``effective_rank``: Garrido et al. 2023, RankMe, arXiv:2210.02885: ``exp(-sum p log p)``, ``p = s/sum(s) + 1e-7``.
* ``linear_cka``: Kornblith et al. 2019, arXiv:1905.00414: ``||X'Y||^2 / (||X'X|| ||Y'Y||)`` with centered columns. It
  must see the whole probe set: the mean over mini-batches is another number.
* ``expected_calibration_error``: Guo et al. 2017, arXiv:1706.04599.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ._matrix import as_double, check_choice


def effective_rank(features: Tensor) -> Tensor:
    """Effective rank of the features of a fixed probe set, not centered.

    Compare only values with equal numbers of samples, dimensions and the same layer.

    Args:
        features: ``(..., samples, dim)``.

    Returns:
        ``(...)`` float64, from 1 to ``min(samples, dim)``; NaN for features that are all 0.

    Example:
        >>> effective_rank(torch.eye(3))
        tensor(3.0000, dtype=torch.float64)
    """
    return spectrum_rank(torch.linalg.svdvals(as_double(features)))


def spectrum_rank(singular_values: Tensor) -> Tensor:
    """Effective rank from singular values ``(..., min(samples, dim))``."""
    total = singular_values.sum(-1, keepdim=True)
    share = singular_values / total + 1e-7
    return torch.where(total[..., 0] > 0, (-(share * share.log()).sum(-1)).exp(), torch.nan)


def linear_cka(first: Tensor, second: Tensor) -> Tensor:
    """Similarity of two sets of features of the same samples, in [0, 1].

    Args:
        first: ``(samples, dim)``.
        second: ``(samples, other_dim)``.

    Returns:
        Scalar float64; NaN when either set of features is constant.

    Example:
        >>> features = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]])
        >>> linear_cka(features, 5 * features)
        tensor(1.0000, dtype=torch.float64)
    """
    if len(first) != len(second):
        raise ValueError(f"`second` must have one row per row of `first` ({len(first)}), got {len(second)}")
    x, y = as_double(first), as_double(second)
    x, y = x - x.mean(0), y - y.mean(0)
    return cka_from_products(x.T @ y, x.T @ x, y.T @ y)


def cka_from_products(cross: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Linear CKA from the products ``X'Y``, ``X'X`` and ``Y'Y`` of centered features."""
    scale = first.norm() * second.norm()
    return torch.where(scale > 0, cross.square().sum() / scale, torch.nan)


def calibration_bins(
    confidence: Tensor, correct: Tensor, bins: int = 15, closed: Literal["left", "right"] = "left"
) -> Tensor:
    """Number of samples, sum of confidences and number of right predictions of each bin ``(3, bins)`` float64.

    Args:
        confidence: confidence in the prediction ``(samples,)`` in [0, 1].
        correct: 1 where the prediction is right ``(samples,)``.
        bins: number of equal bins.
        closed: the edge that belongs to a bin. torchmetrics closes it on the ``"left"``, Guo et al. on the ``"right"``.

    Example:
        >>> calibration_bins(torch.tensor([0.25, 0.5, 1.0]), torch.tensor([0, 1, 1]), bins=2)
        tensor([[1.0000, 2.0000],
                [0.2500, 1.5000],
                [0.0000, 2.0000]], dtype=torch.float64)
    """
    check_choice("closed", closed, ("left", "right"))
    if bins < 1:
        raise ValueError(f"`bins` must be at least 1, got {bins!r}")
    sure, right = as_double(confidence).flatten(), as_double(correct).flatten()
    if sure.shape != right.shape:
        raise ValueError(f"`correct` must have one entry per confidence ({len(sure)}), got {len(right)}")
    scaled = (sure * bins).round(decimals=9)  # 0.57 * 100 is below 57
    index = scaled.floor() if closed == "left" else scaled.ceil() - 1
    index = index.long().clamp(0, bins - 1)
    return torch.stack([sure.new_zeros(bins).index_add(0, index, v) for v in (torch.ones_like(sure), sure, right)])


def calibration_error(counts: Tensor) -> Tensor:
    """Expected calibration error from :func:`calibration_bins` ``(..., 3, bins)``; NaN without a sample."""
    samples, confidence, right = counts.unbind(-2)
    return (right - confidence).abs().sum(-1) / samples.sum(-1)


def expected_calibration_error(
    confidence: Tensor, correct: Tensor, bins: int = 15, closed: Literal["left", "right"] = "left"
) -> Tensor:
    """Mean gap between confidence and accuracy over bins, weighted by samples (ECE), in [0, 1], lower is better.

    Arguments as for :func:`calibration_bins`.

    Example:
        >>> expected_calibration_error(torch.tensor([0.9, 0.8, 0.6]), torch.tensor([1, 0, 1]), bins=2)
        tensor(0.1000, dtype=torch.float64)
    """
    return calibration_error(calibration_bins(confidence, correct, bins, closed))
