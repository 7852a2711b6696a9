"""The files of a feature cache: a data file with arrays one after the other, and the manifest that makes it valid."""

from __future__ import annotations

import json
import math
import os
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1
LABELS = "labels"
"""Name of the array that holds the labels."""

_PAGE = 4096
_PATIENCE = 30.0
"""Seconds that a lock is waited for while nothing changes; who holds it renames, and writes a manifest of some KB."""
_ABANDONED = 86400.0
"""Seconds after which what another computer began to write, and left as it was, may go."""


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

    Where another run has filled the same entry meanwhile, that one stays, since others may be reading it.

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
        self.temporary = self.path.with_name(f"{self.path.name}.{_host()}.{os.getpid()}.tmp")
        self.manifest = folder / f"{name}.json"
        self.before = _content(self.manifest)
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
        """Sync, rename, and only then write the manifest; one run at a time, as each deletes what no manifest names."""
        self.write(0, {LABELS: labels})
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise self._explained(error) from error
        self.file.close()
        segments = [replace(s, crc32=self.crc[s.name]) for s in self.segments.values()]
        with _alone(self.folder / f"{self.name}.lock"):
            held, same_values = self._held(key, segments)
            if held is not None and _content(self.manifest) != self.before:
                self.temporary.unlink(missing_ok=True)  # another run was faster, and may read its entry already
                return
            if held is not None and same_values:
                self.path = held  # nobody who has read the manifest finds the file gone
            os.utime(self.temporary)
            os.replace(self.temporary, self.path)
            if self.path != held:
                listed = [asdict(s) for s in segments]
                manifest = {"format": FORMAT, "key": dict(key), "data": self.path.name, "segments": listed}
                _write_synced(self.manifest, json.dumps(manifest, indent=1))
            now = self.path.stat().st_mtime  # by the folder's own clock, as are the others'
            for old in self.folder.glob(f"{self.name}-*.bin*"):
                if old != self.path and not _being_written(old, now):
                    old.unlink(missing_ok=True)

    def _held(self, key: Mapping[str, Any], segments: list[Segment]) -> tuple[Path | None, bool]:
        """The data file of a whole entry of the same key, and whether its values are those of ``segments``."""
        if not self.manifest.is_file():
            return None, False
        try:
            stored, data, there = read_manifest(self.manifest)
        except ValueError:
            return None, False  # damaged
        return (data, there == segments) if stored == json.loads(json.dumps(dict(key))) else (None, False)

    def abort(self) -> None:
        """Leave nothing behind."""
        self.file.close()
        self.temporary.unlink(missing_ok=True)


def _host() -> str:
    """This computer, in a few characters that a file's name can have."""
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process at a time inside, on network folders as well; what a killed one left goes after a while."""
    seen: tuple[int, int] | None = None
    since = time.monotonic()
    while True:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except FileExistsError:
            now = _identity(path)
            if now != seen:
                seen, since = now, time.monotonic()
            elif now is not None and time.monotonic() - since > _PATIENCE:
                path.unlink(missing_ok=True)
            time.sleep(0.01)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from another one of the same name; None when there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def _being_written(path: Path, now: float) -> bool:
    """Whether a temporary file belongs to a process that lives; what killed ones left may go.

    Those of other computers count as alive until they are a day old at ``now``.
    """
    *_, host, pid = ["", "", *path.suffixes[:-1]] if path.suffix == ".tmp" else ["", ""]
    if not pid[1:].isdigit():
        return False
    if host != f".{_host()}":
        try:
            return now - path.stat().st_mtime < _ABANDONED
        except FileNotFoundError:
            return False
    pid = pid[1:]
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
