"""Sequential LoRA: one low-rank adapter per layer, trained on task after task.

"LoRA: Low-Rank Adaptation of Large Language Models", Edward J. Hu and others, ICLR 2022, arXiv 2106.09685. Implemented:
the adapters with MoRA's layers and per-task budget, as its baseline. Not implemented: anything against forgetting.

Formula::

    y = W x + b + `scaling` B A x        A, B of `rank`, the same for all tasks
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal
from zlib import crc32

from cl_plugins.adapters.delta import LinearDelta, adapter_dtype
from cl_plugins.adapters.lora import LowRank
from cl_plugins.targets import QkvMode, Site

from ._linear_adapters import LinearAdapters


class LoRA(LinearAdapters):
    """Trains low-rank adapters on a frozen model, task after task, without protection: the baseline of :class:`MoRA`.

    WHEN: attaches and freezes at ``setup``; sets the classifier's mask before each task.

    Args:
        rank: inner width of an adapter.
        targets: layers to adapt: a regular expression of the whole dotted name, or a list of its ends; None for
            attention and MLP of every block.
        scaling: factor of the adapters' output.
        dropout: on the adapters' input, in [0, 1).
        qkv_mode: "split" for an adapter each on query, key and value where one layer computes them, "fused" for one.
        backbone: dotted name of the transformer, for modules with several.
        head: dotted name of the classifier; None finds it, False for none.
        seed: for the initial adapters; None for one that follows from torch's seed.

    Raises:
        ValueError: for settings out of range; at ``setup`` when no layer matches.

    Example:
        >>> from cl_plugins.backbones import vit_glyph
        >>> net, method = vit_glyph(num_classes=10), LoRA(rank=2, targets=["fc1"])
        >>> method.install(net)
        >>> sum(p.numel() for p in net.plugins["lora"].parameters())  # 6 blocks, 2 * (128 + 512)
        7680
    """

    key: ClassVar[str] = "lora"

    def __init__(
        self,
        rank: int = 16,
        targets: str | Sequence[str] | None = None,
        *,
        scaling: float = 1.0,
        dropout: float = 0.0,
        qkv_mode: QkvMode = "split",
        backbone: str | None = None,
        head: str | Literal[False] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(targets, qkv_mode, backbone, head, seed)
        LowRank(1, 1, rank, dropout=dropout)  # refuses what is out of range now, not at setup
        self.rank, self.scaling, self.dropout = rank, scaling, dropout

    def make(self, site: Site) -> LinearDelta:
        """A fresh adapter, drawn with the name of its layer."""
        weight: Any = site.layer.in_proj_weight if site.slot != "output" else site.layer.weight
        return LowRank(
            site.in_features,
            site.out_features,
            self.rank,
            scaling=self.scaling,
            dropout=self.dropout,
            parts=site.parts,
            of=site.of,
            generator=self.generator(crc32(site.name.encode())),
            device=weight.device,
            dtype=adapter_dtype(weight),
        )

    def settings(self) -> dict[str, Any]:
        """Plain values that the adapters' files keep."""
        return {"rank": self.rank, "scaling": self.scaling, "dropout": self.dropout, "qkv_mode": self.qkv_mode}
