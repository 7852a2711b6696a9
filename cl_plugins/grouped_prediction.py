"""Answers of a batch whose samples need different weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn


def predict_by_group(
    predict: Callable[[nn.Module, Any], Tensor],
    module: nn.Module,
    batch: Any,
    groups: Sequence[int],
    weights_of: Callable[[nn.Module, int], AbstractContextManager[None]],
) -> Tensor:
    """Logits ``(batch, classes)``, each sample's with the weights of its group; one pass for each group.

    Args:
        predict: gives the logits of a batch.
        module: with the weights.
        batch: tensors ``(batch, ...)`` and lists with an item per sample, nested in any way.
        groups: of each sample; not empty.
        weights_of: puts a group's weights into the module for a block.

    Example:
        >>> import torch
        >>> from contextlib import contextmanager
        >>> @contextmanager
        ... def weights_of(module, group):
        ...     _ = nn.init.constant_(module.weight, group)
        ...     yield
        >>> net = nn.Linear(1, 1, bias=False)
        >>> batch = {"x": torch.ones(3, 1)}
        >>> predict_by_group(lambda m, b: m(b["x"]), net, batch, [2, 0, 2], weights_of)[:, 0].tolist()
        [2.0, 0.0, 2.0]
    """
    logits: Tensor | None = None
    for group in sorted(set(groups)):
        rows = [i for i, g in enumerate(groups) if g == group]
        with weights_of(module, group):
            part = predict(module, _rows(batch, rows, len(groups)))
        if logits is None:
            logits = part.new_empty(len(groups), part.shape[1])
        logits[rows] = part
    assert logits is not None
    return logits


def _rows(batch: Any, rows: list[int], size: int) -> Any:
    """The rows of a batch of tensors and lists, nested as it is."""
    if isinstance(batch, Tensor):
        return batch[rows]
    if isinstance(batch, dict):
        return {k: _rows(v, rows, size) for k, v in batch.items()}
    if isinstance(batch, tuple | list):
        if len(batch) == size and not any(isinstance(item, Tensor) for item in batch):
            return [batch[i] for i in rows]
        return type(batch)(_rows(item, rows, size) for item in batch)
    return batch
