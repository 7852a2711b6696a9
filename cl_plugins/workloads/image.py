"""A classifier of images, as any user would write it."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cl_plugins.recipes import Recipe
from cl_plugins.workloads.optimizers import configure_optimizers


class ImageClassifier(pl.LightningModule):
    """A plain classifier, as any user would write it; it knows nothing of tasks.

    Args:
        model: gives logits ``(batch, classes)`` for images ``(batch, channels, height, width)``.
        recipe: optimizer, learning rate and schedule.
    """

    def __init__(self, model: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.model(x)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self) -> Any:
        """The recipe's optimizer and schedule."""
        return configure_optimizers(self, self.recipe)
