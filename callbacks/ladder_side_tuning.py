"""Ladder side-tuning: a narrow network beside a frozen transformer, fed by its intermediate tokens.

"LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", Yi-Lin Sung, Jaemin Cho, Mohit Bansal,
NeurIPS 2022, arXiv 2206.06522. Implemented: the ladder with learned gates, dropped layers and pruning initialization,
for vision transformers and text towers (:mod:`cl_plugins.adapters.ladder`, :mod:`cl_plugins.adapters.side_pruning`).
The regimes for a stream of tasks are this library's.

Formula, for taps ``h`` of the frozen backbone::

    s = block_i(mu_i s + (1 - mu_i) down_i(h_{i+1})),  mu_i = sigmoid(gate_i / 0.1);   feature = up(norm(pool(s)))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cl_plugins.adapters.ladder import Drop, Gate, LadderSide, check_layers, kept_layers
from cl_plugins.adapters.side_bank import Regime, Routing, check_choice
from cl_plugins.adapters.side_pruning import canonical_weights, fisher_importance, initialize_ladder
from cl_plugins.backbones import Backbone, find_backbone
from cl_plugins.batches import hand_over
from cl_plugins.cached_rows import uncached
from cl_plugins.evaluation import default_predict, evaluating, split_batch
from cl_plugins.plugin import module_device
from cl_plugins.side_network import SideNetwork
from cl_plugins.tokens import check_tokens, token_layout

from ._side import SideCallback

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from cl_plugins.task import Task

Init = Literal["magnitude", "fisher", "random"]


class LadderSideTuning(SideCallback):
    """Trains a narrow ladder beside the frozen backbone; no gradient passes through the backbone.

    The backbone is a timm ViT or a tower of open_clip, vision or text; beside a text tower the ladder keeps its mask.

    WHEN: as :class:`~cl_plugins.callbacks._side.SideCallback`; with ``init="fisher"`` it reads 1024 samples of the task
    before a new side network trains.

    Args:
        reduction: divides every width; 8 as published.
        layers: blocks that keep a side block, or which part is dropped: "none", "quarter" (published for 12 layers),
            "half" (published for 24), "three-quarters".
        init: the side blocks' first weights: rows of the backbone chosen by "magnitude" (no data needed) or "fisher"
            (published), or "random".
        gate: "learnable" as published; see :class:`cl_plugins.adapters.ladder.LadderSide` for the others.
        fisher_samples: samples for "fisher", of each process; 1024 as published.
        regime: "shared", "first_session", "per_task" or "per_task_dense".
        routing: who answers in the evaluation of the per-task regimes: "prototype", "logits", "posterior" or
            "both"; see :mod:`cl_plugins.adapters.side_bank`.
        warm_start: begin a new task's side network with the weights of the one before.
        backbone: dotted name of the transformer, for modules with several.
        head: dotted name of the classifier, for modules where it cannot be told.
        seed: of the initial weights.

    Raises:
        ValueError: for an unknown option; at ``setup`` for a reduction that does not divide the width of a head, or
            layers that the backbone does not have.

    Example:
        >>> from cl_plugins import Task
        >>> from cl_plugins.backbones import vit_glyph
        >>> net, method = vit_glyph(num_classes=10), LadderSideTuning(reduction=4, layers="none")
        >>> method.install(net)
        >>> method.start_task(net, Task(0, (0, 1)))
        >>> _ = net(torch.zeros(2, 3, 32, 32))
        >>> sum(p.numel() for p in method.bank(net).active.parameters())  # beside 1.2 million frozen ones
        109414
    """

    def __init__(
        self,
        reduction: int = 8,
        layers: Sequence[int] | Drop = "quarter",
        *,
        init: Init = "magnitude",
        gate: Gate = "learnable",
        fisher_samples: int = 1024,
        regime: Regime = "shared",
        routing: Routing = "both",
        warm_start: bool = False,
        backbone: str | None = None,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(regime, routing, warm_start=warm_start, backbone=backbone, head=head, seed=seed)
        check_choice("init", init, get_args(Init))
        check_choice("gate", gate, get_args(Gate))
        if isinstance(layers, str):
            check_choice("layers", layers, get_args(Drop))
        if fisher_samples < 1:
            raise ValueError(f"`fisher_samples` must be 1 or more, got {fisher_samples!r}")
        self.reduction, self.layers, self.init, self.gate = reduction, layers, init, gate
        self.fisher_samples = fisher_samples

    def factory(self, backbone: Backbone, head: nn.Linear) -> Callable[[], SideNetwork]:
        """A ladder in the proportions of the backbone.

        Raises:
            ValueError: for layers or a reduction that do not fit, or a backbone whose tokens do not.
        """
        check_tokens(backbone)
        if self.init != "random":
            canonical_weights(backbone)  # what cannot be pruned is told here
        block, depth = cast("Any", backbone.blocks[0]), len(backbone.blocks)
        layers = kept_layers(depth, self.layers) if isinstance(self.layers, str) else check_layers(self.layers, depth)
        if backbone.kind == "timm":
            norm, hidden, activation = block.norm1, block.mlp.fc2.in_features, type(block.mlp.act)
            queries = getattr(block.attn, "qkv", None) or block.attn.q_proj
            bias = queries.bias is not None
        else:
            norm, hidden, activation = block.ln_1, block.mlp.c_proj.in_features, type(block.mlp.gelu)
            bias = block.attn.in_proj_bias is not None
        return partial(
            LadderSide,
            backbone.embed_dim,
            backbone.num_heads,
            depth,
            reduction=self.reduction,
            layers=layers,
            hidden=hidden,
            gate=self.gate,
            layout=token_layout(backbone),
            bias=bias,
            activation=activation,
            eps=float(getattr(norm, "eps", 1e-6)),
        )

    def initialize_side(self, module: nn.Module, side: SideNetwork) -> None:
        """Copy rows of the backbone, chosen by magnitude."""
        if self.init == "magnitude":
            initialize_ladder(cast(LadderSide, side), find_backbone(module, self.backbone, text=True), self.reduction)

    def reads_data(self) -> bool:
        """Whether weights are chosen by Fisher information."""
        return self.init == "fisher"

    def initialize(self, module: nn.Module, loader: Iterable[Any]) -> None:
        """Copy rows of the backbone, chosen by Fisher information on the task's data; for hand-written loops.

        Args:
            module: where :meth:`start_task` was called.
            loader: the task's training data.

        Raises:
            RuntimeError: when the loss on these data does not depend on the backbone's weights.
        """
        if self.init != "fisher":
            return
        found, bank = find_backbone(module, self.backbone, text=True), self.bank(module)
        parameters = {
            n: p
            for n, p in found.model.named_parameters()
            if p.ndim > 1 and n.endswith("weight") and "head" not in n and not n.startswith("visual.")
        }
        final = bank.taps.needs_final
        bank.bypass, bank.taps.frozen, bank.taps.needs_final = True, False, True
        try:
            with evaluating(module), torch.enable_grad():
                samples = islice(_singles(uncached(loader), module), self.fisher_samples)
                importance = fisher_importance(parameters, lambda batch: _loss(module, batch), samples)
        finally:
            bank.bypass, bank.taps.frozen, bank.taps.needs_final = False, True, final
        if dist.is_available() and dist.is_initialized():
            for value in importance.values():
                dist.all_reduce(value)  # each process read its own share of the data
        if not any(value.any() for value in importance.values()):
            raise RuntimeError(
                "`init='fisher'` must find a loss that depends on the backbone's weights, got gradients of 0 for all of"
                " them, as a classifier of zeros, a task of one class or a backbone called without gradients gives; use"
                " init='magnitude'"
            )
        initialize_ladder(cast(LadderSide, bank.active), found, self.reduction, importance)

    def start_task(self, module: nn.Module, task: Task) -> None:
        """As every side network's, and scheduled gates begin anew, those of a warm start too."""
        super().start_task(module, task)
        if self._grew:
            cast(LadderSide, self.bank(module).active).set_epoch(0, 1)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move scheduled gates of a side network that trains."""
        side = cast(LadderSide, self.bank(pl_module).active)
        if any(p.requires_grad for p in side.parameters()):
            side.set_epoch(trainer.current_epoch, max(trainer.max_epochs or 1, 1))


def _singles(loader: Iterable[Any], module: nn.Module) -> Iterator[Any]:
    """Batches of one sample, as ``module`` takes them."""
    for batch in loader:
        inputs, labels = split_batch(hand_over(batch, module, module_device(module)))
        for i in range(len(labels)):
            yield _sample(inputs, i, len(labels)), labels[i : i + 1]


def _sample(inputs: Any, index: int, n: int) -> Any:
    """Sample ``index`` of ``n``, as a batch of one; dicts are followed, and what is not by sample stays whole."""
    if isinstance(inputs, dict):
        return {k: _sample(v, index, n) for k, v in inputs.items()}
    by_sample = isinstance(inputs, Tensor) and inputs.ndim > 0 and len(inputs) == n
    if isinstance(inputs, tuple | list) and any(isinstance(v, Tensor) for v in inputs):
        return [_sample(v, index, n) for v in inputs]
    if isinstance(inputs, tuple | list):
        by_sample = len(inputs) == n  # such as texts
    return inputs[index : index + 1] if by_sample else inputs


def _loss(module: nn.Module, batch: Any) -> Tensor:
    return cross_entropy(default_predict(module, batch), batch[1])
