"""What a benchmark trains on a stream: one module for each kind of data.

A stream says what its samples are by ``modality``: "image" where it says nothing.
"""

from __future__ import annotations

import importlib
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
    _check_callbacks(recipe, stream.name, modality)
    if modality == "image-text":
        from cl_plugins.workloads.vision_language import build_vision_language

        return build_vision_language(recipe, stream)
    if modality == "image":
        return ImageClassifier(create_backbone(recipe.backbone, stream.n_classes, recipe.pretrained), recipe)
    raise ValueError(
        f"`scenario` must be a stream of images for cl-bench, got {stream.name!r}, a stream of {modality}s;"
        " train a causal language model on it with fit_stream"
    )


def _check_callbacks(recipe: Recipe, stream: str, modality: str) -> None:
    """Refuse a method that cannot work on such a stream, before anything is written."""
    callbacks = importlib.import_module("cl_plugins.callbacks")
    for entry in recipe.callbacks:
        fits: tuple[str, ...] = getattr(callbacks, entry["class"]).modalities
        if modality not in fits:
            why = "classifies by texts and has no" if modality == "image-text" else "has no"
            raise ValueError(
                f"`method` must be one that works on {stream!r}, a stream of {modality} data, got {recipe.method!r}:"
                f" {entry['class']} works on {' and '.join(fits)} data, because it acts on the linear classifier behind"
                f" an image backbone, and the model here {why} such classifier"
            )
