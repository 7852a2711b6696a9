"""Features: what enters the classifier, collected over a loader."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cl_plugins.evaluation import evaluating, split_batch, to_device
from cl_plugins.plugin import module_device


class _Captured(Exception):
    """Ends a forward pass once the classifier's input is known."""


def _capture(store: list[Tensor], module: nn.Module, args: tuple[Any, ...]) -> None:
    store.append(args[0].detach())
    raise _Captured


def feature(module: nn.Module, head: nn.Module, inputs: Any) -> Tensor:
    """What ``head`` is given for ``inputs``, ``(batch, dim)``; nothing behind the head is computed.

    Raises:
        RuntimeError: when the forward pass never reaches the head.
    """
    store: list[Tensor] = []
    handle = head.register_forward_pre_hook(partial(_capture, store))
    try:
        module(inputs)
    except _Captured:
        return store[0]
    finally:
        handle.remove()
    raise RuntimeError(f"the forward pass of `{type(module).__name__}` never calls its classifier; pass its name as `head=`")


def collect_features(
    module: nn.Module, head: nn.Module, loader: Iterable[Any], device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Features and labels of all samples of a loader, in its order.

    Args:
        module: run in eval mode, without gradients; its modes are restored.
        head: the classifier whose inputs are the features.
        loader: gives ``(x, y)`` or dicts.
        device: where to run; the module's own when None.

    Returns:
        ``(samples, dim)`` float32 and ``(samples,)`` int64, on ``device``.

    Raises:
        ValueError: when the loader is empty.
    """
    device = device or module_device(module)
    features, labels = [], []
    with evaluating(module):
        for batch in loader:
            inputs, target = split_batch(to_device(batch, device))
            features.append(feature(module, head, inputs).float())
            labels.append(target)
    if not features:
        raise ValueError("`loader` must give at least one batch, got none")
    return torch.cat(features), torch.cat(labels)
