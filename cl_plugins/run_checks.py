"""What :func:`cl_plugins.fit_stream` refuses before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from cl_plugins.batches import hand_over, own_pass, passes_of
from cl_plugins.evaluation import default_predict, evaluating, split_batch
from cl_plugins.plugin import module_device
from cl_plugins.stream_state import same_randomness
from cl_plugins.task import Stream, check_tasks

if TYPE_CHECKING:
    import pytorch_lightning as pl

_SHARDED = ("FSDP", "DeepSpeed", "ModelParallel", "XLAFSDP")
_BUILD_LATER = ("setup", "configure_model", "on_fit_start")
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


def check_forward(trainer: pl.Trainer, module: nn.Module, stream: Stream) -> None:
    """Ask the module for the logits of two test samples, as the evaluation does, before hours are trained.

    Errors that may have other causes are left to come where they come; so are modules that Lightning has yet to build,
    and compiled ones. Random states, modes and devices stay as they were.

    Raises:
        TypeError: when it gives none.
    """
    hooks = [getattr(type(module), name, None) for name in _BUILD_LATER]
    if any(getattr(hook, "__module__", "").split(".")[0] not in ("pytorch_lightning", "lightning") for hook in hooks):
        return
    if any("_orig_mod" in m._modules or m._compiled_call_impl is not None for m in module.modules()):
        return
    with same_randomness(), evaluating(module), passes_of(trainer, module, stream), own_pass(module):
        batch = next(iter(stream.test_loader(0)), None)
        if batch is None:
            return
        _, labels = split_batch(batch)
        try:
            few = hand_over(_first(batch, len(labels)), module, module_device(module))
        except Exception:  # a transfer hook may need the Trainer's fit
            return
        try:
            logits = default_predict(module, few)
        except (NotImplementedError, TypeError, AttributeError) as error:
            if isinstance(error, AttributeError) and not isinstance(batch, dict):
                return
            raise _no_logits(f"{type(error).__name__}: {error}") from error
        except Exception:  # it may need the Trainer, or a device of another kind
            return
        if logits.ndim != 2:
            raise _no_logits(f"shape {tuple(logits.shape)} for {min(2, len(labels))} samples")


def _first(item: Any, n: int) -> Any:
    """The first two samples of a batch of ``n``."""
    if isinstance(item, Tensor):
        return item[:2] if item.ndim and len(item) == n else item
    if isinstance(item, dict):
        return {k: _first(v, n) for k, v in item.items()}
    if isinstance(item, tuple) and hasattr(item, "_fields"):
        return type(item)(*(_first(v, n) for v in item))
    if isinstance(item, tuple | list):
        texts = len(item) == n and all(isinstance(v, str) for v in item)
        return item[:2] if texts else type(item)(_first(v, n) for v in item)
    return item


def _no_logits(got: str) -> TypeError:
    return TypeError(
        "`forward` must give logits `(batch, classes)` for `batch[0]` (for the whole batch where it is a dict), got"
        f" {got}; or pass `predict=lambda module, batch: ...` to fit_stream"
    )
