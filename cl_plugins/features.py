"""Features: what enters the classifier, collected over a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.utils.hooks import RemovableHandle

from cl_plugins.attach import own_memory
from cl_plugins.batches import hand_over, own_pass
from cl_plugins.evaluation import evaluating, split_batch
from cl_plugins.plugin import module_device
from cl_plugins.taps import BackboneTaps


class _Captured(Exception):
    """Ends a forward pass once the classifier's input is known."""


def _capture(store: list[Tensor], module: nn.Module, args: tuple[Any, ...]) -> None:
    store.append(own_memory(args[0].detach()))
    raise _Captured


def feature(module: nn.Module, head: nn.Module, inputs: Any) -> Tensor:
    """What ``head`` is given for ``inputs``, ``(batch, dim)``, in memory of its own; nothing behind it is computed.

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
    raise RuntimeError(
        f"the forward pass of `{type(module).__name__}` never calls its classifier; pass its name as `head=`"
    )


class DepthTap(nn.Module):
    """Keeps the class token that each of some blocks puts out, normalized, until it is asked for.

    Args:
        blocks: forward hooks are set on them.
        dim: width of a token.

    Example:
        >>> tap = DepthTap([nn.Identity()], 8)
        >>> _ = tap.blocks[0](torch.randn(2, 5, 8))
        >>> tap.extend(torch.zeros(2, 3)).shape
        torch.Size([2, 11])
    """

    def __init__(self, blocks: Sequence[nn.Module], dim: int) -> None:
        super().__init__()
        self.width = dim * len(blocks)
        self._hooked = tuple(blocks)  # in a tuple, so that their weights are not saved twice
        self._taps: tuple[BackboneTaps, ...] = ()
        self._kept: list[Tensor] = []
        self._handles: list[RemovableHandle] = []
        self._hook()

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The blocks whose class tokens are kept."""
        return self._hooked

    def _hook(self) -> None:
        self._handles += [block.register_forward_hook(self._keep) for block in self._hooked]

    def follow(self, taps: BackboneTaps) -> None:
        """Read the same blocks through the tap of a frozen backbone; a repeated call changes nothing.

        The hooks move behind those of ``taps``, which take registers off the tokens. From then on only the backbone's
        own pass counts, not what a side network runs through its last blocks, and evaluation runs all blocks.
        """
        if self._taps != (taps,):
            self.remove()
            self._hook()
            self._taps = (taps,)
            taps.whole_in_eval = True

    def _keep(self, block: nn.Module, args: Any, output: Any) -> None:
        if self._taps and not self._taps[0].running:
            return
        tokens = output[0] if isinstance(output, tuple) else output
        if block is self._hooked[0]:
            self._kept = []  # an earlier pass may have ended before its features were taken
        self._kept.append(layer_norm(tokens[:, 0].detach(), tokens.shape[-1:]))

    def kept(self) -> list[Tensor]:
        """What the last pass left, ``(batch, dim)`` for each block; taken by this call.

        Raises:
            RuntimeError: when the blocks did not all run since the last call.
        """
        kept, self._kept = self._kept, []
        if len(kept) != len(self._hooked):
            raise RuntimeError(
                f"the last {len(self._hooked) + 1} blocks must run before the classifier, got {len(kept)} of them;"
                " call the whole backbone in `forward`"
            )
        return kept

    def replay(self, tokens: Sequence[Tensor]) -> None:
        """Let stored tokens, as :meth:`kept` gave them, stand for a pass of the backbone."""
        self._kept = list(tokens)

    def extend(self, feature: Tensor) -> Tensor:
        """The feature ``(batch, dim)`` with the kept tokens behind it, ``(batch, dim + blocks * width)``."""
        return torch.cat([feature, *(k.to(feature.dtype) for k in self.kept())], dim=1)

    def remove(self) -> None:
        """Take the hooks off the blocks."""
        while self._handles:
            self._handles.pop().remove()


def collect_features(
    module: nn.Module,
    head: nn.Module,
    loader: Iterable[Any],
    device: torch.device | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Features and labels of all samples of a loader, in its order.

    Args:
        module: run in eval mode, without gradients; its modes are restored.
        head: the classifier whose inputs are the features.
        loader: gives ``(x, y)`` or dicts.
        device: where to run; the module's own when None.
        transform: of each batch's features, such as :meth:`DepthTap.extend`.

    Returns:
        ``(samples, dim)`` float32 and ``(samples,)`` int64, on ``device``.

    Raises:
        ValueError: when the loader is empty.
    """
    device = device or module_device(module)
    features, labels = [], []
    with evaluating(module), own_pass(module):
        for batch in loader:
            inputs, target = split_batch(hand_over(batch, module, device))
            found = feature(module, head, inputs)
            features.append((found if transform is None else transform(found)).float())
            labels.append(target)
    if not features:
        raise ValueError("`loader` must give at least one batch, got none")
    return torch.cat(features), torch.cat(labels)
