"""The files of a feature cache: a data file with arrays one after the other, and the manifest that makes it valid."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1
LABELS = "labels"
"""Name of the array that holds the labels."""

_PAGE = 4096


@dataclass(frozen=True)
class Segment:
    """One array in a data file.

    Attributes:
        name: of the array.
        shape: ``(samples, ...)``.
        dtype: as stored.
        computed: dtype in which the values were computed.
        offset: first byte.
        nbytes: size.
        crc32: checksum of the bytes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    computed: str
    offset: int
    nbytes: int
    crc32: int = 0


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of a name such as ``"float16"``."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"the manifest must name a torch dtype, got {name!r}")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype, such as ``"float16"``."""
    return str(dtype).removeprefix("torch.")


def read_manifest(path: Path) -> tuple[dict[str, Any], Path, list[Segment]]:
    """The key, the data file and the arrays that a manifest names.

    Raises:
        ValueError: when it cannot be read, or the data file is missing or too short.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r} instead of {FORMAT}")
        segments = [Segment(**{**s, "shape": tuple(s["shape"])}) for s in manifest["segments"]]
        key, name = dict(manifest["key"]), str(manifest["data"])
        if Path(name).name != name or not segments or any(x.offset < 0 or x.nbytes < 0 for x in segments):
            raise ValueError(f"data {name!r} with {len(segments)} arrays")
        data = path.parent / name
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the manifest {path} cannot be read: {error!r}; delete it") from error
    if not data.is_file() or data.stat().st_size < max(s.offset + s.nbytes for s in segments):
        raise ValueError(f"the cached features in {data} are damaged: the file is missing or short; delete {path}")
    return key, data, segments


class MemoryRows:
    """Takes rows of arrays in order, into memory.

    Args:
        n: rows in all.
        rows: first rows of each array, for their shapes.
    """

    def __init__(self, n: int, rows: Mapping[str, Tensor]) -> None:
        self.arrays = {k: torch.empty(n, *v.shape[1:], dtype=v.dtype) for k, v in rows.items()}

    def write(self, start: int, rows: Mapping[str, Tensor]) -> None:
        """Put rows behind the first ``start``."""
        for name, value in rows.items():
            self.arrays[name][start : start + len(value)] = value

    def abort(self) -> None:
        """Nothing outlives it anyway."""


class EntryFile:
    """Takes rows of arrays in order, into a temporary file that becomes an entry at the end.

    Args:
        n: rows in all.
        rows: first rows of each array, for their shapes.
        computed: dtype in which each array was computed.
        folder: of the entry.
        name: stem of its files.

    Raises:
        OSError: when the disk is full; nothing is left then.
    """

    def __init__(
        self, n: int, rows: Mapping[str, Tensor], computed: Mapping[str, torch.dtype], folder: Path, name: str
    ) -> None:
        self.folder, self.name = folder, name
        self.segments: dict[str, Segment] = {}
        offset = 0
        for array, value in (*rows.items(), (LABELS, torch.zeros(1, dtype=torch.int64))):
            shape = (n, *value.shape[1:])
            nbytes = math.prod(shape) * value.element_size()
            given = dtype_name(computed.get(array, value.dtype))
            self.segments[array] = Segment(array, shape, dtype_name(value.dtype), given, offset, nbytes)
            offset += -(-nbytes // _PAGE) * _PAGE
        self.size = max(offset, 1)
        self.crc = dict.fromkeys(self.segments, 0)
        self.path = folder / f"{name}-{os.urandom(4).hex()}.bin"  # a name that no manifest knows yet
        self.temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        self.file = open(self.temporary, "wb")  # noqa: SIM115  closed by finish() or abort()
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.file.fileno(), 0, self.size)  # a full disk shows here, not half way
            else:
                self.file.truncate(self.size)
        except OSError as error:
            self.abort()
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> OSError:
        return OSError(
            error.errno,
            f"the cache needs {self.size / 2**20:.1f} MiB in {self.folder}: {error.strerror};"
            " free the disk, give another folder, or store fewer taps or dtype=torch.float16",
        )

    def write(self, start: int, rows: Mapping[str, Tensor]) -> None:
        """Put rows behind the first ``start``."""
        for name, value in rows.items():
            segment = self.segments[name]
            plain = value.reshape(-1).view(torch.uint8).numpy().data
            self.crc[name] = zlib.crc32(plain, self.crc[name])
            try:
                self.file.seek(segment.offset + start * (segment.nbytes // segment.shape[0]))
                self.file.write(plain)
            except OSError as error:
                raise self._explained(error) from error

    def finish(self, key: Mapping[str, Any], labels: Tensor) -> None:
        """Sync, rename, and only then write the manifest."""
        self.write(0, {LABELS: labels})
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self._explained(error) from error
        self.file.close()
        os.replace(self.temporary, self.path)
        segments = [{**asdict(s), "crc32": self.crc[s.name]} for s in self.segments.values()]
        manifest = {"format": FORMAT, "key": dict(key), "data": self.path.name, "segments": segments}
        _write_synced(self.folder / f"{self.name}.json", json.dumps(manifest, indent=1))
        for old in self.folder.glob(f"{self.name}-*.bin*"):
            if old != self.path and not _being_written(old):
                old.unlink(missing_ok=True)

    def abort(self) -> None:
        """Leave nothing behind."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def _being_written(path: Path) -> bool:
    """Whether a temporary file belongs to a process that lives; what killed ones left may go."""
    pid = path.suffixes[-2][1:] if path.suffix == ".tmp" and len(path.suffixes) > 1 else ""
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def _write_synced(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)  # the renames themselves
        finally:
            os.close(folder)
