"""Counting correct predictions per task: integers on the device, one read per task, no padded duplicates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cl_plugins.attach import known_classes
from cl_plugins.batches import hand_over
from cl_plugins.label_scores import SeenLabelScores
from cl_plugins.plugin import Row, module_device
from cl_plugins.task import Stream, Task
from cl_plugins.task_sampling import draw_tasks

if TYPE_CHECKING:
    import pytorch_lightning as pl

Predict = Callable[[nn.Module, Any], Tensor]


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Inputs and labels of a batch: ``(x, y, ...)``, or a dict with "label", "labels" or "y".

    Raises:
        TypeError: for anything else.
    """
    if isinstance(batch, tuple | list) and len(batch) >= 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    if isinstance(batch, dict):
        key = next((k for k in ("label", "labels", "y") if k in batch), None)
        if key is not None:
            return batch, batch[key]
    raise TypeError(
        f"`batch` must be (x, y) or a dict with the key 'label', 'labels' or 'y', got {type(batch).__name__}"
    )


def logits_of(output: Any) -> Tensor:
    """Logits ``(batch, classes)`` of a model's output.

    Args:
        output: a tensor, something with ``logits`` as attribute or key, or a sequence whose first item they are.

    Raises:
        TypeError: when there are none.
    """
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple | list) and output:
        logits = output[0]
    if isinstance(logits, Tensor):
        return logits
    raise TypeError(f"the module's output must be logits or hold them as 'logits', got {type(output).__name__}")


def default_predict(module: nn.Module, batch: Any) -> Tensor:
    """Logits of ``module(x)``, for a batch ``(x, y)``; a dict batch is passed whole."""
    inputs, _ = split_batch(batch)
    return logits_of(module(inputs))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; each submodule's own mode and the gradient switch as before after it."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m, training in modes.items():
            m.training = training


def count_task(
    module: nn.Module,
    batches: Iterable[Any],
    task: Task,
    owner: Tensor,
    seen: Tensor,
    *,
    n_tasks: int,
    predict: Predict = default_predict,
    label_scores: SeenLabelScores | None = None,
    earlier: Sequence[int] = (),
) -> Tensor:
    """Counts of one task's test data.

    Args:
        module: in eval mode, on the device of the batches.
        batches: on the same device.
        task: the one the data belong to.
        owner: ``(classes,)`` int64, the task that teaches a class.
        seen: ``(classes,)`` bool, classes that a prediction may name.
        n_tasks: tasks in the stream.
        predict: gives logits ``(batch, classes)``.
        label_scores: gets the logits of multi-label batches, too.
        earlier: classes of the tasks that it got before.

    Returns:
        int64 ``(3 + n_tasks,)``: correct, total, correct among the task's own classes, then predictions per task.
    """
    device = owner.device
    counts = torch.zeros(3 + n_tasks, dtype=torch.int64, device=device)
    own = torch.as_tensor(task.classes, device=device)
    known = torch.zeros(1, len(owner), dtype=torch.bool, device=device).index_fill_(1, own, True)
    for batch in batches:
        _, labels = split_batch(batch)
        with known_classes(module, known) if labels.ndim == 1 else nullcontext():
            logits = predict(module, batch)[:, : len(owner)]
        if logits.shape[1] <= max(task.classes):
            raise ValueError(
                f"the head must have a row for every class, got {logits.shape[1]} outputs for class"
                f" {max(task.classes)}; build the model with {len(owner)} outputs"
            )
        if labels.ndim == 2:
            counts += _count_labels(logits, labels, own, owner, seen, n_tasks)
            if label_scores is not None:
                label_scores.update(logits, labels[:, : logits.shape[1]], earlier)
            continue
        hidden = ~seen[: logits.shape[1]]
        predicted = logits.masked_fill(hidden, -torch.inf).argmax(1)
        counts[0] += (predicted == labels).sum()
        counts[1] += len(labels)
        counts[2] += (own[logits[:, own].argmax(1)] == labels).sum()
        counts[3:] += torch.bincount(owner[predicted], minlength=n_tasks)
    return counts


def _count_labels(logits: Tensor, targets: Tensor, own: Tensor, owner: Tensor, seen: Tensor, n_tasks: int) -> Tensor:
    """Counts of a multi-label batch, by labels instead of samples.

    An image with k labels among the seen classes gets k predictions, its k highest scores there. A label of the task is
    correct when it is among them; with one label an image this is the accuracy. The predictions per task are those of
    the image's first m, with m its labels of this task, so that they sum to the total.

    Args:
        logits: ``(batch, classes)``.
        targets: ``(batch, classes)``, 1 where a class is present.
        own: the task's classes.
        owner: ``(classes,)`` the task that teaches a class.
        seen: ``(classes,)`` bool.
        n_tasks: tasks in the stream.
    """
    width = logits.shape[1]
    present, allowed = targets[:, :width] == 1, seen[:width]
    of_task = present[:, own]
    wanted, asked = of_task.sum(1, keepdim=True), (present & allowed).sum(1, keepdim=True)
    rank = logits.masked_fill(~allowed, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
    rank_own = logits[:, own].argsort(dim=1, descending=True, stable=True).argsort(1)
    named = torch.bincount(owner[((rank < wanted).nonzero()[:, 1])], minlength=n_tasks)
    found, found_own = (of_task & (rank[:, own] < asked)).sum(), (of_task & (rank_own < wanted)).sum()
    return torch.cat([torch.stack([found, wanted.sum(), found_own]), named])


def evaluation_tasks(stream: Stream) -> Sequence[Task]:
    """The columns of the accuracy matrix: the stream's ``evaluation_tasks`` when it has some, else its tasks."""
    return getattr(stream, "evaluation_tasks", None) or stream.tasks


def learned_after(stream: Stream, task: int) -> int:
    """How many columns have been learned once ``task`` is finished."""
    tell = getattr(stream, "learned_after", None)
    return int(tell(task)) if callable(tell) else task + 1


def taught_columns(stream: Stream, task: int) -> range:
    """The columns that ``task`` teaches: those learned with it and not before; none where tasks add no column."""
    return range(learned_after(stream, task - 1) if task else 0, learned_after(stream, task))


def seen_classes(stream: Stream, upto: int) -> Tensor:
    """Which classes a prediction may name once task ``upto`` is learned, ``(classes,)`` bool.

    Args:
        stream: gives the tasks.
        upto: index of the task that was trained last; -1 lets predictions name every class.
    """
    tasks = evaluation_tasks(stream)
    everything = upto < 0 or bool(getattr(stream, "open_vocabulary", False))
    learned = len(tasks) if everything else learned_after(stream, upto)
    seen = torch.zeros(stream.n_classes, dtype=torch.bool)
    seen[[c for t in tasks if t.index < learned for c in t.classes]] = True
    return seen


def drawn_columns(stream: Stream, task: int, count: int, seed: int) -> list[int]:
    """Which columns an evaluation after ``task`` covers when only some old ones are drawn.

    Args:
        stream: gives the columns.
        task: the one that was trained last; after the stream's last task no column is left out.
        count: old columns to draw; those that ``task`` teaches are always covered.
        seed: of the draws; each task draws anew.

    Raises:
        ValueError: for a count below 1, and on a multi-label stream, whose scores are over all labels at once.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"`evaluate_old` must be an integer of 1 or more, or None for all old tasks, got {count!r}")
    if getattr(stream, "modality", "") == "multi-label":
        raise ValueError(
            "`evaluate_old` must be None on a multi-label stream, whose scores are over the labels of all tasks,"
            f" got {count!r}"
        )
    taught = taught_columns(stream, task)
    if task == len(stream.tasks) - 1:
        return list(range(taught.stop))
    return [*draw_tasks(taught.start, count, seed, task), *taught]


def forward_setting(
    module: nn.Module, trainer: pl.Trainer | None
) -> tuple[torch.device, AbstractContextManager[Any], Callable[[Any], Any]]:
    """Where batches of an evaluation go: the device, the context of precision, and what moves a batch there."""
    if trainer is None:
        device = module_device(module)
        return device, nullcontext(), partial(hand_over, module=module, device=device)
    device = trainer.strategy.root_device
    module.to(device)  # Lightning moves the module to the CPU when a fit ends
    move = partial(hand_over, module=module, device=device, trainer=trainer)
    return device, trainer.precision_plugin.forward_context(), move


def evaluate_tasks(
    module: nn.Module,
    stream: Stream,
    upto: int,
    *,
    trainer: pl.Trainer | None = None,
    future: bool = False,
    predict: Predict = default_predict,
    columns: Sequence[int] | None = None,
) -> Row:
    """Accuracy on the test data of tasks 0 to ``upto``; predictions may name any class seen so far.

    On a stream with an ``open_vocabulary`` they may name every class, learned or not.

    With several processes each counts its own share of the test data and the counts are added, so the numbers are
    those of one process exactly.

    On a stream whose ``modality`` is "multi-label" the row also has the average precision and the counts of every seen
    class, see :class:`cl_plugins.label_scores.LabelScores`.

    Args:
        module: the model; its modes are restored.
        stream: gives the tasks and their test data.
        upto: index of the task that was trained last; -1 for none, which lets predictions name every class.
        trainer: for device, precision and processes; without one the module's own device is used.
        future: also evaluate tasks that are not learned yet.
        predict: gives the logits of a batch; the default calls the module.
        columns: evaluate these of the learned tasks alone, see :func:`drawn_columns`; None for all.

    Raises:
        ValueError: when a label of the data is not a class of its task's stream.
    """
    started = time.perf_counter()
    tasks = evaluation_tasks(stream)
    learned = len(tasks) if upto < 0 else learned_after(stream, upto)
    n = len(tasks)
    device, precision, move = forward_setting(module, trainer)
    owner = torch.zeros(stream.n_classes, dtype=torch.int64)
    for task in tasks:
        owner[list(task.classes)] = task.index
    owner, seen = owner.to(device), seen_classes(stream, upto).to(device)
    wanted = range(learned) if columns is None else columns
    chosen = [t for t in tasks if (t.index in wanted if t.index < learned else future)]
    counts = torch.zeros(n, 3 + n, dtype=torch.int64, device=device)
    learned_classes = [c for t in tasks if t.index < learned for c in t.classes]
    scores = None
    if getattr(stream, "modality", "") == "multi-label":
        scores = SeenLabelScores(sorted(set(learned_classes))).to(device)
    with evaluating(module), precision:
        earlier: list[int] = []
        for task in chosen:
            batches = (move(b) for b in stream.test_loader(task.index))
            keep = scores if task.index < learned else None
            counts[task.index] = count_task(
                module, batches, task, owner, seen, n_tasks=n, predict=predict, label_scores=keep, earlier=earlier
            )
            earlier += task.classes
    together = trainer is not None and trainer.world_size > 1 and torch.distributed.is_initialized()
    if together:
        torch.distributed.all_reduce(counts)
    labels = None if scores is None else scores.scores(gather=together)
    table = counts.cpu()
    measured = {t.index for t in chosen if int(table[t.index, 1]) > 0}

    def column(k: int) -> tuple[int | None, ...]:
        return tuple(int(table[i, k]) if i in measured else None for i in range(n))

    distinct = sum(len(t.classes) for t in tasks) == len({c for t in tasks for c in t.classes})
    confusion = tuple(map(tuple, table[:, 3:].tolist())) if distinct else ()
    return Row(upto, column(0), column(1), column(2), confusion, time.perf_counter() - started, labels)
