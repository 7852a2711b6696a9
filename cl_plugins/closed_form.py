"""Classifiers that are computed from sums over features, not trained: nearest class mean and ridge regression.

    nearest mean   logit_c = cos(f, mean of the features of class c)
    ridge          h = relu(f P),  G = sum h' h,  C = sum h' onehot(y),  W = (G + lambda I)^-1 C,  logit = h W

Sums add up over tasks, so the classifier after task t equals the one computed from all tasks' data at once: nothing is
forgotten but what the feature itself loses.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_plugins.exact_buffers import ExactBuffers
from cl_plugins.heads import HIDDEN_LOGIT


class Extension(Protocol):
    """Puts further features behind the classifier's input, such as :class:`cl_plugins.features.DepthTap`."""

    width: int

    def extend(self, feature: Tensor) -> Tensor:
        """``(batch, dim)`` to ``(batch, dim + width)``."""


class ClosedFormHead(ExactBuffers):
    """Replaces a classifier's logits in eval mode by those computed from sums; a forward hook on the classifier.

    Args:
        head: the classifier; its shape gives the numbers of features and classes.
        tap: adds the class tokens of earlier blocks to the classifier's own feature; None for that feature alone.
    """

    def __init__(self, head: nn.Linear, tap: Extension | None = None) -> None:
        super().__init__()
        self.tap = tap
        self.dim = head.in_features + (0 if tap is None else tap.width)
        self.count: Tensor
        self.register_buffer("count", torch.zeros(head.out_features, dtype=torch.int64, device=head.weight.device))
        self._handle = head.register_forward_hook(self._replace)

    def extend(self, feature: Tensor) -> Tensor:
        """The classifier's input with what the tap adds, ``(batch, dim)`` float32."""
        return (feature if self.tap is None else self.tap.extend(feature)).float()

    def accumulate(self, features: Tensor, labels: Tensor) -> None:
        """Add samples: features ``(batch, dim)``, labels ``(batch,)``."""
        raise RuntimeError(f"`{type(self).__name__}` has no sums to add to; use NearestMeanHead or RidgeHead")

    def solve(self) -> None:
        """Compute the classifier from the sums."""

    def scores(self, features: Tensor) -> Tensor:
        """Logits ``(batch, classes)`` for features ``(batch, dim)``."""
        raise RuntimeError(f"`{type(self).__name__}` has no scores; use NearestMeanHead or RidgeHead")

    def remove(self) -> None:
        """Give the classifier its own logits back."""
        self._handle.remove()

    def _replace(self, head: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor | None:
        if self.training:
            return None
        scores = self.scores(self.extend(args[0]))
        return scores.masked_fill(self.count == 0, HIDDEN_LOGIT).to(logits.dtype)


class NearestMeanHead(ClosedFormHead):
    """Cosine similarity with the mean feature of each class (SimpleCIL).

    Args:
        head: the classifier that it replaces in evaluation.
        tap: adds the class tokens of earlier blocks.

    Example:
        >>> head = nn.Linear(2, 2)
        >>> mean = NearestMeanHead(head).eval()
        >>> mean.accumulate(torch.eye(2), torch.tensor([0, 1]))
        >>> head(torch.tensor([[3.0, 0.0]])).argmax().item()
        0
    """

    def __init__(self, head: nn.Linear, tap: Extension | None = None) -> None:
        super().__init__(head, tap)
        self.total: Tensor
        self.register_buffer("total", torch.zeros(head.out_features, self.dim, device=head.weight.device))

    def accumulate(self, features: Tensor, labels: Tensor) -> None:
        """Add samples: features ``(batch, dim)``, labels ``(batch,)``."""
        self.total.index_add_(0, labels, features.to(self.total.dtype))
        self.count += torch.bincount(labels, minlength=len(self.count))

    def scores(self, features: Tensor) -> Tensor:
        """Cosine similarities ``(batch, classes)``."""
        return F.normalize(features, dim=1) @ F.normalize(self.total, dim=1).T


class RidgeHead(ClosedFormHead):
    """Ridge regression to one-hot targets on randomly projected, rectified features (RanPAC).

    Args:
        head: the classifier that it replaces in evaluation.
        projection: width of the random projection; 0 uses the features as they are.
        ridge: the penalty, or None to choose it on held-out samples of each task as the paper does.
        seed: of the projection.
        tap: adds the class tokens of earlier blocks.

    Note:
        The sums take ``8 * width * (width + classes)`` bytes.
    """

    GRID = tuple(10.0**e for e in range(-8, 9))
    """Penalties that are tried when ``ridge`` is None."""

    def __init__(
        self,
        head: nn.Linear,
        projection: int = 2000,
        ridge: float | None = None,
        seed: int = 0,
        tap: Extension | None = None,
    ) -> None:
        super().__init__(head, tap)
        self.ridge = ridge
        self.chosen: float | None = ridge
        width = projection or self.dim
        device = head.weight.device
        self.gram: Tensor
        self.cross: Tensor
        self.weights: Tensor
        self.matrix: Tensor | None
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.randn(self.dim, projection, generator=generator).to(device) if projection else None
        self.register_buffer("matrix", matrix)
        self.register_buffer("gram", torch.zeros(width, width, dtype=torch.float64, device=device))
        self.register_buffer("cross", torch.zeros(width, head.out_features, dtype=torch.float64, device=device))
        self.register_buffer("weights", torch.zeros(width, head.out_features, device=device))

    def project(self, features: Tensor) -> Tensor:
        """Regressors ``(batch, width)`` of features ``(batch, dim)``."""
        return features if self.matrix is None else F.relu(features @ self.matrix.to(features.dtype))

    def _sums(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.project(features).double()
        return hidden.T @ hidden, hidden.T @ F.one_hot(labels, len(self.count)).double()

    def accumulate(self, features: Tensor, labels: Tensor) -> None:
        """Add samples: features ``(batch, dim)``, labels ``(batch,)``; chooses the penalty on a fifth of them."""
        if self.ridge is None and len(labels) >= 5:
            held = torch.arange(len(labels), device=labels.device) % 5 == 4
            gram, cross = self._sums(features[~held], labels[~held])
            held_gram, held_cross = self._sums(features[held], labels[held])
            self.chosen = self._choose(self.gram + gram, self.cross + cross, features[held], labels[held])
            gram, cross = gram + held_gram, cross + held_cross
        else:
            gram, cross = self._sums(features, labels)
        self.gram += gram
        self.cross += cross
        self.count += torch.bincount(labels, minlength=len(self.count))

    def _choose(self, gram: Tensor, cross: Tensor, features: Tensor, labels: Tensor) -> float:
        """The penalty with the least squared error on held-out samples."""
        hidden = self.project(features).double()
        target = F.one_hot(labels, len(self.count)).double()
        errors = [(hidden @ _solve(gram, cross, ridge) - target).square().mean() for ridge in self.GRID]
        return self.GRID[int(torch.stack(errors).nan_to_num(torch.inf).argmin())]

    def solve(self) -> None:
        """Compute the weights from the sums."""
        self.weights.copy_(_solve(self.gram, self.cross, 1.0 if self.chosen is None else self.chosen))

    def scores(self, features: Tensor) -> Tensor:
        """Regression outputs ``(batch, classes)``."""
        return self.project(features) @ self.weights


def _solve(gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """``(gram + ridge I)^-1 cross``; NaN where the penalty is too small for the matrix to be positive definite."""
    penalized = gram.clone()
    penalized.diagonal().add_(ridge)
    factor, info = torch.linalg.cholesky_ex(penalized)
    return torch.where(info == 0, torch.cholesky_solve(cross, factor), torch.nan)
