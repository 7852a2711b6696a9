"""Optimizers and schedules by a recipe."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from cl_plugins.outliers import ovor_learning_rate
from cl_plugins.recipes import Recipe


def configure_optimizers(module: pl.LightningModule, recipe: Recipe) -> Any:
    """The recipe's optimizer and schedule over all parameters; frozen ones have no gradient and stay.

    Args:
        module: attached to a Trainer, whose ``max_epochs`` counts per task.
        recipe: optimizer, learning rate, weight decay and schedule.
    """
    classes = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    options: dict[str, Any] = {"lr": recipe.lr, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "sgd":
        options["momentum"] = 0.9
    else:
        options["betas"] = recipe.betas
    optimizer = classes[recipe.optimizer](module.parameters(), **options)
    epochs = module.trainer.max_epochs or 1
    if recipe.schedule == "cosine" and recipe.steps is not None:
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
        return [optimizer], [{"scheduler": cosine, "interval": "step"}]
    if recipe.schedule == "cosine":
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)]
    if recipe.schedule == "ovor" and epochs > 1:
        factor = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda e: ovor_learning_rate(e, epochs, 1.0))
        return [optimizer], [factor]
    return optimizer
