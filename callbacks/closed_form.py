"""Closed-form classifiers as callbacks: nearest class mean and random-projection ridge regression.

Nearest class mean: "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity are
All You Need" (SimpleCIL), Zhou, Cai, Ye, Zhan, Liu, 2023, arXiv 2303.07338.
RanPAC: "RanPAC: Random Projections and Pre-trained Models for Continual Learning", McDonnell, Gong, Parvaneh,
Abbasnejad, van den Hengel, 2023, arXiv 2307.02251. Implemented: the projected ridge classifier with its choice of the
penalty. Not implemented: its first session adaptation; compose with an adapter callback instead.

    [NearestMean()]            alone: nothing is trained, one pass over each task
    [OVOR(), NearestMean()]    behind an adapter: it trains as usual, the classifier is computed from its features
    [LadderSideTuning(regime="first_session"), RanPAC(beside=True)]
                               ridge regression on [backbone's feature; side network's feature]
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from cl_plugins._processes import gather_rows
from cl_plugins.adapters.side_bank import SideBank
from cl_plugins.attach import plugin_modules
from cl_plugins.backbones import find_backbone
from cl_plugins.closed_form import ClosedFormHead, Extension, NearestMeanHead, RidgeHead
from cl_plugins.features import DepthTap, collect_features
from cl_plugins.heads import find_head
from cl_plugins.plugin import ContinualCallback, module_device, plugins_of
from cl_plugins.taps import BackboneTaps
from cl_plugins.task import Stream, Task

from .baselines import freeze_backbone

if TYPE_CHECKING:
    import pytorch_lightning as pl


class BesideTap(nn.Module):
    """Puts the frozen backbone's own feature behind that of the side network which replaced it.

    Args:
        bank: the side networks at work.
        width: of the feature.
        inner: adds class tokens of earlier blocks behind both; None for none.
    """

    def __init__(self, bank: SideBank, width: int, inner: DepthTap | None = None) -> None:
        super().__init__()
        bank.keep_base()
        self._bank = (bank,)  # in a tuple, so that its weights are not saved twice
        self.inner = inner
        self.width: int = width + (0 if inner is None else inner.width)

    def extend(self, feature: Tensor) -> Tensor:
        """The feature ``(batch, dim)`` with the backbone's behind it, ``(batch, dim + width)``."""
        base = self._bank[0].base
        if base is None or len(base) != len(feature):
            raise RuntimeError("the side networks must run before the computed classifier, got no feature of theirs")
        both = torch.cat([feature, base.to(feature.dtype)], 1)
        return both if self.inner is None else self.inner.extend(both)


class NearestMean(ContinualCallback):
    """Classifies by the nearest class mean of the features; the classifier is computed after each task, never trained.

    WHEN: after a task's training (if another callback trains), before its evaluation; one pass over the task's data in
    eval mode. In training mode the module keeps its own logits.

    Args:
        depth: how many blocks before the last also give their class token, as further features; 0 for the
            classifier's own input alone, as published.
        backbone: dotted name of the transformer, for modules with several.
        head: dotted name of the classifier, for modules where it cannot be told.
        beside: read the frozen backbone's own feature too, behind the side network's that replaces it; False where no
            side network is at work.

    Raises:
        ValueError: for a negative depth; at ``setup`` when no backbone or classifier is found, or the depth is too
            large.
    """

    training: ClassVar[Literal["required", "none", "neutral"]] = "none"
    modalities: ClassVar[tuple[str, ...]] = ("image",)
    plugin: ClassVar[str] = "nearest_mean"

    def __init__(
        self, depth: int = 0, backbone: str | None = None, head: str | None = None, *, beside: bool = False
    ) -> None:
        super().__init__()
        if depth < 0:
            raise ValueError(f"`depth` must be 0 or more, got {depth!r}")
        self.depth = depth
        self.backbone = backbone
        self.head = head
        self.beside = beside
        self._stream: Stream | None = None

    def build(self, head: nn.Linear, tap: Extension | None) -> ClosedFormHead:
        """The classifier to compute."""
        return NearestMeanHead(head, tap)

    def tap(self, module: nn.Module) -> Extension | None:
        """What gives further features; None where the classifier's own input is all."""
        inner = self._depth_tap(module)
        if not self.beside:
            return inner
        bank = dict(plugin_modules(module).items()).get("side")
        if not isinstance(bank, SideBank):
            raise ValueError(
                "`beside` must follow a side-tuning callback, found none; put one in front, or beside=False"
            )
        if bank.per_task:
            raise ValueError(
                f"`beside` must have one side network for all tasks, got regime={bank.regime!r}, whose feature changes"
                " with each; use regime='first_session'"
            )
        return BesideTap(bank, self.find(module).in_features, inner)

    def _depth_tap(self, module: nn.Module) -> DepthTap | None:
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
        return find_head(module, find_backbone(module, self.backbone, text=True), self.head)[1]

    def install(self, module: nn.Module) -> None:
        """Hook the computed classifier to the module's own."""
        plugins = plugin_modules(module)
        if self.plugin not in plugins:
            plugins[self.plugin] = self.build(self.find(module), self.tap(module)).train(module.training)
        self._follow(module)

    def _follow(self, module: nn.Module) -> None:
        """Read deeper blocks through the backbone's tap, where a side network or a cache set one."""
        plugins = dict(plugin_modules(module).items())
        taps, closed = plugins.get("taps"), plugins[self.plugin]
        if isinstance(taps, BackboneTaps):
            for tap in closed.modules():
                if isinstance(tap, DepthTap):
                    tap.follow(taps)

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
        self._follow(module)
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
        beside: as in :class:`NearestMean`.

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
        *,
        beside: bool = False,
    ) -> None:
        super().__init__(depth, backbone, head, beside=beside)
        if projection < 0:
            raise ValueError(f"`projection` must be 0 or more, got {projection!r}")
        if ridge is not None and not ridge > 0:
            raise ValueError(f"`ridge` must be above 0, or None to choose it, got {ridge!r}")
        if projection > 20_000:
            warnings.warn(f"`projection` {projection} keeps {8 * projection**2 / 2**30:.0f} GiB of sums", stacklevel=2)
        self.projection = projection
        self.ridge = ridge
        self.seed = seed

    def build(self, head: nn.Linear, tap: Extension | None) -> ClosedFormHead:
        """The classifier to compute."""
        return RidgeHead(head, self.projection, self.ridge, self.seed, tap)
