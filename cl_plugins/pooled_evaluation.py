"""Counting correct predictions of many tasks in one pass: one loader over their data, numbered through.

A loader per task starts and ends once per task, and each leaves a last, smaller batch; with a thousand tasks of a few
samples that costs more than the model. Here batches mix tasks, and integer counts are added per task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from cl_plugins.attach import known_classes
from cl_plugins.evaluation import (
    Predict,
    default_predict,
    evaluating,
    evaluation_tasks,
    forward_setting,
    seen_classes,
    split_batch,
)
from cl_plugins.task import Stream

if TYPE_CHECKING:
    import pytorch_lightning as pl


class Counts(NamedTuple):
    """Integers per task.

    Attributes:
        correct: correct predictions, by task; tasks without a sample are left out.
        total: samples, or labels where samples have several.
        correct_in_task: correct predictions when the choice is among the task's own classes.
    """

    correct: dict[int, int]
    total: dict[int, int]
    correct_in_task: dict[int, int]


def _join(parts: Sequence[Any]) -> Any:
    """One batch out of several of the same form: tensors and lists end to end."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(parts))
    if isinstance(first, dict):
        return {k: _join([part[k] for part in parts]) for k in first}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(_join(items) for items in zip(*parts, strict=True)))
    if isinstance(first, tuple):
        return tuple(_join(items) for items in zip(*parts, strict=True))
    if isinstance(first, list) and any(isinstance(item, Tensor) for item in first):
        return [_join(items) for items in zip(*parts, strict=True)]
    if isinstance(first, list):
        return [item for part in parts for item in part]
    raise TypeError(
        f"a batch must be made of tensors, lists, tuples and dicts to be joined, got {type(first).__name__}"
    )


class _Pool(Dataset[Any]):
    """The data of several loaders, numbered through; gives ``(task of each sample, batch)``."""

    def __init__(self, loaders: Mapping[int, DataLoader[Any]]) -> None:
        self.tasks = sorted(loaders)
        self.parts: list[tuple[Any, Any]] = [(loaders[t].dataset, loaders[t].collate_fn) for t in self.tasks]
        sizes = [len(dataset) for dataset, _ in self.parts]
        self.task_of = np.array(self.tasks, np.int64)
        # data sets that can be read as one: a run of few samples costs as much as a whole batch otherwise
        join = getattr(self.parts[0][0], "joined", None)
        self.whole = None if join is None else join([dataset for dataset, _ in self.parts])
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def numbers(self, task: int) -> NDArray[np.int64]:
        """The samples of a task."""
        place = self.tasks.index(task)
        return np.arange(self.starts[place], self.starts[place + 1])

    def __getitem__(self, number: int) -> Any:
        return self.__getitems__([number])

    def __getitems__(self, numbers: Sequence[int]) -> Any:
        """A batch; neighbors of one task are read together."""
        asked = np.asarray(numbers, np.int64)
        places = np.searchsorted(self.starts, asked, side="right") - 1
        if self.whole is not None:
            return torch.from_numpy(self.task_of[places]), self.parts[0][1](self.whole.__getitems__(list(numbers)))
        cuts = np.flatnonzero(np.diff(places)) + 1
        owners, runs = [], []
        for part, place in zip(np.split(asked, cuts), places[np.r_[0, cuts]].tolist(), strict=True):
            dataset, _ = self.parts[place]
            own = (part - self.starts[place]).tolist()
            read = getattr(dataset, "__getitems__", None)
            runs.append([dataset[i] for i in own] if read is None else read(own))
            owners.append(place)
        collate = self.parts[owners[0]][1]
        if all(type(run) is list for run in runs):
            counts = [len(run) for run in runs]  # fewer than asked where unreadable samples are skipped
            batch = collate([sample for run in runs for sample in run])
        else:  # a data set that makes whole batches itself
            batches = [self.parts[place][1](run) for place, run in zip(owners, runs, strict=True)]
            counts = [len(split_batch(made)[1]) for made in batches]
            batch = _join(batches)
        tasks = torch.tensor([self.tasks[place] for place in owners])
        return tasks.repeat_interleave(torch.tensor(counts)), batch


class _Batches:
    """A batch sampler whose samples may be replaced between two passes, while workers live on."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.numbers = np.zeros(0, np.int64)

    def __iter__(self) -> Iterator[list[int]]:
        return (self.numbers[i : i + self.size].tolist() for i in range(0, len(self.numbers), self.size))

    def __len__(self) -> int:
        return -(-len(self.numbers) // self.size)


def _as_is(batch: Any) -> Any:
    return batch


class PooledLoader:
    """One loader over the data of several tasks, for any choice among them.

    The data sets of the tasks' own loaders are read by index; the samplers of those loaders are not asked.

    Args:
        loaders: of the tasks, by their index, with batch size and collate function alike.
        max_samples: per task, at most so many samples, drawn once and for all; None for all.
        seed: for that choice.
        rank: which share of each choice to give.
        world_size: number of shares; they differ by one sample at most.

    Raises:
        TypeError: for a loader whose data have no items by index.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = [TensorDataset(torch.zeros(n, 2), torch.full((n,), n)) for n in (3, 2)]
        >>> pool = PooledLoader({t: DataLoader(d, batch_size=4) for t, d in enumerate(data)})
        >>> [(tasks.tolist(), batch[1].tolist()) for tasks, batch in pool.batches([0, 1])]
        [([0, 0, 0, 1], [3, 3, 3, 2]), ([1], [2])]
    """

    def __init__(
        self,
        loaders: Mapping[int, DataLoader[Any]],
        *,
        max_samples: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for task, loader in loaders.items():
            if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
                raise TypeError(
                    f"the data of task {task} must have items by index and a batch size to be evaluated inside tasks,"
                    f" got {type(loader.dataset).__name__}"
                )
        self.pool = _Pool(loaders)
        self.rank, self.world_size = rank, world_size
        self._chosen: dict[int, NDArray[np.int64]] = {}
        for task in self.pool.tasks:
            numbers = self.pool.numbers(task)
            if max_samples is not None and len(numbers) > max_samples:
                numbers = np.sort(np.random.default_rng([seed, task]).choice(numbers, max_samples, replace=False))
            self._chosen[task] = numbers
        first: Any = loaders[self.pool.tasks[0]]
        self._sampler = _Batches(first.batch_size or first.batch_sampler.batch_size)
        workers = {name: getattr(first, name) for name in ("timeout", "worker_init_fn", "multiprocessing_context")} | {
            "prefetch_factor": first.prefetch_factor,
            "persistent_workers": True,
        }
        self._loader: DataLoader[Any] = DataLoader(
            self.pool,
            batch_sampler=self._sampler,
            collate_fn=_as_is,
            num_workers=first.num_workers,
            pin_memory=first.pin_memory,
            generator=torch.Generator().manual_seed(seed),  # the global one must not advance
            **(workers if first.num_workers else {}),
        )

    @property
    def tasks(self) -> list[int]:
        """The tasks whose data are here."""
        return self.pool.tasks

    def whole(self, task: int) -> bool:
        """Whether all samples of a task are evaluated."""
        return len(self._chosen[task]) == len(self.pool.numbers(task))

    def batches(self, tasks: Sequence[int]) -> Iterator[tuple[Tensor, Any]]:
        """The task of each sample ``(batch,)`` int64 and the batch, over this process's share of ``tasks``."""
        numbers = [self._chosen[task] for task in sorted(tasks)]
        joined = np.concatenate(numbers) if numbers else np.zeros(0, np.int64)
        self._sampler.numbers = joined[self.rank :: self.world_size]
        yield from self._loader


def sample_counts(logits: Tensor, labels: Tensor, own: Tensor, seen: Tensor) -> Tensor:
    """What :func:`cl_plugins.evaluation.count_task` counts, by sample.

    Args:
        logits: ``(batch, classes)``.
        labels: ``(batch,)`` int64, or ``(batch, classes)`` with 1 where a class is present.
        own: ``(batch, classes)`` bool, the classes of each sample's task.
        seen: ``(classes,)`` bool, classes that a prediction may name.

    Returns:
        ``(3, batch)`` int64: correct, total, correct among the task's own classes.
    """
    if labels.ndim == 1:
        predicted = logits.masked_fill(~seen, -torch.inf).argmax(1)
        among_own = logits.masked_fill(~own, -torch.inf).argmax(1)
        return torch.stack([predicted == labels, torch.ones_like(labels, dtype=torch.bool), among_own == labels]).long()
    present = labels[:, : logits.shape[1]] == 1
    of_task = present & own
    wanted, asked = of_task.sum(1, keepdim=True), (present & seen).sum(1, keepdim=True)

    def rank(allowed: Tensor) -> Tensor:
        return logits.masked_fill(~allowed, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(1)

    found, found_own = of_task & (rank(seen) < asked), of_task & (rank(own) < wanted)
    return torch.stack([found.sum(1), wanted[:, 0], found_own.sum(1)])


@contextmanager
def _first_process_buffers(module: nn.Module) -> Iterator[None]:
    """Every process has rank 0's buffers inside, as its own last batch left statistics of its own; theirs return."""
    own = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        for buffer, _ in own:
            first = buffer.detach().contiguous()
            torch.distributed.broadcast(first, 0)
            buffer.detach().copy_(first)
        yield
    finally:
        for buffer, before in own:
            buffer.detach().copy_(before)


def evaluate_pooled(
    module: nn.Module,
    stream: Stream,
    loader: PooledLoader,
    tasks: Sequence[int],
    upto: int,
    *,
    trainer: pl.Trainer | None = None,
    predict: Predict = default_predict,
) -> Counts:
    """Counts of several tasks in one pass; predictions may name any class up to task ``upto``.

    With several processes each counts its share and the counts are added.

    Args:
        module: the model; its modes are restored, and the buffers of every process.
        stream: gives the tasks' classes.
        loader: holds the data of ``tasks``.
        tasks: indices of :func:`cl_plugins.evaluation.evaluation_tasks`.
        upto: the task that is being trained.
        trainer: for device, precision and processes.
        predict: gives the logits of a batch.

    Raises:
        ValueError: when the head has fewer outputs than the stream has classes in ``tasks``.
    """
    columns = evaluation_tasks(stream)
    device, precision, move = forward_setting(module, trainer)
    seen = seen_classes(stream, upto).to(device)
    pairs = [(task, c) for task in tasks for c in columns[task].classes]
    own = torch.zeros(len(columns), stream.n_classes, dtype=torch.bool)
    own[tuple(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T)] = True
    own = own.to(device)
    least = max((max(columns[task].classes) for task in tasks), default=-1)
    counts = torch.zeros(3, len(columns), dtype=torch.int64, device=device)
    shared = trainer is not None and trainer.world_size > 1 and torch.distributed.is_initialized()
    with evaluating(module), precision, _first_process_buffers(module) if shared else torch.no_grad():
        for owners, batch in loader.batches(tasks):
            of_task = owners.to(device, non_blocking=True)
            moved = move(batch)
            _, labels = split_batch(moved)
            with known_classes(module, own[of_task]) if labels.ndim == 1 else nullcontext():
                logits = predict(module, moved)[:, : stream.n_classes]
            if logits.shape[1] <= least:
                raise ValueError(
                    f"the head must have a row for every class, got {logits.shape[1]} outputs for class {least};"
                    f" build the model with {stream.n_classes} outputs"
                )
            width = logits.shape[1]
            counts.index_add_(1, of_task, sample_counts(logits, labels, own[of_task, :width], seen[:width]))
    if shared:
        torch.distributed.all_reduce(counts)
    table = counts.tolist()
    measured = [t for t in tasks if table[1][t] > 0]
    correct, total, correct_own = ({t: int(line[t]) for t in measured} for line in table)
    return Counts(correct, total, correct_own)
