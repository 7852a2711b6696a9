"""SHERL: shallow taps of a frozen backbone, merged with little redundancy and finished by its last blocks.

"SHERL: Synthesizing High Accuracy and Efficient Memory for Resource-Limited Transfer Learning", Haiwen Diao, Bo Wan, Xu
Jia, Yunzhi Zhuge, Ying Zhang, Huchuan Lu, Long Chen, ECCV 2024, arXiv 2407.07523. Implemented: the consolidation and
the late route for vision transformers and text towers (:mod:`cl_plugins.adapters.sherl`). The regimes for a stream of
tasks are this library's.

Formula, for the frozen backbone's taps ``h`` and its last ``late`` blocks::

    feature = pool(norm(blocks[-late:](merge(h_0 ... h_{L-late}))))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

from torch import nn

from cl_plugins.adapters.sherl import SherlSide, Variant
from cl_plugins.adapters.side_bank import Regime, Routing, check_choice
from cl_plugins.backbones import Backbone
from cl_plugins.side_network import SideNetwork
from cl_plugins.tokens import check_plain_blocks, check_tokens

from ._side import SideCallback


class Sherl(SideCallback):
    """Trains a merge of shallow taps; gradients pass through the last frozen blocks only.

    WHEN: as :class:`~cl_plugins.callbacks._side.SideCallback`.

    Args:
        reduction: the taps' width is the backbone's divided by it; 8 as published for the large models.
        late: blocks that finish the work; 1 as published.
        variant: how taps are projected and merged, "gated" as in most of the published code, "norm" or "mlp"; see
            :class:`cl_plugins.adapters.sherl.Consolidator`.
        gate_init: "zero" as published, where training starts from a random adapter, or "identity", which starts at the
            frozen model.
        score_bias: initial bias of the agreement with the guide; PyTorch's random one when None, as published.
        regime: "shared", "first_session", "per_task" or "per_task_dense".
        routing: who answers in the evaluation of the per-task regimes: "prototype", "logits", "posterior" or
            "both"; see :mod:`cl_plugins.adapters.side_bank`.
        warm_start: begin a new task's side network with the weights of the one before.
        backbone: dotted name of the transformer, for modules with several.
        head: dotted name of the classifier, for modules where it cannot be told.
        seed: of the initial weights.

    Raises:
        ValueError: for an unknown option; at ``setup`` for a reduction that does not divide the backbone's width, or
            too many late blocks.

    Example:
        >>> import torch
        >>> from cl_plugins import Task
        >>> from cl_plugins.backbones import vit_glyph
        >>> net, method = vit_glyph(num_classes=10), Sherl(reduction=4)
        >>> method.install(net)
        >>> method.start_task(net, Task(0, (0, 1)))
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        reduction: int = 8,
        late: int = 1,
        *,
        variant: Variant = "gated",
        gate_init: Literal["zero", "identity"] = "zero",
        score_bias: float | None = None,
        regime: Regime = "shared",
        routing: Routing = "both",
        warm_start: bool = False,
        backbone: str | None = None,
        head: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(regime, routing, warm_start=warm_start, backbone=backbone, head=head, seed=seed)
        if gate_init not in ("zero", "identity"):
            raise ValueError(f"`gate_init` must be 'zero' or 'identity', got {gate_init!r}")
        check_choice("variant", variant, get_args(Variant))
        self.reduction, self.late, self.variant = reduction, late, variant
        self.gate_init, self.score_bias = gate_init, score_bias

    def factory(self, backbone: Backbone, head: nn.Linear) -> Callable[[], SideNetwork]:
        """A consolidator in front of the backbone's last blocks."""
        check_tokens(backbone)
        check_plain_blocks(backbone, type(self).__name__)
        return partial(
            SherlSide,
            backbone,
            reduction=self.reduction,
            late=self.late,
            variant=self.variant,
            gate_init=self.gate_init,
            score_bias=self.score_bias,
        )
