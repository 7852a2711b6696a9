"""A vision-language model that classifies images by the texts of their classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import pytorch_lightning as pl
from torch import Tensor, nn

from cl_plugins._lightning import datamodule_of
from cl_plugins.clip_glyph import create_clip_glyph
from cl_plugins.recipes import Recipe
from cl_plugins.vision_language import TextClassifier
from cl_plugins.workloads.optimizers import configure_optimizers

if TYPE_CHECKING:
    from cl_plugins.task import Task

_BUNDLED = ("vit_glyph", "clip_glyph")
"""Recipes that name the bundled backbone mean the bundled model for images and texts here."""


class VisionLanguageClassifier(pl.LightningModule):
    """Trains the two-part contrastive loss on the texts of the task at hand; gives logits over all texts.

    Args:
        model: with ``encode_image``, ``encode_text`` and ``logit_scale``, such as those of open_clip.
        tokenize: texts to token tensors.
        class_texts: the full text of every label.
        recipe: optimizer, learning rate and schedule.
    """

    def __init__(
        self, model: nn.Module, tokenize: Callable[[list[str]], Tensor], class_texts: tuple[str, ...], recipe: Recipe
    ) -> None:
        super().__init__()
        self.net = TextClassifier(model, tokenize, class_texts, template="{}")
        self.recipe = recipe
        model.requires_grad_(True)
        # the scale of the logits stays as pretrained in every method, as published
        cast("nn.Parameter", model.logit_scale).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, labels)`` of the texts of all domains."""
        logits: Tensor = self.net(x)
        return logits

    def on_fit_start(self) -> None:
        """Tell the classifier which classes it is trained on; adapters do so themselves, plain fine-tuning does not."""
        stream = datamodule_of(self.trainer)
        task: Task = stream.tasks[stream.task]
        self.net.start_task(task)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The two-part loss."""
        images, labels = batch
        return self.net.loss(images, labels)

    def configure_optimizers(self) -> Any:
        """The recipe's optimizer and schedule."""
        return configure_optimizers(self, self.recipe)


def build_vision_language(recipe: Recipe, stream: Any) -> VisionLanguageClassifier:
    """The module that a recipe trains on a stream of images and texts.

    Args:
        recipe: its ``backbone`` is ``"clip_glyph"``, or an open_clip model as ``"name"`` or ``"name/weights"``, such as
            ``"ViT-B-16-quickgelu/openai"``, which open_clip downloads. A stream without transforms gets the model's.
        stream: has ``class_texts``.
    """
    if recipe.backbone in _BUNDLED:
        model, tokenize = create_clip_glyph(recipe.pretrained)
        return VisionLanguageClassifier(model, tokenize, stream.class_texts, recipe)
    import open_clip

    name, _, weights = recipe.backbone.partition("/")
    if recipe.pretrained and not weights:
        raise ValueError(
            f"`backbone` must name its weights, such as 'ViT-B-16-quickgelu/openai', got {recipe.backbone!r};"
            " open_clip.list_pretrained() lists them, and pretrained=false starts from random ones"
        )
    model, training, evaluation = open_clip.create_model_and_transforms(
        name, pretrained=weights if recipe.pretrained else None
    )
    if stream.train_transform is None and stream.eval_transform is None:
        stream.train_transform, stream.eval_transform = training, evaluation
    return VisionLanguageClassifier(model, open_clip.get_tokenizer(name), stream.class_texts, recipe)
