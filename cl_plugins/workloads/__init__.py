"""What a benchmark trains on a stream: one module for each kind of data.

A stream says what its samples are by ``modality``: "image" where it says nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cl_plugins.backbones import create_backbone
from cl_plugins.recipes import Recipe
from cl_plugins.workloads.image import ImageClassifier

if TYPE_CHECKING:
    import pytorch_lightning as pl

__all__ = ["ImageClassifier", "build_module"]


def build_module(recipe: Recipe, stream: Any) -> pl.LightningModule:
    """The module that a recipe trains on a stream.

    Raises:
        ValueError: for a stream whose samples no module here takes.
    """
    modality = getattr(stream, "modality", "image")
    if modality == "image":
        return ImageClassifier(create_backbone(recipe.backbone, stream.n_classes, recipe.pretrained), recipe)
    raise ValueError(
        f"`scenario` must be a stream of images for cl-bench, got {stream.name!r}, a stream of {modality}s;"
        " train a causal language model on it with fit_stream"
    )
