"""Keeping weight decay away from single parameters, without touching the user's parameter groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.hooks import RemovableHandle


def _decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    return bool(group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)))


def exempt_from_decay(parameters: Iterable[nn.Parameter], optimizer: Optimizer) -> list[RemovableHandle]:
    """Undo the weight decay of ``parameters`` in each step of ``optimizer``.

    Gates and blends sit at 0 for a reason; decay pulls them there although the data say otherwise. Splitting the groups
    would disturb schedulers that already exist.

    Args:
        parameters: those to spare; ones that the optimizer does not hold, or does not decay, are left alone.
        optimizer: one whose decay is either decoupled (AdamW) or a term of the gradient (SGD, Adam).

    Returns:
        Handles whose ``remove()`` ends it; none when there is nothing to undo.

    Example:
        >>> gate = nn.Parameter(torch.ones(1))
        >>> optimizer = torch.optim.SGD([gate], lr=0.5, weight_decay=0.1)
        >>> handles = exempt_from_decay([gate], optimizer)
        >>> gate.grad = torch.zeros(1)
        >>> optimizer.step()
        >>> gate.item()
        1.0
    """
    wanted = {id(p) for p in parameters}
    spared = [(g, p) for g in optimizer.param_groups for p in g["params"] if id(p) in wanted and g.get("weight_decay")]
    if not spared:
        return []
    before: list[Tensor] = []

    def prepare(*_: Any) -> None:
        before[:] = [p.detach().clone() for _, p in spared]
        with torch.no_grad():
            for (group, parameter), old in zip(spared, before, strict=True):
                if parameter.grad is not None and not _decoupled(optimizer, group):
                    parameter.grad.sub_(old, alpha=group["weight_decay"])

    def restore(*_: Any) -> None:
        with torch.no_grad():
            for (group, parameter), old in zip(spared, before, strict=True):
                if parameter.grad is not None and _decoupled(optimizer, group):
                    parameter.add_(old, alpha=float(group["lr"]) * group["weight_decay"])

    return [optimizer.register_step_pre_hook(prepare), optimizer.register_step_post_hook(restore)]
