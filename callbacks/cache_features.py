"""A cache in front of a frozen backbone: each sample passes through it once, not once an epoch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from cl_plugins.backbones import find_backbone
from cl_plugins.cached_stream import CachedStream
from cl_plugins.evaluation import split_batch
from cl_plugins.feature_cache import FeatureCache
from cl_plugins.heads import find_head
from cl_plugins.plugin import ContinualCallback, Row, plugins_of
from cl_plugins.taps import backbone_taps

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from cl_plugins.result import StreamResult
    from cl_plugins.task import Stream, Task

_METHODS = ("train_dataloader", "test_loader", "train_loader_for_features")


class CacheFeatures(ContinualCallback):
    """Computes a frozen backbone's feature, and the taps that side networks read, once per sample and view.

    Beside any method that freezes everything in front of the classifier: ``[LadderSideTuning(), CacheFeatures()]``,
    ``[FrozenBackbone(), CacheFeatures()]``, ``[NearestMean(), CacheFeatures()]``. Epochs after the first, and
    evaluations of earlier tasks, never run the backbone.

    ``[OVOR(), CacheFeatures()]``: a task's first epochs train a prompt inside the backbone and read images, its head
    epochs read the features of the finished prompt, with the augmentation of one epoch, or of ``views``.

    WHEN: replaces the stream's loaders at the start of the stream by ones that give row ids, and fills a split when it
    is first asked for; sets the loaders back at the end. The module must hand its input to the backbone as it is. What
    stands between backbone and classifier is part of the feature: dropout there is off.

    With several processes the first one fills a ``folder`` while the others wait; without a folder each keeps a cache
    of its own with all samples. The process group's timeout must be above the time of filling.

    Args:
        folder: keeps entries for later runs; None keeps them for this one. Beside :class:`OVOR` nothing is written
            there: its features are those of one task and run.
        byte_budget: bytes held in memory; entries beyond it are memory-mapped.
        dtype: of stored values: "float16" or "bfloat16" halve the size, None stores what was computed.
        views: augmentation seeds per training sample; epoch ``e`` sees view ``e mod views``.
        keep_training_data: keep a finished task's training entry, for methods that rehearse it.
        progress: show a bar while a split is filled.
        backbone: dotted name of the transformer, for modules with several.
        head: dotted name of the classifier, for modules where it cannot be told.

    Raises:
        ValueError: for faulty numbers, or when ``folder`` holds entries of other weights or another transform.
        RuntimeError: when something in front of the classifier still trains, or the module changes or mixes its inputs.

    Example:
        >>> CacheFeatures(byte_budget=1 << 30, dtype="float16").cache.dtype
        torch.float16
    """

    training: ClassVar[Literal["required", "none", "neutral"]] = "neutral"
    modalities: ClassVar[tuple[str, ...]] = ("image",)

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        byte_budget: int = 2 << 30,
        dtype: Literal["float32", "float16", "bfloat16"] | None = None,
        views: int = 1,
        keep_training_data: bool = False,
        progress: bool = True,
        backbone: str | None = None,
        head: str | None = None,
    ) -> None:
        super().__init__()
        if dtype not in (None, "float32", "float16", "bfloat16"):
            raise ValueError(f"`dtype` must be 'float32', 'float16', 'bfloat16' or None, got {dtype!r}")
        if views < 1:
            raise ValueError(f"`views` must be 1 or more, got {views!r}")
        stored: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
        self.cache = FeatureCache(folder, byte_budget=byte_budget, dtype=stored, progress=progress)
        self.views, self.keep_training_data = views, keep_training_data
        self.backbone, self.head = backbone, head
        self._source: CachedStream | None = None
        self._phased: ContinualCallback | None = None
        self._whole = True
        self._convert: Callable[[], object] | None = None
        self._begun = False

    def conflict(self, other: ContinualCallback, module: nn.Module) -> str | None:
        """Methods that train something in front of the classifier, and a second cache."""
        if isinstance(other, CacheFeatures):
            return "one cache holds all features"
        if other.feature == "adapted" and other.in_head_phase is None:
            return f"features change while {type(other).__name__} trains weights inside the backbone"
        return None

    def _find(self, module: nn.Module) -> tuple[Any, nn.Linear]:
        found = find_backbone(module, self.backbone, text=True)
        return found, find_head(module, found, self.head)[1]

    def install(self, module: nn.Module) -> None:
        """Tap the backbone."""
        backbone_taps(module, *self._find(module))

    def open(self, module: nn.Module, stream: Stream, **options: Any) -> CachedStream:
        """The stream's loaders over the cache; for hand-written loops.

        Args:
            module: its backbone and everything else in front of the classifier must be frozen.
            stream: gives the images.
            **options: of :class:`cl_plugins.cached_stream.CachedStream`.
        """
        return CachedStream(module, *self._find(module), stream, self.cache, views=self.views, **options)

    def on_stream_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stream: Stream) -> None:
        """Put the cache in front of the stream's loaders."""
        self._restore()
        self._phased = next((p for p in plugins_of(trainer) if p.in_head_phase is not None), None)
        cache = self.cache
        if self._phased is not None:
            cache = FeatureCache(byte_budget=cache.byte_budget, dtype=cache.dtype, progress=cache.progress)
        context = trainer.precision_plugin.forward_context
        self._source = CachedStream(pl_module, *self._find(pl_module), stream, cache, views=self.views, context=context)
        self._begun = False
        self._convert = partial(trainer.precision_plugin.convert_module, pl_module)
        self._whole = not getattr(trainer, "overfit_batches", 0)  # Lightning rebuilds the loader there
        for name in _METHODS:
            setattr(stream, name, partial(self._loader, name))

    def _loader(self, name: str, *args: Any) -> Any:
        """A loader of the cached stream; the stream's own before the first task, when nothing is frozen yet.

        Beside a method with a head phase the training data are all that is read twice before the features change.
        """
        assert self._source is not None
        phased = self._phased
        if phased is not None and name == "train_dataloader" and self._whole:
            return self._source.phased_train_dataloader(lambda: bool(phased.in_head_phase))
        if phased is not None:
            return self._source.images(name, *args)
        if name != "test_loader" and not self._begun:
            self._begun = True
            assert self._convert is not None
            self._convert()  # as `fit` will, so that what a plugin reads before it has the same digest
        return getattr(self._source, name)(*args) if self._begun else self._source.images(name, *args)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn when there is no stream whose loaders could be replaced."""
        super().on_fit_start(trainer, pl_module)
        if self._source is None:
            warnings.warn(
                "CacheFeatures does nothing in a `trainer.fit` of one's own, whose loaders it cannot replace;"
                " train with fit_stream(trainer, module, stream)",
                stacklevel=2,
            )

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Answer from the cache from now on."""
        super().on_task_start(trainer, pl_module, task)
        self._begun = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look at the first batch of rows; where images come first, ask the module for rows before they do."""
        super().on_train_start(trainer, pl_module)
        if self._source is not None:
            self._source.asked = []
            if self._phased is not None and self._whole:
                self._source.probe()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Raise when a fit's first batch of rows was read in another order than its labels'."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._source is not None and self._source.asked:
            self._source.check_order(split_batch(batch)[0])

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Bring the module to the device on which the evaluation fills its splits."""
        super().on_task_end(trainer, pl_module, task)
        pl_module.to(trainer.strategy.root_device)

    def on_row(self, trainer: pl.Trainer, pl_module: pl.LightningModule, row: Row) -> None:
        """Release the finished task's training data."""
        kept = self.keep_training_data and self._phased is None
        if self._source is not None and row.after >= 0 and not kept:
            for split in (f"train-{row.after}", f"features-{row.after}"):
                self._source.forget(split)

    def on_stream_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, result: StreamResult) -> None:
        """Give the stream its own loaders back and free the memory."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the stream its own loaders back."""
        self._restore()

    def _restore(self) -> None:
        source, self._source, self._phased, self._convert = self._source, None, None, None
        if source is not None:
            for name in _METHODS:
                vars(source.stream).pop(name, None)
            source.taps.reader = None
            source.cache.close()
