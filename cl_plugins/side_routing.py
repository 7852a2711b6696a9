"""Which task does a sample belong to? Answered from the feature of a frozen backbone, by class means.

With one side network per task and no task given in the evaluation, something must choose. The backbone never changes,
so sums over its features, added task by task, give the same answer as if all data had been there at once.

Formula, for class means ``mu_c`` and the within-class covariance ``S`` of all classes so far, shrunk to its diagonal
mean::

    score(c) = -1/2 (x - mu_c)' S^-1 (x - mu_c)      "mahalanobis";      cos(x, mu_c) / 0.05      "cosine"
    p(t | x) = sum over the classes of t of softmax(score)
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from cl_plugins._text import did_you_mean
from cl_plugins.exact_buffers import ExactBuffers

Metric = Literal["mahalanobis", "cosine"]


class TaskRouter(ExactBuffers):
    """Sums over frozen features, and the probability of each task that follows from them.

    Args:
        n_classes: rows of the classifier.
        dim: width of the feature.
        metric: distance to the class means.
        shrinkage: share of the covariance that is replaced by its mean variance.

    Raises:
        ValueError: for an unknown metric or a shrinkage outside 0 to 1.

    Example:
        >>> router = TaskRouter(2, 2, shrinkage=1.0)
        >>> router.accumulate(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
        >>> router.log_probabilities(torch.tensor([[1.0, 0.0]]), torch.tensor([0, 1]), 2).argmax().item()
        0
    """

    def __init__(self, n_classes: int, dim: int, metric: Metric = "mahalanobis", shrinkage: float = 0.1) -> None:
        super().__init__()
        if metric not in get_args(Metric):
            known = get_args(Metric)
            raise ValueError(f"`metric` must be one of {', '.join(known)}, got {metric!r}{did_you_mean(metric, known)}")
        if not 0.0 <= shrinkage <= 1.0:
            raise ValueError(f"`shrinkage` must be from 0 to 1, got {shrinkage!r}")
        self.metric, self.shrinkage = metric, shrinkage
        self.count: Tensor
        self.total: Tensor
        self.moment: Tensor
        self.factor: Tensor
        self.register_buffer("count", torch.zeros(n_classes, dtype=torch.int64))
        self.register_buffer("total", torch.zeros(n_classes, dim, dtype=torch.float64))
        self.register_buffer("moment", torch.zeros(dim, dim, dtype=torch.float64))
        self.register_buffer("factor", torch.eye(dim))

    @torch.no_grad()
    def accumulate(self, features: Tensor, labels: Tensor) -> None:
        """Add samples: ``(samples, dim)`` and their classes ``(samples,)``."""
        rows = features.to(self.total.dtype)
        self.total.index_add_(0, labels, rows)
        self.moment += rows.T @ rows
        self.count += torch.bincount(labels, minlength=len(self.count))
        seen = self.count > 0
        means = self.total[seen] / self.count[seen, None]
        within = (self.moment - (means * self.count[seen, None]).T @ means) / self.count.sum()
        variance = within.diagonal().mean().clamp_min(1e-12)
        within = (1 - self.shrinkage) * within
        within.diagonal().add_(self.shrinkage * variance + 1e-6 * variance)
        factor = torch.linalg.cholesky(within)
        identity = torch.eye(len(within), dtype=within.dtype, device=within.device)
        self.factor.copy_(torch.linalg.solve_triangular(factor, identity, upper=False))  # whitens: F S F' = I

    def knows(self, classes: Tensor) -> bool:
        """Whether samples of some of the chosen classes were added, ``(classes,)`` bool."""
        return bool((self.count[classes] > 0).any())

    def class_scores(self, features: Tensor) -> Tensor:
        """``(batch, classes)``; minus infinity for classes without samples."""
        features = features.to(self.factor.dtype)
        means = (self.total / self.count.clamp_min(1)[:, None]).to(features.dtype)
        with torch.autocast(features.device.type, enabled=False):  # squares of differences need every digit
            if self.metric == "cosine":
                scores = F.normalize(features, dim=1) @ F.normalize(means, dim=1).T / 0.05
            else:
                scores = -0.5 * torch.cdist(features @ self.factor.T, means @ self.factor.T).square()
        return scores.masked_fill(self.count == 0, -torch.inf)

    def log_probabilities(self, features: Tensor, owner: Tensor, n_tasks: int) -> Tensor:
        """Log-probability of each task ``(batch, n_tasks)``.

        Args:
            features: of the frozen backbone ``(batch, dim)``.
            owner: task of each class ``(classes,)``, -1 for none.
            n_tasks: number of tasks.

        Raises:
            RuntimeError: before any sample was added.
        """
        if not bool((self.count > 0).any()):
            raise RuntimeError(
                "the router must be fitted after each task before it can choose one; train with fit_stream, or call"
                " `fit_router(module, loader)` by hand"
            )
        log_p = self.class_scores(features).log_softmax(1)
        columns = [torch.logsumexp(log_p[:, owner == t], 1) for t in range(n_tasks)]
        return torch.stack(columns, 1)
