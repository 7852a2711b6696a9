"""Row ids that stand for images in the batches of a cached stream.

row id = entry * 2^32 + row
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cl_plugins.cache_entry import CacheEntry

_SHIFT = 32


def row_ids(entries: int | Tensor, rows: Tensor) -> Tensor:
    """What stands for ``rows`` ``(batch,)`` of an entry, or of one entry each."""
    return (torch.as_tensor(entries) << _SHIFT) + rows


class CachedRows(Dataset[Any]):
    """Row ids and labels of a split, a whole batch at once.

    Args:
        entries: number of the entry of each view.
        labels: ``(samples,)``.

    Example:
        >>> rows = CachedRows([0, 3], torch.tensor([5, 6]))
        >>> rows.__getitems__([1, 2])[0].tolist()  # sample 1 of view 0, sample 0 of view 1, which is entry 3
        [1, 12884901888]
    """

    def __init__(self, entries: Sequence[int], labels: Tensor) -> None:
        self.entries = torch.as_tensor(list(entries), dtype=torch.int64)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, numbers: int | list[int]) -> tuple[Tensor, Tensor]:
        return self.__getitems__([numbers] if isinstance(numbers, int) else numbers)

    def __getitems__(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Ids and labels of a batch; a number is ``epoch * len(self) + position``."""
        asked = torch.as_tensor(numbers, dtype=torch.int64)
        rows = asked % len(self)
        views = (asked // len(self)) % len(self.entries)
        return row_ids(self.entries[views], rows), self.labels[rows]


def _as_is(batch: Any) -> Any:
    return batch


def uncached(loader: Any) -> Any:
    """The loader of images behind a cached one; any other loader as it is."""
    return getattr(loader, "images", loader)


def rows_loader(images: DataLoader[Any], rows: CachedRows) -> DataLoader[Any]:
    """A loader of rows in the order and batches of a loader of images, which :func:`uncached` gives back."""
    options: dict[str, Any] = {"collate_fn": _as_is, "generator": images.generator}
    if images.batch_sampler is None:
        options |= {"batch_size": None, "sampler": images.sampler}
    elif images.batch_size is not None and type(images.batch_sampler) is torch.utils.data.BatchSampler:
        options |= {"batch_size": images.batch_size, "sampler": images.sampler, "drop_last": images.drop_last}
    else:
        options |= {"batch_sampler": images.batch_sampler}
    loader: Any = type(images)(rows, **options)
    loader.images = images
    made: DataLoader[Any] = loader
    return made


class PhasedLoader:
    """Images in the epochs that train something in front of the classifier, rows in the others, in the same batches.

    Each epoch decides when its first batch is asked for: Lightning makes iterators before its hooks name the epoch.

    Args:
        images: its sampler counts epochs, and is that of the rows as well.
        rows: makes the loader of an epoch's rows.
        fixed: whether nothing in front of the classifier trains now.

    Raises:
        TypeError: for loaders that do not count epochs and batches: rows could not go on where the images stopped.
    """

    def __init__(
        self, images: DataLoader[Any], rows: Callable[[int], DataLoader[Any]], fixed: Callable[[], bool]
    ) -> None:
        sampler = getattr(images, "sampler", None)
        if not (hasattr(images, "state_dict") and hasattr(sampler, "begin")):
            raise TypeError(
                "the training loader must count epochs and batches where features of single epochs are cached, got a"
                f" {type(images).__name__} with a {type(sampler).__name__}; use a TaskStream of cl_plugins.scenarios,"
                " or leave CacheFeatures out of the callbacks"
            )
        self.images: Any = images
        self._rows, self._fixed = rows, fixed
        self._cached: Any = None

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Any]:
        fixed = self._fixed()
        if fixed:
            self._cached = self._rows(self.images.sampler.epoch)
        yield from self._cached if fixed else self.images

    def __getattr__(self, name: str) -> Any:
        if name in ("sampler", "batch_sampler", "batch_size", "dataset", "num_workers"):
            return getattr(self.images, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def _iterator(self) -> Any:  # Lightning stops the workers of a finished fit through it
        return getattr(self.images, "_iterator", None)

    @_iterator.setter
    def _iterator(self, value: Any) -> None:
        self.images._iterator = value

    def state_dict(self) -> dict[str, Any]:
        """The position of the loader that gave the last batch."""
        state: dict[str, Any] = (self.images if self._cached is None else self._cached).state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there, with images or rows."""
        self.images.load_state_dict(state_dict)


def read_rows(entries: Sequence[CacheEntry], ids: Tensor) -> dict[str, Tensor]:
    """The arrays ``(batch, ...)`` of row ids ``(batch,)``, on the ids' device.

    Args:
        entries: by number.
        ids: of any of them, in any order.
    """
    device, ids = ids.device, ids.cpu()
    numbers, rows = ids >> _SHIFT, ids & ((1 << _SHIFT) - 1)
    present: list[int] = sorted(set(numbers.tolist()))
    if len(present) == 1:
        return entries[present[0]].read(rows, device)
    parts = [(numbers == e, entries[e]) for e in present]
    order = torch.cat([chosen.nonzero()[:, 0] for chosen, _ in parts]).argsort().to(device)
    read = [entry.read(rows[chosen], device) for chosen, entry in parts]
    return {name: torch.cat([r[name] for r in read])[order] for name in read[0]}
