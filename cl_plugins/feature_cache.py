"""Features and taps of a frozen backbone, computed once per sample and augmentation seed and read ever after.

An entry holds one split (and view) as arrays, one row a sample: in memory, or memory-mapped once a byte budget is
spent. On disk it is a data file and a manifest. The data file is written under a temporary name, synced and renamed
before the manifest, which names it with sizes and checksums, appears in one rename: a kill at any moment leaves the old
entry or none.

    <split>-v<view>.json                  key, layout, checksums; written last
    <split>-v<view>-<random>.bin          arrays one after the other, each (samples, ...), aligned to 4096 bytes
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cl_plugins._cache_files import LABELS, EntryFile, MemoryRows, dtype_name, read_manifest, torch_dtype
from cl_plugins.cache_entry import CacheEntry


def tensor_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, dtypes, shapes and values.

    Example:
        >>> tensor_digest([("a", torch.zeros(2))]) == tensor_digest([("a", torch.ones(2))])
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name}:{plain.dtype}:{tuple(plain.shape)};".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def each_once(tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Each tensor once, under its shortest name, so that a wrapper around the backbone changes no digest."""
    by_id: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in sorted(tensors, key=lambda item: len(item[0])):
        by_id.setdefault(id(tensor), (name, tensor))
    return sorted(by_id.values(), key=lambda item: item[0])


@dataclass(frozen=True)
class CacheKey:
    """What an entry was computed from; two keys that differ in any field never share one.

    Attributes:
        split: what the samples are, such as ``"train-3"``.
        view: augmentation seed.
        weights: digest of everything that the values depend on.
        transform: digest of transformed inputs, or a description of the transform.
        dtype: of the stored values; ``"as computed"`` for their own.
        arrays: names of the arrays.
    """

    split: str
    view: int = 0
    weights: str = ""
    transform: str = ""
    dtype: str = "as computed"
    arrays: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Stem of the entry's files."""
        return f"{re.sub(r'[^A-Za-z0-9._-]', '_', self.split)}-v{self.view}"

    def difference(self, other: Mapping[str, Any]) -> str | None:
        """The first field in which a stored key differs, as text; None when it is the same."""
        for field in fields(self):
            mine, theirs = getattr(self, field.name), other.get(field.name)
            theirs = tuple(theirs) if isinstance(theirs, list) else theirs
            if mine != theirs:
                return f"`{field.name}` is {theirs!r} there and {mine!r} here"
        return None


class FeatureCache:
    """Entries by key, in memory up to a budget and in files beyond it.

    Args:
        folder: keeps the entries for later runs; None keeps them for this process, in a temporary folder where they do
            not fit into memory.
        byte_budget: bytes of entries held in memory together; the others are memory-mapped.
        dtype: of stored floating point values, such as ``torch.float16`` to halve the size; as computed when None.
        verify: compare an entry from a folder with its checksums when it is opened.
        progress: show a bar while an entry is filled, where there is a terminal.

    Raises:
        ValueError: for a negative budget or a dtype that holds no floating point numbers.

    Example:
        >>> cache, key = FeatureCache(), CacheKey("train-0", arrays=("feature",))
        >>> batches = [({"feature": torch.arange(6.0).view(3, 2)}, torch.tensor([0, 1, 1]))]
        >>> entry = cache.fill(key, batches, n=3)
        >>> cache.open(key).read(torch.tensor([2, 0]))["feature"].tolist()
        [[4.0, 5.0], [0.0, 1.0]]
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        *,
        byte_budget: int = 2 << 30,
        dtype: torch.dtype | None = None,
        verify: bool = True,
        progress: bool = True,
    ) -> None:
        if byte_budget < 0:
            raise ValueError(f"`byte_budget` must be 0 or more, got {byte_budget!r}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"`dtype` must hold floating point numbers, got {dtype!r}; use torch.float16")
        self.folder = None if folder is None else Path(folder)
        self.byte_budget, self.dtype, self.verify, self.progress = byte_budget, dtype, verify, progress
        self._entries: dict[str, tuple[CacheKey, CacheEntry]] = {}
        self._temporary: Path | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureCache:
        return self  # copies of a model, such as averages, read the same entries

    @property
    def dtype_name(self) -> str:
        """What belongs into a key."""
        return "as computed" if self.dtype is None else dtype_name(self.dtype)

    @property
    def bytes_in_memory(self) -> int:
        """Bytes of the entries that are held in memory."""
        return sum(e.nbytes for _, e in self._entries.values() if e.in_memory)

    def open(self, key: CacheKey) -> CacheEntry | None:
        """The entry of a key; None when the split was never filled.

        Raises:
            ValueError: when the entry was computed from something else, or is damaged.
        """
        if key.name in self._entries:
            held, entry = self._entries[key.name]
            self._refuse_stale(key, asdict(held), "in memory")
            return entry
        path = None if self.folder is None else self.folder / f"{key.name}.json"
        if path is None or not path.is_file():
            return None
        entry = self._load(path, key)
        self._entries[key.name] = (key, entry)
        return entry

    def drop(self, key: CacheKey) -> None:
        """Forget an entry and delete its files; nothing happens when there is none."""
        self._entries.pop(key.name, None)
        for folder in (self.folder, self._temporary):
            for path in () if folder is None else folder.glob(f"{key.name}[.-]*"):
                path.unlink(missing_ok=True)

    def release(self, key: CacheKey) -> None:
        """Free the memory of an entry; its files stay in ``folder``, and go when there is none."""
        self._entries.pop(key.name, None)
        if self.folder is None:
            self.drop(key)

    def fill(
        self, key: CacheKey, batches: Iterable[tuple[Mapping[str, Tensor], Tensor]], n: int, *, label: str = ""
    ) -> CacheEntry:
        """Store a split, and give it back.

        Args:
            key: what the values are computed from; replaces an entry of the same split and view.
            batches: arrays ``(batch, ...)`` by name, and labels ``(batch,)``, in the order of the rows.
            n: rows in all.
            label: in front of the progress bar.

        Raises:
            ValueError: when the batches hold other than ``n`` rows.
            OSError: when the disk is full; nothing of the entry is left then.
        """
        writer: MemoryRows | EntryFile | None = None
        computed: dict[str, torch.dtype] = {}
        labels: list[Tensor] = []
        done = 0
        bar = tqdm(
            total=n,
            desc=label or f"caching {key.split}",
            unit="sample",
            leave=False,  # a stream fills several a task
            disable=None if self.progress else True,
        )
        try:
            with bar:
                for arrays, target in batches:
                    stored = {k: self._stored(v) for k, v in arrays.items()}
                    if writer is None:
                        computed = {k: v.dtype for k, v in arrays.items()}
                        writer = self._writer(key, n, stored, computed)
                    if done + len(target) > n:
                        raise ValueError(f"`batches` must hold {n} rows for {key.split!r}, got more")
                    writer.write(done, stored)
                    labels.append(target.detach().cpu())
                    done += len(target)
                    bar.update(len(target))
            if writer is None or done != n:
                raise ValueError(
                    f"`batches` must hold {n} rows for {key.split!r}, got {done}; samples that a stream skips,"
                    " since their files cannot be read, must be taken out of its data first"
                )
            if isinstance(writer, EntryFile):
                writer.finish(asdict(key), torch.cat(labels))
        except BaseException:  # Ctrl-C as well, and whatever computes the batches
            if writer is not None:
                writer.abort()
            raise
        self._entries.pop(key.name, None)
        if isinstance(writer, EntryFile):
            entry = self._load(writer.folder / f"{key.name}.json", key)
        else:
            entry = CacheEntry(writer.arrays, computed, torch.cat(labels), in_memory=True)
        self._entries[key.name] = (key, entry)
        return entry

    def close(self) -> None:
        """Forget all entries; files in ``folder`` stay."""
        self._entries.clear()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary = None

    def _stored(self, value: Tensor) -> Tensor:
        plain = value.detach()
        if self.dtype is not None and plain.is_floating_point():
            largest = plain.abs().amax() if plain.numel() else torch.zeros(())
            if torch.finfo(self.dtype).max < largest < torch.inf:
                raise ValueError(
                    f"`dtype` must hold the features, which reach {float(largest):.3g}, got {self.dtype_name!r};"
                    " use 'bfloat16' or None"
                )
            plain = plain.to(self.dtype)
        return plain.cpu().contiguous()

    def _writer(
        self, key: CacheKey, n: int, rows: dict[str, Tensor], computed: dict[str, torch.dtype]
    ) -> MemoryRows | EntryFile:
        size = sum(n * v[0].numel() * v.element_size() for v in rows.values())
        if self.folder is None and self.bytes_in_memory + size <= self.byte_budget:
            return MemoryRows(n, rows)
        if self.folder is None and self._temporary is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="cl-plugins-cache-"))
            weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)
        folder = self.folder or self._temporary
        assert folder is not None
        folder.mkdir(parents=True, exist_ok=True)
        return EntryFile(n, rows, computed, folder, key.name)

    def _refuse_stale(self, key: CacheKey, stored: Mapping[str, Any], where: str) -> None:
        difference = key.difference(stored)
        if difference is not None:
            raise ValueError(
                f"the cached features of {key.split!r} {where} are stale: {difference};"
                " drop the entry, or give the cache another folder"
            )

    def _load(self, path: Path, key: CacheKey) -> CacheEntry:
        stored, data, segments = read_manifest(path)
        self._refuse_stale(key, stored, f"in {path.parent}")
        size = sum(s.nbytes for s in segments)
        in_memory = self.bytes_in_memory + size <= self.byte_budget
        arrays: dict[str, Tensor] = {}
        for s in segments:
            raw = np.memmap(data, np.uint8, "c", s.offset, (s.nbytes,)) if s.nbytes else np.zeros(0, np.uint8)
            if self.verify and zlib.crc32(raw.data) != s.crc32:
                raise ValueError(
                    f"the cached features in {data} are damaged: {s.name!r} has another checksum; delete {path}"
                )
            plain = torch.from_numpy(np.array(raw) if in_memory or s.name == LABELS else raw)
            arrays[s.name] = plain.view(torch_dtype(s.dtype)).view(s.shape)
        labels = arrays.pop(LABELS)
        return CacheEntry(arrays, {s.name: torch_dtype(s.computed) for s in segments}, labels, in_memory)
