"""The order of samples: seeded by (data seed, task, epoch), split over processes, resumable at any batch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, DistributedSampler

from ._seeds import SAMPLE_ORDER, generator


class TaskSampler(DistributedSampler[Any]):
    """Gives the numbers of one task's samples; number = epoch * n + position.

    The epoch travels inside the number, so that worker processes that outlive an epoch still know it. It is a
    ``DistributedSampler`` because Lightning leaves those as they are and replaces every other one when it runs several
    processes.

    Args:
        n: samples of the task.
        seed: ``(data_seed, task)`` to shuffle by; None keeps the order.
        rank: which share to give.
        world_size: number of shares.
        pad: repeat samples until all shares are equally long, as training needs; without it the shares differ by one
            sample at most and no sample is in two.
        drop: leave out the last ones of the epoch's order instead; ``pad`` goes before.
        single_pass: refuse a second epoch.

    Example:
        >>> list(TaskSampler(5, rank=1, world_size=2))
        [1, 3]
    """

    def __init__(
        self,
        n: int,
        *,
        seed: tuple[int, int] | None = None,
        rank: int = 0,
        world_size: int = 1,
        pad: bool = False,
        drop: bool = False,
        single_pass: bool = False,
    ) -> None:
        data: Any = range(n)  # only its length is read
        super().__init__(data, num_replicas=world_size, rank=rank, shuffle=seed is not None)
        self.n = n
        self.key = seed
        self.pad = pad
        self.single_pass = single_pass
        self.drop = drop and not pad
        self.num_samples = math.ceil(n / world_size) if pad else len(range(rank, n, world_size))
        if self.drop:
            self.num_samples = n // world_size
        self.start = 0  # samples of this share to leave out, once, after a resume
        self._used = False
        self._told = False

    def set_epoch(self, epoch: int) -> None:
        """Use the order of ``epoch``; Lightning calls it before each."""
        if epoch != self.epoch or self._used:
            self.start = 0
        self.epoch = epoch
        self._used, self._told = False, True

    def resume(self, epoch: int, start: int) -> None:
        """Give the rest of ``epoch`` behind its first ``start`` samples at the next pass."""
        self.epoch, self.start = epoch, start
        self._used = self._told = False

    def begin(self) -> None:
        """Start a pass: a second pass without :meth:`set_epoch` is the next epoch."""
        finished = self.start >= self.num_samples > 0 and not self._told
        if self._used or finished:
            self.epoch += 1
            self.start = 0
        if self.single_pass and self.epoch > 0:
            raise RuntimeError(
                "a single-pass stream must be read once, got a second epoch; train each task for one epoch"
            )
        self._used, self._told = True, False

    def share(self) -> NDArray[np.int64]:
        """Positions in the task that this process sees in the epoch, in order."""
        if self.key is None:
            order = np.arange(self.n)
        else:
            order = generator(SAMPLE_ORDER, *self.key, self.epoch).permutation(self.n)
        if self.pad and self.n:
            order = np.resize(order, self.num_samples * self.num_replicas)  # repeats from the front
        elif self.drop:
            order = order[: self.num_samples * self.num_replicas]
        return order[self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.epoch * self.n + self.share()[self.start :]).tolist())

    def __len__(self) -> int:
        return self.num_samples


class EvenBatches(TaskSampler):
    """Gives lists of numbers: the same number of batches in every process, and still no sample twice.

    Lightning validates through the DDP wrapper, whose buffer broadcasts wait for every process at every batch. Only
    when there are fewer samples than processes, or batches of one, the last sample is repeated to fill a batch.

    Args:
        n: samples of the task.
        batch_size: of the largest batch.
        rank: which share to give.
        world_size: number of shares.
    """

    def __init__(self, n: int, batch_size: int, rank: int, world_size: int) -> None:
        super().__init__(n, rank=rank, world_size=world_size)
        self.n_batches = math.ceil(math.ceil(n / world_size) / batch_size)

    def __iter__(self) -> Iterator[Any]:
        mine = self.share()
        if len(mine) < self.n_batches:
            mine = np.append(mine, self.n - 1)
        return (part.tolist() for part in np.array_split(mine, self.n_batches))

    def __len__(self) -> int:
        return self.n_batches


class StreamLoader(DataLoader[Any]):
    """A ``DataLoader`` that knows how far it is; Lightning stores that in checkpoints and continues there, bit for bit.

    Batches that workers prepared ahead do not count, only those handed over.
    """

    _delivered = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # DataLoader promises a class of its own
        # a generator, so that workers start after Lightning has named the epoch
        sampler = self.sampler
        if isinstance(sampler, TaskSampler):
            sampler.begin()
            self._delivered = sampler.start // (self.batch_size or 1)
        for batch in super().__iter__():
            self._delivered += 1
            yield batch

    def _identity(self) -> dict[str, Any]:
        sampler = self.sampler
        if not isinstance(sampler, TaskSampler):
            return {}
        return {
            "samples": sampler.n,
            "seed": None if sampler.key is None else list(sampler.key),
            "processes": sampler.num_replicas,
            "batch_size": self.batch_size,
        }

    def state_dict(self) -> dict[str, Any]:
        """Epoch and number of batches that were handed over in it."""
        sampler = self.sampler
        epoch = sampler.epoch if isinstance(sampler, TaskSampler) else 0
        return {"epoch": epoch, "batches": self._delivered, "batches_in_epoch": len(self), **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue behind the batches that were handed over.

        Raises:
            ValueError: when the state lies inside an epoch and belongs to other data, seeds, processes or batch sizes.
        """
        sampler = self.sampler
        if not isinstance(sampler, TaskSampler):
            return
        inside = 0 < state_dict["batches"] < state_dict["batches_in_epoch"]
        for name, value in self._identity().items():
            if inside and state_dict.get(name) != value:
                raise ValueError(
                    f"the checkpoint was written inside an epoch with {name} {state_dict.get(name)!r}, got {value!r};"
                    " continue with the same value, or from a checkpoint at the end of an epoch"
                )
        finished = not inside and state_dict["batches"] > 0
        self._delivered = len(self) if finished else int(state_dict["batches"])
        start = sampler.num_samples if finished else self._delivered * (self.batch_size or 1)
        sampler.resume(int(state_dict["epoch"]), start)
