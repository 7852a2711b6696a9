"""Side-Tuning: a small convolutional network beside the frozen backbone, blended into its feature.

"Side-Tuning: A Baseline for Network Adaptation via Additive Side Networks", Jeffrey O. Zhang, Alexander Sax, Amir
Zamir, Leonidas Guibas, Jitendra Malik, ECCV 2020, arXiv 1912.13503. Implemented: one side network per task on a frozen
base, the learned blend, distillation before training, the dense variant (:mod:`cl_plugins.adapters.alpha_side`). The
published evaluation knows the task; the routing between tasks is this library's.

Formula::

    feature = alpha B(x) + (1 - alpha) S_t(x),   alpha = sigmoid(a_t)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cl_plugins.adapters.alpha_side import AlphaSide, Merge
from cl_plugins.adapters.side_bank import Regime, Routing, check_choice
from cl_plugins.backbones import Backbone
from cl_plugins.batches import hand_over, own_pass
from cl_plugins.evaluation import evaluating, split_batch
from cl_plugins.features import feature
from cl_plugins.plugin import module_device
from cl_plugins.side_network import SideNetwork, TapRecord
from cl_plugins.tokens import image_channels, text_pool

from ._side import SideCallback


class SideTuning(SideCallback):
    """Trains a small network per task beside the frozen backbone and blends it into the feature.

    WHEN: as :class:`~cl_plugins.callbacks._side.SideCallback`; before a new side network trains it is distilled from
        the
    backbone on the task's data.

    Args:
        width: channels of the side network's first layer; they double up to four times it. Beside a text tower also the
            width of the side network's own token embedding, which has a row for every token of the vocabulary.
        merge: "alpha" as published, "sum", "product", "film" or "mlp".
        distill_epochs: passes over the task's data in which a new side network learns the backbone's feature; 0 for
            none.
        distill_lr: of the Adam that does so.
        regime: "per_task" as published; or "per_task_dense", "shared", "first_session".
        routing: who answers in the evaluation of the per-task regimes: "prototype", "logits", "posterior" or
            "both"; see :mod:`cl_plugins.adapters.side_bank`.
        warm_start: begin a new task's side network with the weights of the one before, instead of distilling it.
        backbone: dotted name of the transformer, for modules with several.
        head: dotted name of the classifier, for modules where it cannot be told.
        seed: of the initial weights.

    Raises:
        ValueError: for an unknown option.

    Example:
        >>> from cl_plugins import Task
        >>> from cl_plugins.backbones import vit_glyph
        >>> net, method = vit_glyph(num_classes=10), SideTuning(width=8)
        >>> method.install(net)
        >>> method.start_task(net, Task(0, (0, 1)))
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        width: int = 32,
        merge: Merge = "alpha",
        *,
        distill_epochs: int = 1,
        distill_lr: float = 1e-3,
        regime: Regime = "per_task",
        routing: Routing = "both",
        warm_start: bool = False,
        backbone: str | None = None,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(regime, routing, warm_start=warm_start, backbone=backbone, head=head, seed=seed)
        check_choice("merge", merge, get_args(Merge))
        if distill_epochs < 0:
            raise ValueError(f"`distill_epochs` must be 0 or more, got {distill_epochs!r}")
        if not distill_lr > 0:
            raise ValueError(f"`distill_lr` must be above 0, got {distill_lr!r}")
        self.width, self.merge, self.distill_epochs, self.distill_lr = width, merge, distill_epochs, distill_lr

    def factory(self, backbone: Backbone, head: nn.Linear) -> Callable[[], SideNetwork]:
        """A convolutional network with the width of the backbone's feature, on the image or on the text's tokens."""
        if backbone.kind == "text":
            ends = text_pool(backbone) in ("argmax", "eos")
            vocabulary = int(cast("Any", backbone.model).token_embedding.num_embeddings)
            return partial(AlphaSide, head.in_features, self.width, self.merge, vocabulary=vocabulary, ends=ends)
        return partial(AlphaSide, head.in_features, self.width, self.merge, image_channels(backbone))

    def reads_data(self) -> bool:
        """Whether the side network is distilled."""
        return self.distill_epochs > 0

    def initialize(self, module: nn.Module, loader: Iterable[Any]) -> None:
        """Let the new side network learn the backbone's feature; for hand-written loops.

        Args:
            module: where :meth:`start_task` was called.
            loader: the task's training data; read once per epoch of the distillation. With several processes each
                gives its share, dealt out in turn, and all together take the steps that one process would take.
        """
        bank, head, device = self.bank(module), self.find(module), module_device(module)
        side = cast(AlphaSide, bank.active)
        optimizer = torch.optim.Adam(side.network.parameters(), lr=self.distill_lr)
        bank.bypass = True
        try:
            for _ in range(self.distill_epochs):
                size = 0
                for batch in _together(loader, device):
                    record, base = TapRecord(), torch.empty(0, device=device)
                    if batch is not None:
                        with evaluating(module), own_pass(module):
                            base = feature(module, head, split_batch(hand_over(batch, module, device))[0])
                            base = base.to(head.weight.dtype)  # autocast may have given another
                            record = bank.taps.take()
                    size = max(size, _reduced(len(base), "max", device))
                    for rows in _steps(len(base), size):
                        _step(side, optimizer, record, base, rows.to(device))
        finally:
            bank.bypass = False
            optimizer.zero_grad(set_to_none=True)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _reduced(value: int, how: Literal["sum", "max"], device: torch.device) -> int:
    """Sum or largest value of all processes."""
    if not _distributed():
        return value
    held = torch.tensor(value, device=device)
    dist.all_reduce(held, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX)
    return int(held)


def _together(loader: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """The batches of this process; None for each that only others still have."""
    batches = iter(loader)
    while True:
        batch = next(batches, None)
        if not _reduced(int(batch is not None), "max", device):
            return
        yield batch


def _steps(n: int, size: int) -> Iterator[Tensor]:
    """Rows of this process's batch of ``n`` in each of the steps that one process would take with batches of ``size``.

    Row ``j`` of process ``r`` of ``W`` is sample ``j W + r`` of the batches that all processes hold together.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if _distributed() else (1, 0)
    step_of = (torch.arange(n) * world + rank) // size
    for step in range(world):
        yield (step_of == step).nonzero()[:, 0]


def _step(side: AlphaSide, optimizer: torch.optim.Optimizer, record: TapRecord, base: Tensor, rows: Tensor) -> None:
    """One step of the distillation on rows of this process's batch and what the other processes have."""
    total = _reduced(len(rows), "sum", base.device)
    if not total:
        return
    optimizer.zero_grad(set_to_none=True)
    if len(rows):
        assert record.image is not None
        loss = side.distillation_loss(record.rows(rows), base[rows])
        (loss * (len(rows) / total)).backward()
    if _distributed():
        for parameter in side.network.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
    optimizer.step()
