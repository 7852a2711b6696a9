"""Arrays of one split in a feature cache, read by rows."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_plugins._cache_rows import RowReader


class CacheEntry:
    """The arrays of one split, read by rows.

    Args:
        arrays: ``(samples, ...)`` by name.
        dtypes: what reading gives, by name.
        labels: ``(samples,)`` int64.
        in_memory: whether the arrays are in memory or mapped from a file.
    """

    def __init__(
        self, arrays: dict[str, Tensor], dtypes: dict[str, torch.dtype], labels: Tensor, in_memory: bool
    ) -> None:
        self.arrays, self.dtypes, self.labels, self.in_memory = arrays, dtypes, labels, in_memory
        self._reader = RowReader(arrays, dtypes)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Size of the arrays."""
        return sum(a.numel() * a.element_size() for a in self.arrays.values())

    def read(self, rows: Tensor, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The arrays' ``rows`` ``(batch, ...)`` in the dtype in which they were computed.

        Neighboring rows are a view of the array and cost nothing; others, and those stored in another dtype, are copied
        in one call an array into the memory of an earlier batch once nobody holds that any more.

        Args:
            rows: ``(batch,)`` int64.
            device: where the result goes.

        Raises:
            IndexError: for a row outside the entry.
        """
        return self._reader.read(rows.cpu(), len(self), torch.device(device))
