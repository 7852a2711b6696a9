"""Training over a stream: one Trainer, one ``fit`` per task, the accuracy matrix row by row.

A loop of your own needs no more than this (``fit_stream`` adds the refusals, the seeds and the resume):

    for task in stream.tasks:
        start_task(trainer, module, stream, task.index)
        trainer.fit(module, datamodule=stream)
        row = end_task(trainer, module, stream, task.index)
"""

from __future__ import annotations

import copy
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from cl_plugins._lightning import Callback, callbacks_of
from cl_plugins.batches import passes_of
from cl_plugins.composition import check_composition
from cl_plugins.evaluation import Predict, default_predict, drawn_columns, evaluate_tasks
from cl_plugins.plugin import ContinualCallback, Row, plugins_of, tell_row
from cl_plugins.result import StreamResult
from cl_plugins.resuming import find_checkpoint, load_own_weights, restore_between, savers_of, say_where
from cl_plugins.run_checks import check_forward, refuse, refuse_strategy
from cl_plugins.stream_checkpoint import KIND, StreamStopped
from cl_plugins.stream_state import StreamState, restore_result
from cl_plugins.task import Stream

if TYPE_CHECKING:
    import pytorch_lightning as pl

_EXPECTED_WARNINGS = (  # said once per task, about what is meant to be so
    r".*You passed in a `val_dataloader` but have no `validation_step`.*",
    r".*Total length of `list` across ranks is zero.*",
    r".*module\(s\) in eval mode at the start of training.*",
    r".*Checkpoint directory .* exists and is not empty.*",
)
_RESET_BETWEEN_TASKS = ("EarlyStopping", "ModelCheckpoint")


@contextmanager
def task_seed(seed: int, task: int, purpose: int = 0) -> Iterator[None]:
    """Run the block with torch's random state seeded by ``(seed, task, purpose)``; outside it stays as it was."""
    with torch.random.fork_rng():
        torch.manual_seed((seed * 1_000_003 + task * 8_191 + purpose) % (1 << 63))
        yield


class _LossGuard(Callback):
    """Stops at the end of the epoch in which the loss became NaN or infinite, without a host sync per batch."""

    def __init__(self) -> None:
        self._bad: Tensor | None = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            bad = ~torch.isfinite(loss.detach()).all()
            self._bad = bad if self._bad is None else self._bad | bad

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.raise_if_not_finite(trainer)

    def raise_if_not_finite(self, trainer: Any) -> None:
        """Raise when a loss since the last call was NaN or infinite; also asked for before each checkpoint."""
        bad, self._bad = self._bad, None
        if bad is not None and bool(bad):
            raise FloatingPointError(
                f"the training loss must stay finite, got NaN or infinity in epoch {trainer.current_epoch} of this"
                " task; lower the learning rate or clip the gradients; finished tasks are recorded, and no checkpoint"
                " was written with these weights"
            )


def _initial_states(trainer: pl.Trainer) -> dict[int, dict[str, Any]]:
    return {
        id(c): copy.deepcopy(c.state_dict())
        for c in callbacks_of(trainer)
        if any(base.__name__ in _RESET_BETWEEN_TASKS for base in type(c).__mro__)
    }


def _restore_states(trainer: pl.Trainer, states: dict[int, dict[str, Any]]) -> None:
    for callback in callbacks_of(trainer):
        if id(callback) in states:
            state = copy.deepcopy(states[id(callback)])
            if "dirpath" in state:
                state["dirpath"] = callback.dirpath  # the first fit may have chosen it; from another one none is loaded
            callback.load_state_dict(state)


def start_task(trainer: pl.Trainer, module: pl.LightningModule, stream: Stream, index: int, seed: int = 0) -> None:
    """Make the stream, the Trainer and its plugins ready for ``trainer.fit`` on one task.

    Args:
        trainer: its ``max_epochs`` counts per task.
        module: the user's module; plugins grow it here, before its optimizer exists.
        stream: gives the data; passed to ``fit`` as ``datamodule``.
        index: the task.
        seed: for what plugins draw when they grow.

    Raises:
        ValueError: for strategies that shard weights or spawn processes.
    """
    refuse_strategy(trainer)
    check_composition(plugins_of(trainer), module)
    stream.task = index
    _begin_anew(trainer)
    with task_seed(seed, index), passes_of(trainer, module, stream):
        for plugin in plugins_of(trainer):
            plugin.on_task_start(trainer, module, stream.tasks[index])


def _begin_anew(trainer: pl.Trainer) -> None:
    """The Trainer's loops as before a first fit; its optimizer steps go on counting."""
    epochs, batches = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epochs.epoch_progress.reset()  # without it a second fit does nothing, silently
    if batches.restarting:
        # a checkpoint of Lightning's own from behind the last step: its fit ended before it could count that step
        batches.batch_progress.total.completed = batches.batch_progress.total.ready
        batches._batches_that_stepped += 1
    epochs.restarting = False
    for loop in (epochs, batches, batches.val_loop):
        loop.on_iteration_done()


def end_task(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    stream: Stream,
    index: int,
    *,
    future: bool = False,
    predict: Predict = default_predict,
    columns: Sequence[int] | None = None,
) -> Row:
    """Let the plugins finish the task and evaluate all tasks so far, or those of them that ``columns`` names.

    Returns:
        The row of the accuracy matrix, as counts.
    """
    with passes_of(trainer, module, stream):
        with task_seed(0, index, purpose=1):
            for plugin in plugins_of(trainer):
                plugin.on_task_end(trainer, module, stream.tasks[index])
        row = evaluate_tasks(module, stream, index, trainer=trainer, future=future, predict=predict, columns=columns)
        tell_row(trainer, module, row)
    return row


@contextmanager
def _tell_failures(trainer: pl.Trainer, module: pl.LightningModule, plugins: list[ContinualCallback]) -> Iterator[None]:
    """Let the plugins close what they opened when growing or evaluating fails; inside ``fit`` Lightning does it."""
    try:
        yield
    except BaseException as error:  # Ctrl-C as well; it goes on to the caller
        if not trainer.interrupted:
            for plugin in plugins:
                try:
                    plugin.on_exception(trainer, module, error)
                except Exception as second:  # what failed first is what must be seen
                    name = type(plugin).__name__
                    warnings.warn(f"{name} could not close what it opened: {second!r}", stacklevel=2)
        raise


def _needs_fit(plugins: list[ContinualCallback]) -> bool:
    kinds = {p.training for p in plugins}
    return "required" in kinds or "none" not in kinds


def _fit(trainer: pl.Trainer, module: pl.LightningModule, stream: Stream, index: int, resume: Path | None) -> None:
    """``trainer.fit`` on the current task; an interruption comes out as KeyboardInterrupt."""
    on_interrupt = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        for message in _EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message)
        try:
            # Lightning types the two packages' data modules apart
            trainer.fit(module, datamodule=cast("Any", stream), ckpt_path=None if resume is None else str(resume))
        except StreamStopped:
            raise
        except SystemExit:
            if not trainer.interrupted:
                raise
            signal.signal(signal.SIGINT, on_interrupt)  # Lightning leaves the signal ignored
    _same_buffers(trainer, module)
    if trainer.interrupted:
        raise KeyboardInterrupt(f"training was stopped in task {index}; finished tasks are recorded")


def _same_buffers(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Give every process rank 0's buffers: each one's last batch left batch statistics of its own."""
    if trainer.world_size > 1 and torch.distributed.is_initialized():
        for buffer in module.buffers():
            on_device = buffer.to(trainer.strategy.root_device).contiguous()  # the fit's end moved it to the CPU
            torch.distributed.broadcast(on_device, 0)
            buffer.copy_(on_device)


def fit_stream(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    stream: Stream,
    ckpt_path: str | Path | None = None,
    *,
    seed: int = 0,
    evaluate_initial: bool = False,
    evaluate_future: bool = False,
    evaluate_old: int | None = None,
    predict: Predict = default_predict,
) -> StreamResult:
    """Train ``module`` on one task after the other and evaluate it on all tasks so far after each.

    Args:
        trainer: a Trainer of ``pytorch_lightning`` or ``lightning.pytorch``; ``max_epochs`` is per task. Its callbacks
            may be any mix of Lightning's own and this library's.
        module: the user's module; it needs no more than ``training_step`` and ``configure_optimizers``.
        stream: the tasks, a :class:`cl_plugins.scenarios.TaskStream` or anything like it.
        ckpt_path: continue from this checkpoint, inside a task or between two; ``"last"`` for the newest.
        seed: for what plugins draw at a task's start (new prompts, new experts).
        evaluate_initial: evaluate all tasks before any training, for forward transfer.
        evaluate_future: evaluate tasks that are not learned yet as well, for transfer metrics.
        evaluate_old: after each task but the last evaluate the newest task and so many old ones, drawn by ``seed``, so
            that a stream of hundreds of tasks does not evaluate half of their square; the other cells are NaN. Average
            accuracy, learning accuracy and backward transfer read none of these cells; what does, forgetting and the
            average over rows, is NaN then. None evaluates all old tasks.
        predict: gives the logits ``(batch, classes)`` of a batch; the default is the stream's own ``predict`` where
            it has one, as streams of text do, and else calls ``module(x)``; methods that route test samples, such as
            :class:`~cl_plugins.callbacks.TaskGroups`, do so around the default and leave a given one alone.

    Returns:
        The accuracy matrix as counts, and the numbers that follow from it.

    Raises:
        TypeError: for arguments that are no Trainer, no module or no stream of tasks, and for a module whose
            ``forward`` cannot be called with a batch's inputs where ``predict`` is the default.
        ValueError: for settings that cannot work with a stream, and for faulty streams, before any training.
        FloatingPointError: when the loss becomes NaN or infinite.
        StreamStopped: behind the save on SIGTERM, with a :class:`~cl_plugins.callbacks.StreamCheckpoint`.
    """
    refuse(trainer, module, stream)
    check_composition(plugins_of(trainer), module)
    if evaluate_old is not None:
        drawn_columns(stream, 0, evaluate_old, seed)  # refused now and not after the first task
    own_predict = predict is default_predict
    if own_predict:
        predict = getattr(stream, "predict", default_predict)
    if predict is default_predict:
        check_forward(module)
    callbacks = callbacks_of(trainer)
    state = next((c for c in callbacks if isinstance(c, StreamState)), None)
    if state is None:
        state = StreamState()
        callbacks.insert(0, state)
    if not any(isinstance(c, _LossGuard) for c in callbacks):
        callbacks.insert(0, _LossGuard())  # before what saves
    result = StreamResult.for_stream(stream)
    state.begin(stream, result)
    state.predict = predict
    first, resume, spent, between = 0, None, 0.0, None
    if ckpt_path is not None:
        resume = find_checkpoint(trainer, ckpt_path)
        saved, checkpoint = state.read(resume)
        first, spent = saved["task"], saved.get("spent", 0.0)
        say_where(trainer, resume, first, checkpoint["global_step"])
        restore_result(result, saved)
        between = checkpoint if KIND in checkpoint else None
        if between is None:
            load_own_weights(module, checkpoint["state_dict"])
        del checkpoint
    plugins, savers = plugins_of(trainer), savers_of(trainer)
    with ExitStack() as stack:
        for saver in savers:
            stack.enter_context(saver.watch())
        stack.enter_context(_tell_failures(trainer, module, plugins))
        stack.enter_context(passes_of(trainer, module, stream))
        for plugin in plugins:
            plugin.on_stream_start(trainer, module, stream)
        if own_predict:
            for plugin in plugins:
                predict = plugin.predictor(predict)
        if evaluate_initial and resume is None:
            result.initial = evaluate_tasks(module, stream, -1, trainer=trainer, predict=predict)
            tell_row(trainer, module, result.initial)
        initial = _initial_states(trainer)
        if between is not None:
            restore_between(trainer, module, stream, between, plugins)
            state.restore_random_states(trainer)
            resume = between = None
        for index in range(first, len(stream.tasks)):
            _restore_states(trainer, initial)
            state.task = index
            started = state.started = time.perf_counter() - spent
            spent = 0.0
            start_task(trainer, module, stream, index, seed)
            result.trainable_parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
            if _needs_fit(plugins):
                _fit(trainer, module, stream, index, resume)
            else:
                trainer.strategy.connect(module)  # as a fit does, for `trainer.save_checkpoint`
                if resume is not None:
                    state.load_weights(module, resume)
            resume = None
            columns = None if evaluate_old is None else drawn_columns(stream, index, evaluate_old, seed)
            row = end_task(trainer, module, stream, index, future=evaluate_future, predict=predict, columns=columns)
            result.train_seconds.append(time.perf_counter() - started - row.seconds)
            result.add(row)
            state.task, state.started = index + 1, None
            for saver in savers:
                saver.save_between(trainer, module, stream, index + 1)
        for plugin in plugins:
            plugin.on_stream_end(trainer, module, result)
    return result
