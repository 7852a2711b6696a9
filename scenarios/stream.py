"""A stream of tasks as a LightningDataModule: flat indices into a data set, seeded orders, exact resume."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader
from typing_extensions import TypedDict

from cl_plugins._lightning import LightningDataModule
from cl_plugins.task import Task, check_tasks

from ._seeds import check_seed
from .data import Split, TaskView, Transform
from .sampler import EvenBatches, StreamLoader, TaskSampler


class LoaderOptions(TypedDict, total=False):
    """Keyword arguments of :class:`TaskStream` that every scenario passes on to it."""

    name: str
    train_transform: Transform | None
    eval_transform: Transform | None
    batch_size: int
    eval_batch_size: int
    num_workers: int
    pin_memory: bool
    drop_last: bool
    uneven: Literal["repeat", "drop"]
    collate_fn: Callable[[list[Any]], Any] | None
    single_pass: bool
    unreadable: Literal["stop", "skip"]


class TaskStream(LightningDataModule):
    """Gives the data of one task after the other; :func:`cl_plugins.fit_stream` trains over it.

    WHEN: ``train_dataloader`` and ``val_dataloader`` give the data of task :attr:`task`, which the runner sets before
    each ``Trainer.fit``. Without a Trainer the loaders work as they are.

    Args:
        tasks: in order.
        train: which training sample belongs to which task.
        test: the same for the samples of the evaluation.
        validation: the same for validation; None for none.
        name: for reports and checkpoints.
        class_order: labels in the order in which they are learned; None takes it from the tasks.
        seeds: what the stream was drawn with, by name; ``"data"`` orders and augments the samples.
        shared_classes: classes may stand in several tasks.
        evaluation_tasks: what ``test`` is grouped by, the columns of the accuracy matrix; None for ``tasks``.
        train_transform: for the inputs in training.
        eval_transform: for the inputs everywhere else.
        batch_size: in training, per process.
        eval_batch_size: everywhere else.
        num_workers: processes that prepare batches.
        pin_memory: prepare batches in page-locked memory, for a GPU.
        drop_last: leave out the last, smaller batch of an epoch.
        uneven: what training on several processes does with samples that do not divide by them: "repeat" up to
            ``processes - 1`` of them, those that come first in the epoch's order, or "drop" those that come last; which
            ones differs from epoch to epoch. Evaluation does neither.
        collate_fn: makes a batch of a list of samples; None stacks.
        single_pass: online learning, every training sample is given once; a second epoch is refused.
        unreadable: "stop" at a sample whose file cannot be read, or "skip" it with a warning.

    Raises:
        ValueError: for tasks that share classes or have no training samples, and for faulty numbers.

    Example:
        >>> from cl_plugins.scenarios import build_scenario
        >>> stream = build_scenario("split-digits", batch_size=16)
        >>> stream.task = 1
        >>> images, labels = next(iter(stream.train_dataloader()))
        >>> tuple(images.shape), sorted(set(labels.tolist()))
        ((16, 3, 32, 32), [2, 3])
    """

    name: str
    modality: str = "image"
    """What a sample is: "image", "multi-label" for images with several labels, "text", or "image-text" where classes
    have names to tell them by."""
    task_known: bool = False
    """Whether this stream's accuracy is that of a choice among the task's own classes."""
    open_vocabulary: bool = False
    """Whether predictions may name classes before they are learned, as they can where classes have texts."""

    def __init__(
        self,
        tasks: Sequence[Task],
        train: Split,
        test: Split,
        validation: Split | None = None,
        *,
        name: str = "stream",
        class_order: Sequence[int] | None = None,
        seeds: dict[str, int | None] | None = None,
        shared_classes: bool = False,
        evaluation_tasks: Sequence[Task] | None = None,
        train_transform: Transform | None = None,
        eval_transform: Transform | None = None,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        pin_memory: bool = False,
        drop_last: bool = False,
        uneven: Literal["repeat", "drop"] = "repeat",
        collate_fn: Callable[[list[Any]], Any] | None = None,
        single_pass: bool = False,
        unreadable: Literal["stop", "skip"] = "stop",
    ) -> None:
        super().__init__()
        check_tasks(tasks, shared_classes=shared_classes)
        for text, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{text}` must be an integer of {least} or more, got {value!r}")
        self.name = name
        self.tasks: tuple[Task, ...] = tuple(tasks)
        self.evaluation_tasks: tuple[Task, ...] = self.tasks if evaluation_tasks is None else tuple(evaluation_tasks)
        self.train, self.test = train, test
        self.validation = validation if validation is not None and len(validation.indices) else None
        order = [c for t in tasks for c in t.classes] if class_order is None else class_order
        self.class_order: tuple[int, ...] = tuple(dict.fromkeys(int(c) for c in order))
        self.n_classes: int = max(max(t.classes) for t in tasks) + 1
        self.seeds: dict[str, int | None] = dict(seeds or {"data": 0})
        self.data_seed = check_seed("data_seed", self.seeds.get("data", 0))
        self.shared_classes = shared_classes
        self.train_transform, self.eval_transform = train_transform, eval_transform
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.pin_memory, self.drop_last = num_workers, pin_memory, drop_last
        if uneven not in ("repeat", "drop"):
            raise ValueError(f"`uneven` must be 'repeat' or 'drop', got {uneven!r}")
        self.uneven: Literal["repeat", "drop"] = uneven
        self.collate_fn = collate_fn
        self.single_pass = single_pass
        if unreadable not in ("stop", "skip"):
            raise ValueError(f"`unreadable` must be 'stop' or 'skip', got {unreadable!r}")
        self.unreadable: Literal["stop", "skip"] = unreadable
        # a share of a small test set may be empty when there are many processes
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._task = 0
        self._check_sizes()

    def _check_sizes(self) -> None:
        for task, size in enumerate(self.train.sizes()):
            if size == 0:
                raise ValueError(
                    f"every task must have training samples, got none in task {task} with classes"
                    f" {self.tasks[task].classes}; remove these classes or merge the task with another"
                )
        missing = sorted({c for t in self.evaluation_tasks for c in t.classes} - self._present(self.test))
        self.classes_without_test: tuple[int, ...] = tuple(missing)
        if missing:
            warnings.warn(
                f"stream {self.name!r}: {len(missing)} classes have no test samples: {str(missing[:10])[1:-1]}",
                stacklevel=4,
            )

    def _present(self, split: Split) -> set[int]:
        return set(np.flatnonzero(np.bincount(split.labels[split.indices])).tolist())

    # position

    @property
    def task(self) -> int:
        """Index of the task whose training and validation data are given."""
        return self._task

    @task.setter
    def task(self, index: int) -> None:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self.tasks):
            raise ValueError(f"`task` must be an integer from 0 to {len(self.tasks) - 1}, got {index!r}")
        self._task = index

    def learned_after(self, task: int) -> int:
        """How many of :attr:`evaluation_tasks` have been learned once ``task`` is finished."""
        return task + 1

    # loaders

    def setup(self, stage: str) -> None:
        """Refuse several epochs of a stream that gives every sample once, before training starts."""
        if stage == "fit" and self.single_pass and self.trainer is not None and self.trainer.max_epochs != 1:
            raise ValueError(
                f"`max_epochs` must be 1 for {self.name!r}, which gives every sample once,"
                f" got {self.trainer.max_epochs!r}"
            )

    def _share(self) -> tuple[int, int]:
        """Rank and number of processes: the Trainer's word counts, since its strategies may shard models as well."""
        if self.trainer is not None:
            told = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
            return told["rank"], told["num_replicas"]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def _view(self, split: Split, task: int, transform: Transform | None) -> TaskView:
        return TaskView(
            split.source,
            split.labels,
            split.of(task),
            transform,
            (self.data_seed, task),
            self.collate_fn,
            self.unreadable,
        )

    def _loader(
        self,
        view: TaskView,
        sampler: TaskSampler,
        batch_size: int | None,
        drop_last: bool = False,
        persistent_workers: bool = False,
    ) -> StreamLoader:
        return StreamLoader(
            view,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_as_is if batch_size is None else view.collate,
            pin_memory=self.pin_memory,
            drop_last=drop_last,
            persistent_workers=persistent_workers,
            # seeds of workers would be drawn from the global generator without it
            generator=torch.Generator().manual_seed(self.data_seed),
        )

    def _eval_loader(self, split: Split, task: int) -> StreamLoader:
        view = self._view(split, task, self.eval_transform)
        rank, world_size = self._share()
        sampler = TaskSampler(len(view), rank=rank, world_size=world_size)
        return self._loader(view, sampler, self.eval_batch_size)

    def train_dataloader(self) -> StreamLoader:
        """Training data of the current task, shuffled by (data seed, task, epoch)."""
        view = self._view(self.train, self.task, self.train_transform)
        rank, world_size = self._share()
        sampler = TaskSampler(
            len(view),
            seed=(self.data_seed, self.task),
            rank=rank,
            world_size=world_size,
            pad=world_size > 1 and (self.uneven == "repeat" or len(view) < world_size),
            drop=world_size > 1 and self.uneven == "drop",
            single_pass=self.single_pass,
        )
        drop = self.drop_last and len(sampler) > self.batch_size  # a small task is not dropped whole
        return self._loader(view, sampler, self.batch_size, drop, persistent_workers=self.num_workers > 0)

    def val_dataloader(self) -> StreamLoader | list[DataLoader[Any]]:
        """Validation data of the current task in a fixed order; an empty list without validation data."""
        if self.validation is None or not len(self.validation.of(self.task)):
            return []
        rank, world_size = self._share()
        if world_size == 1:
            return self._eval_loader(self.validation, self.task)
        view = self._view(self.validation, self.task, self.eval_transform)
        return self._loader(view, EvenBatches(len(view), self.eval_batch_size, rank, world_size), None)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Test data, one loader for each of :attr:`evaluation_tasks`."""
        return [self.test_loader(i) for i in range(len(self.evaluation_tasks))]

    def test_loader(self, index: int) -> StreamLoader:
        """Test data of :attr:`evaluation_tasks` number ``index``, in a fixed order, each sample in one process."""
        return self._eval_loader(self.test, index)

    def validation_loader(self, index: int) -> StreamLoader:
        """Validation data of task ``index`` in a fixed order, each sample in one process.

        Raises:
            ValueError: for a stream without validation data.
        """
        if self.validation is None:
            raise ValueError(f"{self.name!r} has no validation data; build the stream with `validation_fraction`")
        return self._eval_loader(self.validation, index)

    def train_loader_for_features(self, index: int) -> StreamLoader:
        """Training data of task ``index`` in a fixed order, with the transform of the evaluation, nothing dropped."""
        return self._eval_loader(self.train, index)

    # what it is

    def provenance(self) -> dict[str, Any]:
        """Plain values that say what the stream is: name, seeds, sizes, class order."""
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            "name": self.name,
            "scenario": type(self).__name__,
            "n_tasks": len(self.tasks),
            "n_classes": self.n_classes,
            "classes": [list(t.classes) for t in self.tasks],
            "class_order": list(self.class_order),
            "seeds": dict(self.seeds),
            "task_known": self.task_known,
            "open_vocabulary": self.open_vocabulary,
            "single_pass": self.single_pass,
            "sizes": {k: [] if s is None else s.sizes() for k, s in splits.items()},
            "classes_without_test": list(self.classes_without_test),
        }

    def _identity(self) -> dict[str, Any]:
        told = self.provenance()
        return {
            "name": told["name"],
            "classes": told["classes"],
            "seeds": told["seeds"],
            "sizes": told["sizes"],
        }

    def state_dict(self) -> dict[str, Any]:
        """Position and identity; Lightning puts it into every checkpoint."""
        return {"task": self.task, "class_order": list(self.class_order), **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to the saved task.

        Raises:
            ValueError: when the state is another stream's, saying in what it differs.
        """
        for key, mine in self._identity().items():
            theirs = state_dict.get(key)
            if theirs != mine:
                raise ValueError(
                    f"the checkpoint must belong to this stream, got one whose {key} differ:"
                    f" {_short(theirs)} in the checkpoint, {_short(mine)} here;"
                    " build the stream with the same scenario, class order and seeds"
                )
        self.task = int(state_dict["task"])

    def __str__(self) -> str:
        sizes = {k: sum(v) for k, v in self.provenance()["sizes"].items()}
        return (
            f"{self.name}: {len(self.tasks)} tasks, {len(self.class_order)} classes, {sizes['train']} training,"
            f" {sizes['validation']} validation and {sizes['test']} test samples"
        )


def _as_is(batch: Any) -> Any:
    return batch


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
