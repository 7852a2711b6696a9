"""How batches reach a module in the passes that plugins make of their own: as in the Trainer's loops.

Those loops change a batch before the module sees it: the transfer hooks of the module or of the data module may
normalize it, and the Trainer's precision stands around the forward pass. A router or a computed classifier that read
the batch as the loader gave it would be fitted to other features than those that are tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cl_plugins._lightning import datamodule_of

if TYPE_CHECKING:
    import pytorch_lightning as pl

    from cl_plugins.task import Stream

_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


@dataclass(frozen=True)
class _Run:
    trainer: Any
    module: nn.Module
    stream: Any


_RUN: ContextVar[_Run | None] = ContextVar("cl_plugins_run", default=None)


@contextmanager
def passes_of(trainer: pl.Trainer, module: nn.Module, stream: Stream) -> Iterator[None]:
    """Passes of ``module`` that plugins make inside are like those of ``trainer.fit(module, datamodule=stream)``."""
    untyped: Any = module
    if isinstance(getattr(type(module), "trainer", None), property):
        untyped.trainer = trainer  # as `fit` will; hooks ask it whether the module trains
    token = _RUN.set(_Run(trainer, module, stream))
    try:
        yield
    finally:
        _RUN.reset(token)


def own_pass(module: nn.Module) -> AbstractContextManager[Any]:
    """The precision in which the run of ``module`` trains, to stand around a forward pass; nothing outside of a run."""
    run = _RUN.get()
    return nullcontext() if run is None or run.module is not module else run.trainer.precision_plugin.forward_context()


def hand_over(batch: Any, module: nn.Module, device: torch.device, trainer: pl.Trainer | None = None) -> Any:
    """A batch of a loader on ``device``, as the loops of the run of ``module`` would hand it over.

    Floating-point tensors take the dtype of the module's weights. Outside of a run nothing else happens to them.

    Args:
        batch: what a loader gave.
        module: that takes it.
        device: where to put it.
        trainer: whose run it is where nobody else told, as in a ``trainer.fit`` of one's own.
    """
    run = _RUN.get()
    if run is None and trainer is not None and trainer.strategy.lightning_module is module:
        run = _Run(trainer, module, datamodule_of(trainer))
    if run is None or run.module is not module or not hasattr(module, _HOOKS[0]):
        return to_device(batch, device, module)
    batch = to_device(batch, None, module)
    for hook in _HOOKS:
        owner = run.stream if _overrides(run.stream, hook) else module
        batch = getattr(owner, hook)(batch, *((device, 0) if hook == "transfer_batch_to_device" else (0,)))
    return batch


def _overrides(stream: Any, hook: str) -> bool:
    """Whether a data module has a hook of its own, which goes before the module's."""
    function = getattr(type(stream), hook, None)
    return function is not None and not function.__module__.startswith(("pytorch_lightning.", "lightning."))


def to_device(batch: Any, device: torch.device | None, like: nn.Module | None = None) -> Any:
    """A batch with its tensors on ``device``; tuples, namedtuples, lists and dicts are followed.

    Args:
        batch: what a loader gave.
        device: where to put it; None leaves it where it is.
        like: floating-point tensors also take the dtype of this module's weights, as Lightning's "bf16-true" does.
    """
    dtype = None if like is None else next((p.dtype for p in like.parameters() if p.is_floating_point()), None)

    def move(item: Any) -> Any:
        if isinstance(item, Tensor):
            wanted = dtype if item.is_floating_point() else None
            return item.to(device or item.device, wanted or item.dtype, non_blocking=True)
        if isinstance(item, dict):
            return {k: move(v) for k, v in item.items()}
        if isinstance(item, tuple) and hasattr(item, "_fields"):
            return type(item)(*(move(v) for v in item))  # a namedtuple takes its fields one by one
        if isinstance(item, tuple | list):
            return type(item)(move(v) for v in item)
        return item

    return move(batch)
