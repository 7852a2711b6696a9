"""Rows of a feature cache's arrays, gathered in one call an array into memory that is used again.

Fresh memory for every batch would cost several times as much as the copy into it: the system hands out its pages one by
one. So an array keeps the memory of earlier batches, at most two, and hands it out again once nobody holds it. Two,
since a loop that reads the next batch often still holds something of the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_POOL = 2
_PIECE = 1 << 19  # bytes gathered before they are converted, so few that the processor's cache still holds them
_LARGE = 1 << 16  # bytes of a row from which on a call for each costs less than gathering them first
_PLAIN = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}  # numpy knows no bfloat16


def _references(tensor: Tensor) -> int:
    """How many tensors and storage objects hold the tensor's memory; -1 where torch does not tell."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    return -1 if count is None else int(count(tensor.untyped_storage()._cdata))


def _as_rows(array: Tensor) -> npt.NDArray[Any] | None:
    """The array as ``(rows, values)`` of plain numbers over the same memory; None where it is no such block."""
    if not array.numel() or not array.is_contiguous() or array.device.type != "cpu":
        return None
    plain: npt.NDArray[Any] = array.detach().reshape(len(array), -1).view(_PLAIN[array.element_size()]).numpy()
    return plain


class _Block:
    """Memory for up to ``capacity`` rows, and how many hold it while it is free."""

    def __init__(self, like: Tensor, capacity: int, dtype: torch.dtype) -> None:
        self.memory = torch.empty(capacity, *like.shape[1:], dtype=dtype, device=like.device)
        self.rows = _as_rows(self.memory)
        self.alone = _references(self.memory)

    def free(self) -> bool:
        return self.alone >= 0 and _references(self.memory) == self.alone


class _Pool:
    """The memory of an array's last batches in one dtype."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._like, self._dtype = like, dtype
        self._blocks: list[_Block] = []

    def take(self, n: int) -> _Block:
        """Memory for ``n`` rows that nobody holds."""
        for block in self._blocks:
            if len(block.memory) >= n and block.free():
                return block
        block = _Block(self._like, n, self._dtype)
        self._blocks = [block, *self._blocks[: _POOL - 1]]
        return block


class _Array:
    """One array as stored, and the memory that its batches are read into.

    Args:
        array: ``(samples, ...)``.
        dtype: of what is read.
    """

    def __init__(self, array: Tensor, dtype: torch.dtype) -> None:
        self.array, self.dtype = array, dtype
        self.rows = _as_rows(array)
        self.converts = array.dtype != dtype
        size = array[:1].nbytes
        self.large, self.piece = size >= _LARGE, max(1, _PIECE // max(1, size))
        self.stored, self.computed = _Pool(array, array.dtype), _Pool(array, dtype)

    def gather(self, numbers: npt.NDArray[np.int64], block: _Block) -> Tensor:
        """The rows as stored, in the memory of ``block``."""
        n = len(numbers)
        part = block.memory[:n]  # a tensor of its own, so that whoever keeps it is counted
        if self.rows is None or block.rows is None:
            torch.index_select(self.array, 0, torch.from_numpy(numbers.copy()), out=part)
        else:  # a block of bytes a row: faster than index_select; mode "raise" would copy once more
            self.rows.take(numbers, 0, block.rows if len(block.rows) == n else block.rows[:n], "clip")
        return part

    def convert(self, numbers: npt.NDArray[np.int64], target: Tensor) -> Tensor:
        """The rows as computed, in ``target``: large ones as they stand, small ones gathered a piece at a time."""
        if self.large:
            for row, to in zip(numbers.tolist(), target.unbind(), strict=True):
                to.copy_(self.array[row])
            return target
        block = self.stored.take(min(len(numbers), self.piece))
        for first in range(0, len(numbers), self.piece):
            piece = numbers[first : first + self.piece]
            target[first : first + len(piece)].copy_(self.gather(piece, block))
        return target


class RowReader:
    """Reads rows of several arrays with as many samples.

    Args:
        arrays: ``(samples, ...)`` by name.
        dtypes: of what is read, by name.
    """

    def __init__(self, arrays: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
        self._names = list(arrays)
        self._arrays = [_Array(array, dtypes[name]) for name, array in arrays.items()]

    def read(self, rows: Tensor, samples: int, device: torch.device) -> dict[str, Tensor]:
        """The arrays' ``rows`` ``(batch, ...)``; neighbors are a view where neither dtype nor device change.

        Args:
            rows: ``(batch,)`` int64, on the CPU.
            samples: rows that there are.
            device: where the result goes.

        Raises:
            IndexError: for a row outside the entry.
        """
        numbers: npt.NDArray[np.int64] = rows.numpy()
        first, n = (int(numbers[0]), len(numbers)) if len(numbers) else (0, 0)
        low, high = (int(numbers.min()), int(numbers.max())) if n else (0, 0)
        if n and not (low >= 0 and high < samples):
            raise IndexError(f"`rows` must be from 0 to {samples - 1}, got {low} to {high}")
        together = high - low == n - 1 and bool((numbers == np.arange(first, first + n)).all())
        with torch.inference_mode(False), torch.no_grad():  # memory made in inference mode could not be written again
            parts = self._neighbors(first, n, device) if together else self._gathered(numbers, device)
            if device.type != "cpu":
                parts = [p.to(device).to(a.dtype) for p, a in zip(parts, self._arrays, strict=True)]
        return dict(zip(self._names, parts, strict=True))

    def _neighbors(self, first: int, n: int, device: torch.device) -> list[Tensor]:
        """``n`` rows from ``first`` on."""
        parts = [a.array[first : first + n] for a in self._arrays]
        if device.type != "cpu":
            return parts  # converted there, so that less is sent
        return [
            a.computed.take(n).memory[:n].copy_(part) if a.converts else part
            for a, part in zip(self._arrays, parts, strict=True)
        ]

    def _gathered(self, numbers: npt.NDArray[np.int64], device: torch.device) -> list[Tensor]:
        """Any rows, in memory that may be handed out again once nobody holds it.

        The memory is found first: each copy drives what else runs out of the processor's caches, so that little should
        run between them.
        """
        n, here = len(numbers), device.type == "cpu"
        blocks = [(a.computed if a.converts and here else a.stored).take(n) for a in self._arrays]
        return [
            a.convert(numbers, block.memory[:n]) if a.converts and here else a.gather(numbers, block)
            for a, block in zip(self._arrays, blocks, strict=True)
        ]
