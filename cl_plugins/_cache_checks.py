"""What must hold so that rows of a cache may stand for images; each check raises and says what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cl_plugins.adapters.side_bank import SideBank
from cl_plugins.attach import plugin_modules
from cl_plugins.backbones import Backbone
from cl_plugins.batches import hand_over
from cl_plugins.evaluation import evaluating, split_batch
from cl_plugins.plugin import module_device
from cl_plugins.side_network import TapRecord
from cl_plugins.taps import BackboneTaps

Reader = Callable[[Tensor], tuple[TapRecord, Tensor]]


@contextmanager
def plain(module: nn.Module) -> Iterator[None]:
    """The backbone's own feature enters the classifier inside, and the whole backbone runs."""
    banks = [m for m in plugin_modules(module).values() if isinstance(m, SideBank)]
    before = [(bank.bypass, bank.taps.needs_final) for bank in banks]
    for bank in banks:
        bank.bypass = bank.taps.needs_final = True
    try:
        yield
    finally:
        for bank, (bypass, final) in zip(banks, before, strict=True):
            bank.bypass, bank.taps.needs_final = bypass, final


def check_hand_over(
    module: nn.Module,
    taps: BackboneTaps,
    reader: Reader,
    ids: Tensor,
    labels: Tensor,
    forward: Callable[[Any], object],
    precision: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Raise when the module does not hand row ids on to its backbone as they are.

    Args:
        module: run in eval mode.
        taps: of its backbone.
        reader: answers the ids.
        ids: ``(batch,)`` int64, what stands for images.
        labels: ``(batch,)``, theirs.
        forward: runs the module on what a batch's transfer made of the ids.
        precision: entered around the pass.

    Raises:
        RuntimeError: saying what to change.
    """
    seen: list[Tensor] = []

    def answer(given: Tensor) -> tuple[TapRecord, Tensor]:
        seen.append(given.cpu())
        return reader(given)

    before, taps.reader = taps.reader, answer
    failure: Exception | None = None
    try:
        with plain(module), evaluating(module), precision():
            forward(split_batch(hand_over((ids, labels), module, module_device(module)))[0])
    except Exception as error:  # whatever the user's own code makes of row ids
        failure = error
    finally:
        taps.reader = before
    if failure is not None or not seen or any(not torch.equal(given, ids) for given in seen):
        got = (
            repr(failure)
            if failure
            else ("no pass" if not seen else f"rows {[s.tolist() for s in seen]} for rows {ids.tolist()}")
        )
        raise RuntimeError(
            f"`{type(module).__name__}.forward`, and its transfer hooks, must hand the input to the backbone as it is,"
            f" since a cache gives row ids in place of images, got {got}; put what changes images into the stream's"
            " transforms, or leave CacheFeatures out of the callbacks"
        ) from failure


def moving_norms(module: nn.Module, backbone: Backbone) -> dict[str, nn.Module]:
    """Modules outside the backbone and the plugins whose running statistics follow the batches, by name."""
    inside = {id(m) for m in backbone.model.modules()}
    return {
        name: m
        for name, m in module.named_modules()
        if getattr(m, "running_mean", None) is not None and id(m) not in inside and not name.startswith("plugins.")
    }


def check_frozen(module: nn.Module, head: nn.Module, backbone: Backbone, taps: BackboneTaps, inputs: Any) -> None:
    """Raise when what enters the classifier can still change: what is cached today would be wrong tomorrow.

    Raises:
        RuntimeError: saying what to change.
    """
    seen: list[bool] = []
    moving: list[str] = []
    handles = [head.register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))]
    for name, norm in moving_norms(module, backbone).items():
        handles.append(norm.register_forward_hook(lambda *_, name=name: None if seen else moving.append(name)))
    frozen, taps.frozen = taps.frozen, False
    try:
        with torch.enable_grad():
            module(inputs)
    finally:
        taps.frozen = frozen
        for handle in handles:
            handle.remove()
    if moving:
        raise RuntimeError(
            "features can only be cached when nothing in front of the classifier follows the batches, got the running"
            f" statistics of {', '.join(f'`{name}`' for name in moving)}; take a LayerNorm there, or leave"
            " CacheFeatures out of the callbacks"
        )
    if taps.choose is not None or any(seen):
        raise RuntimeError(
            "features can only be cached when everything in front of the classifier is frozen, but prompts, norms"
            " or other weights there still train; leave CacheFeatures out of the callbacks"
        )


def check_same(computed: Mapping[str, Tensor], stored: Mapping[str, Tensor], tolerance: float, where: str) -> None:
    """Raise when rows that were stored differ from those that the module computes now.

    Args:
        computed: arrays ``(rows, ...)`` by name.
        stored: the same rows of an entry.
        tolerance: as a share of the largest stored value.
        where: names the entry.

    Raises:
        ValueError: saying what to do.
    """
    for name, value in stored.items():
        gap, largest = (computed[name].cpu().float() - value.float()).abs().max(), value.float().abs().max()
        if not gap <= tolerance * largest:
            raise ValueError(
                f"the cached features of {where} are stale: computed again from the same weights, {name!r} differs by"
                f" {float(gap):.3g}, where values reach {float(largest):.3g}, so something without weights is another"
                " one, such as an activation, the pooling or a constant in `forward`; drop the entry, or give the cache"
                " another folder"
            )
