"""A classifier of images, as any user would write it."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cl_plugins.recipes import Recipe
from cl_plugins.workloads.optimizers import configure_optimizers


def check_image_size(model: nn.Module, stream: Any) -> None:
    """Refuse images of another size than the backbone takes, before training.

    Args:
        model: of timm; others are not checked.
        stream: of images; its first test image is read.

    Raises:
        ValueError: saying both sizes and how to change that of the images.
    """
    embed: Any = getattr(model, "patch_embed", None)
    if not getattr(embed, "strict_img_size", False) or getattr(stream, "unreadable", "stop") == "skip":
        return
    wanted = tuple(int(n) for n in embed.img_size)
    image = stream.test_loader(0).dataset[0][0]
    got = tuple(int(n) for n in image.shape[-2:])
    if got != wanted:
        raise ValueError(
            f"`size` of the images must be that of the backbone, {wanted[0]} x {wanted[1]}, got {got[0]} x {got[1]} of"
            f" {stream.name!r}; give --data size={wanted[0]} to cl-bench, or size={wanted[0]} to build_scenario, or"
            " choose another backbone"
        )


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
