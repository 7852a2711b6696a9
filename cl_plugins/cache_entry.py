"""Arrays of one split in a feature cache, read by rows into memory that is used again."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


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
        self._buffers = _Buffers()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Size of the arrays."""
        return sum(a.numel() * a.element_size() for a in self.arrays.values())

    def read(self, rows: Tensor, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The arrays' ``rows`` ``(batch, ...)`` in the dtype in which they were computed.

        Neighboring rows are a view of the array and cost nothing; others are gathered, one call an array, into the
        memory of an earlier batch once nobody holds that any more.

        Args:
            rows: ``(batch,)`` int64.
            device: where the result goes.

        Raises:
            IndexError: for a row outside the entry.
        """
        rows = rows.cpu()
        first, n = (int(rows[0]), len(rows)) if len(rows) else (0, 0)
        low, high = (int(rows.min()), int(rows.max())) if n else (0, 0)
        if n and not (low >= 0 and high < len(self)):
            raise IndexError(f"`rows` must be from 0 to {len(self) - 1}, got {low} to {high}")
        together = high - low == n - 1 and bool((rows == torch.arange(first, first + n)).all())
        read = {}
        for name, array in self.arrays.items():
            part = array[first : first + n] if together else self._buffers.gather(name, array, rows)
            read[name] = part.to(device, self.dtypes[name], non_blocking=True)
        return read


def _references(tensor: Tensor) -> int:
    """How many tensors and storage objects hold the tensor's memory; -1 where torch does not tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return -1 if count is None else int(count(tensor.untyped_storage()._cdata))


_ALONE = _references(torch.empty(1))


def _copy_rows(array: Tensor, rows: Tensor, out: Tensor) -> None:
    """``out[i] = array[rows[i]]`` for rows inside the array, one block of bytes a row: faster than ``index_select``."""
    if not len(rows) or not array[0].numel() or not array.is_contiguous() or array.device.type != "cpu":
        torch.index_select(array, 0, rows.clone(), out=out)
        return
    source, target = (t.flatten(1) if t.ndim > 1 else t[:, None] for t in (array, out))
    plain = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[array.element_size()]
    np.take(source.view(plain).numpy(), rows.numpy(), 0, target.view(plain).numpy(), mode="clip")  # "raise" would copy


class _Buffers:
    """Memory for gathered rows: new pages for every batch cost several times as much as the copy into them."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def gather(self, name: str, array: Tensor, rows: Tensor) -> Tensor:
        """``array[rows]``, in memory that was handed out before and is free again, or in new memory."""
        shape = (len(rows), *array.shape[1:])
        held = self._held.get(name)
        with torch.inference_mode(False), torch.no_grad():  # memory made in inference mode could not be written again
            if held is None or held.shape != shape or _ALONE < 0 or _references(held) > _ALONE:
                held = self._held[name] = array.new_empty(shape)
            _copy_rows(array, rows, held)
        return held.view(shape)  # a tensor of its own, so that whoever keeps it is counted
