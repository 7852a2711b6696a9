"""What a benchmark trains on a stream: one module for each kind of data.

A stream says what its samples are by ``modality``: "image" where it says nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cl_plugins.backbones import create_backbone
from cl_plugins.recipes import Recipe
from cl_plugins.workloads.image import ImageClassifier, check_image_size
from cl_plugins.workloads.multi_label import MultiLabelClassifier

if TYPE_CHECKING:
    import pytorch_lightning as pl

__all__ = ["ImageClassifier", "MultiLabelClassifier", "build_module", "unfit"]


def build_module(recipe: Recipe, stream: Any) -> pl.LightningModule:
    """The module that a recipe trains on a stream.

    Raises:
        ValueError: for a stream whose samples no module here takes, or that the method cannot work on, and for images
            of another size than the backbone takes.
    """
    modality = getattr(stream, "modality", "image")
    reason = unfit(recipe, modality)
    if reason is not None:
        raise ValueError(
            f"`method` must work on {modality} data, which {stream.name!r} is made of, got {recipe.method!r}: {reason}"
        )
    if modality == "image-text":
        from cl_plugins.workloads.vision_language import build_vision_language

        return build_vision_language(recipe, stream)
    if modality in ("image", "multi-label"):
        backbone = create_backbone(recipe.backbone, stream.n_classes, recipe.pretrained)
        check_image_size(backbone, stream)
        return (ImageClassifier if modality == "image" else MultiLabelClassifier)(backbone, recipe)
    if modality == "text":
        from cl_plugins.workloads.language import build_language

        return build_language(recipe, stream)
    raise ValueError(
        f"`modality` of a stream must be image, multi-label, image-text or text, got {modality!r} of {stream.name!r}"
    )


_REASONS = {
    "image": "it needs the texts of the classes",
    "multi-label": "it needs one label per sample",
    "text": "it acts on a classifier, and the model here generates text",
    "image-text": "it acts on a linear classifier behind an image backbone, and the model here classifies by texts",
}


def unfit(recipe: Recipe, modality: str) -> str | None:
    """Why a recipe cannot work on streams of a modality; None when it can."""
    callbacks = importlib.import_module("cl_plugins.callbacks")
    for name in (entry["class"] for entry in recipe.callbacks):
        fits: tuple[str, ...] = getattr(callbacks, name).modalities
        if modality not in fits:
            told = "image" if modality == "multi-label" and "image" not in fits else modality
            return f"{name} works on {' and '.join(fits)} data alone, because {_REASONS[told]}"
    return None
