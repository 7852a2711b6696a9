"""Hierarchical side-tuning: a pyramid beside a vision transformer, fed by its intermediate tokens.

"Hierarchical Side-Tuning for Vision Transformers", Weifeng Lin, Ziheng Wu, Wentao Yang, Mingxin Huang, Jun Huang,
Lianwen Jin, 2023, arXiv 2310.05393. Implemented: the method for classification with register tokens and trained norms,
and a memory-lean variant of our own (:mod:`cl_plugins.adapters.hierarchical_side`). The regimes for a stream of tasks
are this library's.

Formula::

    e_i = resize(bridge(S_i))                      S_i: patch tokens of block i
    x = x + attention(x, [norm(bridge(m_i)); mean(e_i)]) + e_i;  x = x + mlp(norm(x))
    m_i            registers of block i as published; the class token of a frozen backbone in the lean variant
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from cl_plugins.adapters.hierarchical_side import HierarchicalSide
from cl_plugins.adapters.side_bank import Regime, Routing
from cl_plugins.backbones import Backbone, find_backbone
from cl_plugins.plugin import ContinualCallback
from cl_plugins.side_network import SideNetwork
from cl_plugins.tokens import check_free_positions, check_tokens, image_channels, token_layout

from ._side import SideCallback
from .cache_features import CacheFeatures


class LeanHierarchicalSideTuning(SideCallback):
    """Trains a pyramid beside a frozen backbone: hierarchical side-tuning without registers and without trained norms.

    A variant of this library, not the published method: no gradient passes through the backbone, its taps can be cached
    and each task can have a pyramid of its own; expect to lose what registers and norms gain.

    WHEN: as :class:`~cl_plugins.callbacks._side.SideCallback`.

    Args:
        widths: of the four levels; the published ones.
        heads: of the four levels.
        depths: side blocks per level, in sum the backbone's blocks; evenly when None.
        drop_path: of the last side block, rising linearly from 0.
        regime: "shared", "first_session", "per_task" or "per_task_dense".
        routing: who answers in the evaluation of the per-task regimes: "prototype", "logits", "posterior" or
            "both"; see :mod:`cl_plugins.adapters.side_bank`.
        warm_start: begin a new task's pyramid with the weights of the one before.
        backbone: dotted name of the transformer, for modules with several.
        head: dotted name of the classifier, for modules where it cannot be told.
        seed: of the initial weights.

    Raises:
        ValueError: for an unknown option; at ``setup`` for a backbone with fewer than four blocks, or a classifier
            narrower than the last level.

    Example:
        >>> import torch
        >>> from cl_plugins import Task
        >>> from cl_plugins.backbones import vit_glyph
        >>> net, method = vit_glyph(num_classes=10), LeanHierarchicalSideTuning()
        >>> method.install(net)
        >>> method.start_task(net, Task(0, (0, 1)))
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    registers: int = 0

    def __init__(
        self,
        *,
        widths: Sequence[int] = (32, 48, 64, 72),
        heads: Sequence[int] = (2, 4, 8, 12),
        depths: Sequence[int] | None = None,
        drop_path: float = 0.0,
        regime: Regime = "shared",
        routing: Routing = "both",
        warm_start: bool = False,
        backbone: str | None = None,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(regime, routing, warm_start=warm_start, backbone=backbone, head=head, seed=seed)
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"`drop_path` must be from 0 to below 1, got {drop_path!r}")
        self.widths, self.heads, self.depths = tuple(widths), tuple(heads), None if depths is None else tuple(depths)
        self.drop_path = drop_path

    def factory(self, backbone: Backbone, head: nn.Linear) -> Callable[[], SideNetwork]:
        """A pyramid with one block for each of the backbone's.

        Raises:
            ValueError: for a text tower, a backbone whose tokens do not fit, or a classifier narrower than the last
                level.
        """
        if backbone.kind == "text":
            raise ValueError(
                f"`backbone` must read images for {type(self).__name__}, whose pyramid stands on the image, got a text"
                " tower; use LadderSideTuning, Sherl or SideTuning"
            )
        if self.widths[-1] > head.in_features:
            raise ValueError(
                f"`widths` must end with at most {head.in_features}, the classifier's input, got {self.widths!r}"
            )
        check_tokens(backbone)
        if self.registers:
            check_free_positions(backbone, type(self).__name__)
        return partial(
            HierarchicalSide,
            backbone.embed_dim,
            len(backbone.blocks),
            registers=self.registers,
            widths=self.widths,
            heads=self.heads,
            depths=self.depths,
            drop_path=self.drop_path,
            channels=image_channels(backbone),
            layout=token_layout(backbone),
            blocks=backbone.blocks if self.registers else (),
        )


class HierarchicalSideTuning(LeanHierarchicalSideTuning):
    """Trains a pyramid, register tokens in every block and the norms of the backbone's blocks, as published.

    Few parameters, but not little memory: registers and norms keep the graph of the whole backbone, more than full
    fine-tuning on small backbones. Taps cannot be cached. The trained norms are copies that belong to the side network:
    the backbone computes with them in its pass for that side network and keeps its own. With one side network per task
    an evaluation takes a pass through the backbone for each task beside the one that chooses between them.

    WHEN: as :class:`~cl_plugins.callbacks._side.SideCallback`.

    Args:
        registers: learned tokens per block; 1 as published.
        widths: of the four levels; the published ones.
        heads: of the four levels.
        depths: side blocks per level, in sum the backbone's blocks; evenly when None.
        drop_path: of the last side block, rising linearly from 0.
        regime: "shared", "first_session", "per_task" or "per_task_dense".
        routing: who answers in the evaluation of the per-task regimes: "prototype", "logits", "posterior" or
            "both"; see :mod:`cl_plugins.adapters.side_bank`.
        warm_start: begin a new task's pyramid, registers and norms with those of the task before.
        backbone: dotted name of the transformer, for modules with several.
        head: dotted name of the classifier, for modules where it cannot be told.
        seed: of the initial weights.

    Raises:
        ValueError: for an unknown option; at ``setup`` for a backbone with fewer than four blocks, or a classifier
            narrower than the last level.
    """

    def __init__(
        self,
        *,
        registers: int = 1,
        widths: Sequence[int] = (32, 48, 64, 72),
        heads: Sequence[int] = (2, 4, 8, 12),
        depths: Sequence[int] | None = None,
        drop_path: float = 0.0,
        regime: Regime = "shared",
        routing: Routing = "both",
        warm_start: bool = False,
        backbone: str | None = None,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            widths=widths,
            heads=heads,
            depths=depths,
            drop_path=drop_path,
            regime=regime,
            routing=routing,
            warm_start=warm_start,
            backbone=backbone,
            head=head,
            seed=seed,
        )
        if registers < 1:
            raise ValueError(
                f"`registers` must be 1 or more, got {registers!r}; LeanHierarchicalSideTuning does without them"
            )
        self.registers = registers

    def install(self, module: nn.Module) -> None:
        """Attach, freeze, and let the norms of the blocks train.

        Raises:
            ValueError: for a backbone with gradient checkpointing, which would run the blocks again without registers.
        """
        model = find_backbone(module, self.backbone, text=True).model
        parts = (model, *model.children())
        if any(getattr(part, "grad_checkpointing", False) for part in parts):
            raise ValueError(
                "`grad_checkpointing` must be off for HierarchicalSideTuning, whose registers the second forward pass"
                " would miss; call set_grad_checkpointing(False), or use LeanHierarchicalSideTuning"
            )
        super().install(module)

    def conflict(self, other: ContinualCallback, module: nn.Module) -> str | None:
        """A cache of features, which the registers and norms keep changing."""
        if isinstance(other, CacheFeatures):
            return (
                "features change while HierarchicalSideTuning trains registers and norms inside the backbone;"
                " LeanHierarchicalSideTuning does without them"
            )
        return super().conflict(other, module)
