"""Closed-form classifiers as callbacks: nearest class mean and random-projection ridge regression.

Nearest class mean: "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are
All You Need" (SimpleCIL), Zhou, Cai, Ye, Zhan, Liu, 2023, arXiv 2303.07338.
RanPAC: "RanPAC: Random Projections and Pre-trained Models for Continual Learning", McDonnell, Gong, Parvaneh,
Abbasnejad, van den Hengel, 2023, arXiv 2307.02251. Implemented: the projected ridge classifier with its choice of the
penalty. Not implemented: its first session adaptation; compose with an adapter callback instead.

    [NearestMean()]            alone: nothing is trained, one pass over each task
    [OVOR(), NearestMean()]    behind an adapter: it trains as usual, the classifier is computed from its features
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import nn

from cl_plugins.attach import plugin_modules
from cl_plugins.backbones import find_backbone
from cl_plugins.closed_form import ClosedFormHead, NearestMeanHead, RidgeHead
from cl_plugins.features import DepthTap, collect_features
from cl_plugins.head_phase import gather_rows
from cl_plugins.heads import find_head
from cl_plugins.plugin import ContinualCallback, module_device, plugins_of
from cl_plugins.task import Stream, Task

from .baselines import freeze_backbone

if TYPE_CHECKING:
    import pytorch_lightning as pl


class NearestMean(ContinualCallback):
    """Classifies by the nearest class mean of the features; the classifier is computed after each task, never trained.

    WHEN: after a task's training (if another callback trains), before its evaluation; one pass over the task's data in
    eval mode. In training mode the module keeps its own logits.

    Args:
        depth: how many blocks before the last also give their class token, as further features; 0 for the
            classifier's own input alone, as published.
        backbone: dotted name of the transformer, for modules with several.
        head: dotted name of the classifier, for modules where it cannot be told.

    Raises:
        ValueError: for a negative depth; at ``setup`` when no backbone or classifier is found, or the depth is too
            large.
    """

    training: ClassVar[Literal["required", "none", "neutral"]] = "none"
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    plugin: ClassVar[str] = "nearest_mean"

    def __init__(self, depth: int = 0, backbone: str | None = None, head: str | None = None) -> None:
        super().__init__()
        if depth < 0:
            raise ValueError(f"`depth` must be 0 or more, got {depth!r}")
        self.depth = depth
        self.backbone = backbone
        self.head = head
        self._stream: Stream | None = None

    def build(self, head: nn.Linear, tap: DepthTap | None) -> ClosedFormHead:
        """The classifier to compute."""
        return NearestMeanHead(head, tap)

    def tap(self, module: nn.Module) -> DepthTap | None:
        """Hooks on the blocks before the last that give further features; None for a depth of 0."""
        if self.depth == 0:
            return None
        found = find_backbone(module, self.backbone)
        if self.depth >= len(found.blocks) or found.kind != "timm":
            raise ValueError(
                f"`depth` must be below {len(found.blocks)}, the number of blocks, on a timm backbone,"
                f" got {self.depth!r} on {found.kind}"
            )
        return DepthTap(found.blocks[-1 - self.depth : -1], found.embed_dim)

    def find(self, module: nn.Module) -> nn.Linear:
        """The classifier whose logits are replaced."""
        return find_head(module, find_backbone(module, self.backbone), self.head)[1]

    def install(self, module: nn.Module) -> None:
        """Hook the computed classifier to the module's own."""
        plugins = plugin_modules(module)
        if self.plugin not in plugins:
            plugins[self.plugin] = self.build(self.find(module), self.tap(module)).train(module.training)

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Install; freeze the backbone when no other callback trains."""
        super().on_task_start(trainer, pl_module, task)
        if all(p.training != "required" for p in plugins_of(trainer)):
            freeze_backbone(pl_module, nn.Module(), self.backbone)

    def fit_head(self, module: nn.Module, loader: Iterable[Any]) -> None:
        """Add the samples of ``loader`` and compute the classifier; for hand-written loops.

        Args:
            module: where :meth:`install` was called.
            loader: one task's training data, without augmentation.
        """
        closed = cast(ClosedFormHead, plugin_modules(module)[self.plugin])
        device = module_device(module)
        closed.to(device)
        features, labels = collect_features(module, self.find(module), loader, device, closed.extend)
        features, labels = gather_rows(features, dealt=True), gather_rows(labels, dealt=True)
        largest = int(labels.max())
        if largest >= len(closed.count):
            raise ValueError(f"labels must be rows of the head, 0 to {len(closed.count) - 1}, got {largest}")
        with torch.no_grad():
            closed.accumulate(features, labels)
            closed.solve()

    def on_task_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Compute the classifier from this task's data and the sums of earlier ones."""
        super().on_task_end(trainer, pl_module, task)
        if self._stream is None:
            raise RuntimeError(
                f"`{type(self).__name__}` must know the stream: use fit_stream, or fit_head(module, loader)"
            )
        pl_module.to(trainer.strategy.root_device)
        self.fit_head(pl_module, self._stream.train_loader_for_features(task.index))

    def on_stream_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stream: Stream) -> None:
        """Keep the stream, which has the data for the classifier."""
        self._stream = stream


class RanPAC(NearestMean):
    """Classifies by ridge regression on randomly projected, rectified features, computed after each task.

    WHEN: as :class:`NearestMean`.

    Args:
        projection: width of the random projection; the paper uses 10,000 on features of width 768, the default of
            2,000 is
            for small backbones. 0 projects nothing.
        ridge: the penalty; None chooses among 1e-8 ... 1e8 on a fifth of each task's samples, as the paper does.
        seed: of the projection.
        depth: how many blocks before the last also give their class token; 0 as published.
        backbone: dotted name of the transformer, for modules with several.
        head: dotted name of the classifier, for modules where it cannot be told.

    Raises:
        ValueError: for a negative width or penalty.
    """

    plugin: ClassVar[str] = "ranpac"

    def __init__(
        self,
        projection: int = 2000,
        ridge: float | None = None,
        seed: int = 0,
        depth: int = 0,
        backbone: str | None = None,
        head: str | None = None,
    ) -> None:
        super().__init__(depth, backbone, head)
        if projection < 0:
            raise ValueError(f"`projection` must be 0 or more, got {projection!r}")
        if ridge is not None and not ridge > 0:
            raise ValueError(f"`ridge` must be above 0, or None to choose it, got {ridge!r}")
        if projection > 20_000:
            warnings.warn(f"`projection` {projection} keeps {8 * projection**2 / 2**30:.0f} GiB of sums", stacklevel=2)
        self.projection = projection
        self.ridge = ridge
        self.seed = seed

    def build(self, head: nn.Linear, tap: DepthTap | None) -> ClosedFormHead:
        """The classifier to compute."""
        return RidgeHead(head, self.projection, self.ridge, self.seed, tap)
