"""Multi-label measures as the class-incremental literature computes them.

CF1 is the harmonic mean of *mean* precision and *mean* recall, not the mean of the classes' F1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._matrix import as_double
from .accuracy import harmonic_mean


def multilabel_counts(scores: Tensor, labels: Tensor, *, threshold: float = 0.5, k: int | None = None) -> Tensor:
    """True positives, predicted positives and positives of each class.

    Args:
        scores: score of each class ``(samples, classes)``.
        labels: 1 where the class is present ``(samples, classes)``.
        threshold: a class with a score of at least this is predicted.
        k: predict the k classes with the highest scores instead.

    Returns:
        ``(3, classes)`` int64.

    Example:
        >>> multilabel_counts(torch.tensor([[0.9, 0.2], [0.6, 0.7]]), torch.tensor([[1, 1], [0, 1]]))
        tensor([[1, 1],
                [2, 1],
                [1, 2]])
    """
    if scores.shape != labels.shape or scores.ndim != 2:
        shapes = f"{tuple(scores.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"`scores` and `labels` must both have the shape (samples, classes), got {shapes}")
    present = labels.bool()
    if k is None:
        chosen = scores >= threshold
    else:
        chosen = torch.zeros_like(present).scatter(1, scores.topk(min(k, scores.shape[1]), dim=1).indices, True)
    return torch.stack([(chosen & present).sum(0), chosen.sum(0), present.sum(0)])


def multilabel_cf1(counts: Tensor) -> Tensor:
    """Harmonic mean of mean precision (CP) and mean recall (CR) over classes, in [0, 1], higher is better.

    Args:
        counts: true positives, predicted positives and positives ``(3, classes)``. A class that is never predicted has
            precision 0; one that never occurs is left out.

    Example:
        >>> multilabel_cf1(torch.tensor([[1, 1], [2, 1], [1, 2]]))
        tensor(0.7500, dtype=torch.float64)
    """
    right, predicted, present = as_double(counts)
    occurs = present > 0
    precision = (right / predicted.clamp(min=1))[occurs].mean()
    return harmonic_mean(precision, (right / present.clamp(min=1))[occurs].mean())


def multilabel_of1(counts: Tensor) -> Tensor:
    """F1 of the counts pooled over classes, in [0, 1], higher is better. Arguments as for :func:`multilabel_cf1`.

    Example:
        >>> multilabel_of1(torch.tensor([[1, 1], [2, 1], [1, 2]]))
        tensor(0.6667, dtype=torch.float64)
    """
    right, predicted, present = as_double(counts).sum(-1)
    return harmonic_mean(right / predicted.clamp(min=1), right / present) if bool(present > 0) else right * torch.nan


def average_precision(scores: Tensor, labels: Tensor) -> Tensor:
    """Average precision of each class ``(classes,)``; NaN for a class without a positive.

    Args:
        scores: score of each class ``(samples, classes)``; samples with equal scores enter together.
        labels: 1 where the class is present ``(samples, classes)``.

    Example:
        >>> average_precision(torch.tensor([[0.9], [0.8], [0.7]]), torch.tensor([[1], [0], [1]]))
        tensor([0.8333], dtype=torch.float64)
    """
    ranked, order = as_double(scores).sort(dim=0, descending=True)
    hits = labels.gather(0, order).to(ranked.dtype)
    found = hits.cumsum(0)
    count = torch.arange(1, len(hits) + 1, device=hits.device, dtype=hits.dtype)[:, None]
    last_of_tie = torch.ones_like(ranked, dtype=torch.bool)
    last_of_tie[:-1] = ranked[1:] != ranked[:-1]
    index = torch.where(last_of_tie, count.long() - 1, len(hits)).flip(0).cummin(0).values.flip(0)
    precision = (found / count).gather(0, index)
    total = found[-1]
    return torch.where(total > 0, (precision * hits).sum(0) / total, torch.nan)


def seen_label_map(scores: Tensor, labels: Tensor, seen_classes: list[int] | None = None) -> Tensor:
    """Mean average precision over the seen classes that occur, in [0, 1], higher is better.

    Args:
        scores: score of each class ``(samples, classes)``.
        labels: 1 where the class is present ``(samples, classes)``.
        seen_classes: classes taught so far, None for all.

    Example:
        >>> seen_label_map(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]]), torch.tensor([[1, 0], [0, 0], [1, 0]]))
        tensor(0.8333, dtype=torch.float64)
    """
    classes = slice(None) if seen_classes is None else seen_classes
    return average_precision(scores[:, classes], labels[:, classes]).nanmean()
