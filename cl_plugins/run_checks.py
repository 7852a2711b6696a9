"""What :func:`cl_plugins.fit_stream` refuses before anything is trained."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from cl_plugins.task import Stream, check_tasks

if TYPE_CHECKING:
    import pytorch_lightning as pl

_SHARDED = ("FSDP", "DeepSpeed", "ModelParallel", "XLAFSDP")
_OF_A_STREAM = ("name", "tasks", "n_classes", "class_order", "train_dataloader", "test_loader")


def _check_kinds(trainer: Any, module: Any, stream: Any) -> None:
    order = "; call fit_stream(trainer, module, stream)"
    if not hasattr(trainer, "fit_loop"):
        raise TypeError(f"`trainer` must be a Trainer, got {type(trainer).__name__}{order}")
    if not isinstance(module, nn.Module):
        raise TypeError(f"`module` must be a LightningModule, got {type(module).__name__}{order}")
    lacking = [name for name in _OF_A_STREAM if not hasattr(stream, name)]
    if lacking:
        raise TypeError(
            "`stream` must be a stream of tasks, such as ClassIncremental(data, n_tasks=5) of cl_plugins.scenarios, got"
            f" {type(stream).__name__} without {', '.join(f'`{n}`' for n in lacking)}{order}"
        )


def refuse(trainer: pl.Trainer, module: pl.LightningModule, stream: Stream) -> None:
    """Arguments and settings that would train something else than asked, said before anything is trained.

    Raises:
        TypeError: for arguments of another kind.
        ValueError: for settings that cannot work with a stream, and for faulty streams.
    """
    _check_kinds(trainer, module, stream)
    short = getattr(trainer, "fast_dev_run", False)
    if short:
        raise ValueError(
            "`fast_dev_run` ends training after its first batches, whatever the task,"
            f" got {short!r}; use `limit_train_batches=1, max_epochs=1`"
        )
    if trainer.max_steps != -1:
        raise ValueError(
            f"`max_steps` counts over the whole stream and would end training inside a task, got {trainer.max_steps!r};"
            " set `max_epochs` (epochs per task) and `limit_train_batches` instead"
        )
    reload_every = getattr(trainer, "reload_dataloaders_every_n_epochs", 0)
    if reload_every:
        raise ValueError(
            "`reload_dataloaders_every_n_epochs` must be 0, since the stream gives each task its own loader,"
            f" got {reload_every!r}"
        )
    refuse_strategy(trainer)
    check_tasks(stream.tasks, shared_classes=bool(getattr(stream, "shared_classes", False)))
    too_large = max(max(t.classes) for t in stream.tasks)
    if stream.n_classes <= too_large:
        raise ValueError(f"`stream.n_classes` must cover class {too_large}, got {stream.n_classes!r}")


def refuse_strategy(trainer: pl.Trainer) -> None:
    """Ways of several processes after which a task's end would not find the whole weights.

    Raises:
        ValueError: for strategies that shard weights or spawn processes.
    """
    kind = type(trainer.strategy).__name__
    if kind.startswith(_SHARDED):
        raise ValueError(
            f"`strategy` must leave whole weights on each process, got {kind}, which keeps shards of them when a fit"
            " ends: between tasks classifiers are masked, adapters grow and old tasks are evaluated; use strategy='ddp'"
        )
    launcher = getattr(trainer.strategy, "launcher", None)
    if launcher is not None and type(launcher).__name__.startswith("_MultiProcessing"):
        raise ValueError(
            "`strategy` must not spawn processes, because what they learn is lost when a task ends,"
            f" got {type(trainer.strategy).__name__} with a spawn or fork launcher; use strategy='ddp' and torchrun"
        )


def check_forward(module: nn.Module) -> None:
    """Refuse a module that the evaluation could not call, before hours are trained; told by its signature alone.

    Raises:
        TypeError: when ``forward`` is missing, or needs more than the inputs of a batch.
    """
    found = vars(module).get("forward", type(module).forward)
    if getattr(found, "__module__", "").split(".")[0] in ("pytorch_lightning", "lightning"):
        raise _no_logits(f"a {type(module).__name__} without `forward`")
    try:
        inspect.signature(module.forward).bind(None)
    except TypeError as error:
        raise _no_logits(f"a `forward` that cannot be called so: {error}") from None


def _no_logits(got: str) -> TypeError:
    return TypeError(
        "`forward` must give logits `(batch, classes)` for `batch[0]` (for the whole batch where it is a dict), got"
        f" {got}; or pass `predict=lambda module, batch: ...` to fit_stream"
    )
