"""A classifier of images with several labels each."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from cl_plugins.workloads.image import ImageClassifier


def shown_label_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, averaged over the labels that are not hidden.

    Args:
        logits: ``(batch, classes)``.
        targets: ``(batch, classes)``, 1 present, 0 absent, -1 hidden.

    Example:
        >>> import torch
        >>> round(shown_label_loss(torch.tensor([[0.0, 9.0]]), torch.tensor([[1.0, -1.0]])).item(), 4)
        0.6931
    """
    shown = targets >= 0
    return binary_cross_entropy_with_logits(logits[shown], targets[shown])


class MultiLabelClassifier(ImageClassifier):
    """Logits per class; the loss is taken where a label is shown, so a task teaches its own classes alone.

    Args:
        model: gives logits ``(batch, classes)`` for images ``(batch, channels, height, width)``.
        recipe: optimizer, learning rate and schedule.
    """

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Binary cross-entropy of the shown labels."""
        x, targets = batch
        return shown_label_loss(self(x), targets)
