"""Writes the events of a run: one line of JSON each, appended in one system call, so a killed process tears no line.

A run is a folder; each process and each start of it writes its own file there::

    runs/<run id>/events.<rank>.<segment>.jsonl

Every line is one object with ``schema`` (:data:`SCHEMA`), ``kind``, ``time`` (seconds since 1970) and the event's own
fields.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

SCHEMA = 1
"""Version of the event format that this library writes and fully understands."""

_FORBIDDEN = re.compile(r"[/\\\x00-\x1f\x7f]")
_LOOKED_AT_SECONDS = 0.05
_LOCKED_BYTE = (1 << 31) - 2
"""Windows locks bytes against readers as well, so the lock is on one that no file reaches."""
_EVENT_FILE = re.compile(r"events\.(\d+)\.(\d+)\.jsonl")


def check_run_id(run_id: str) -> str:
    r"""A run's name that is safe as the name of a folder.

    Raises:
        TypeError: when it is no text.
        ValueError: when it would lead out of its folder, hide it, or is too long for a file system.

    Example:
        >>> check_run_id("ovor, seed 0")
        'ovor, seed 0'
    """
    if not isinstance(run_id, str):
        raise TypeError(f"`run_id` must be text, got {run_id!r}")
    unsafe = not run_id.strip() or run_id.startswith(".") or _FORBIDDEN.search(run_id)
    if unsafe or len(os.fsencode(run_id.encode("utf-8", "replace"))) > 200:
        mended = _FORBIDDEN.sub("_", run_id).strip().lstrip(".")[:60] or "run"
        raise ValueError(
            "`run_id` must be a name of at most 200 bytes without path separators, control characters or a leading dot,"
            f" got {run_id!r}; use {mended!r}, or name the folder in `root`"
        )
    return run_id


def new_run_id() -> str:
    """A name from the time and four random letters, which sorts by age."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def event_files(folder: Path) -> list[tuple[int, int, Path]]:
    """``(rank, segment, file)`` of a run's event files, in this order."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _EVENT_FILE.fullmatch(path.name)
        if match:
            found.append((int(match[1]), int(match[2]), path))
    return sorted(found)


def _plain(value: Any) -> Any:
    """What JSON does not know, as something that it does: arrays and tensors as lists, the rest as text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return str(value)


def _finite(value: Any) -> Any:
    """The same with NaN and infinities as None, and with text as keys."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return _finite(_plain(value))


_encode = json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=_plain).encode


def encode_event(event: Mapping[str, Any]) -> bytes:
    r"""One line of ASCII JSON; NaN and infinities become null.

    Example:
        >>> encode_event({"kind": "cost", "seconds": float("nan")})
        b'{"kind":"cost","seconds":null}\n'
    """
    try:
        text = _encode(event)
    except (ValueError, TypeError):
        text = _encode(_finite(event))
    return f"{text}\n".encode("ascii")


def _lock(descriptor: int) -> bool:
    """Hold the file for this process until it ends, however it ends; False when another one holds it."""
    if sys.platform == "win32":
        import msvcrt

        position = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(descriptor, position, os.SEEK_SET)
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_being_written(folder: str | Path) -> bool:
    """Whether a live process writes the run in ``folder``; one that was killed holds nothing.

    Example:
        >>> import tempfile
        >>> writer = RunWriter(tempfile.mkdtemp(), "demo")
        >>> is_being_written(writer.folder)
        True
        >>> writer.close()
        >>> is_being_written(writer.folder)
        False
    """
    path = Path(folder) / "events.0.0.jsonl"
    if not path.is_file():
        return False
    descriptor = os.open(path, os.O_RDWR)
    try:
        return not _lock(descriptor)
    finally:
        os.close(descriptor)


class RunWriter:
    """Appends events to a run's file of this process.

    WHEN: a line is in the operating system's hands when :meth:`write` returns, so it survives ``kill -9``; after
    :meth:`sync` it survives a power cut as well. A second start under the same name goes on in a new file.

    Args:
        root: folder of all runs; created when missing.
        run_id: the run's name and folder below ``root``; time and random letters when None.
        rank: number of this process among those of the run, 0 for one process.

    Raises:
        ValueError: for a name that is no safe folder name, or a negative rank.
        RuntimeError: when another live process writes this run.

    Example:
        >>> import tempfile
        >>> with RunWriter(tempfile.mkdtemp(), "demo") as writer:
        ...     writer.write("task", index=0, name="digits 0 and 1", classes=[0, 1])
        ...     writer.write("row", after=0, correct=[9], total=[10])
        >>> [path.name for path in writer.folder.iterdir()]
        ['events.0.0.jsonl']
    """

    def __init__(self, root: str | Path, run_id: str | None = None, rank: int = 0) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ValueError(f"`rank` must be an integer of 0 or more, got {rank!r}")
        self.run_id = new_run_id() if run_id is None else check_run_id(run_id)
        self.rank = rank
        self.folder = Path(root) / self.run_id
        self._file = self._lock_file = -1
        self._torn = False
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock_file = self._open(0)
        free = _lock(self._lock_file)
        if not free:  # it may only have been looked at, see `is_being_written`
            time.sleep(_LOOKED_AT_SECONDS)
            free = _lock(self._lock_file)
        if not free:
            os.close(self._lock_file)
            self._lock_file = -1
            raise RuntimeError(
                f"run {self.run_id!r} in {str(Path(root))!r} is being written by another process{self._owner()};"
                " give this one its own `run_id`, or stop the other before resuming the run"
            )
        segments = [n for r, n, path in event_files(self.folder) if r == rank and path.stat().st_size > 0]
        self.segment = max(segments, default=-1) + 1
        self._file = self._lock_file if self.segment == 0 else self._open(self.segment)
        self.write("segment", run=self.run_id, rank=rank, segment=self.segment, pid=os.getpid(), host=platform.node())

    def _open(self, segment: int) -> int:
        path = self.folder / f"events.{self.rank}.{segment}.jsonl"
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o644)

    def _owner(self) -> str:
        """Who holds the run, as far as its newest file tells."""
        for rank, _, path in reversed(event_files(self.folder)):
            if rank == self.rank:
                with path.open("rb") as file:
                    first = file.readline(4096)
                try:
                    event = json.loads(first)
                    return f" (process {int(event['pid'])} on {event['host']})"
                except (ValueError, KeyError, TypeError):
                    continue
        return ""

    @property
    def path(self) -> Path:
        """The file that this writer appends to."""
        return self.folder / f"events.{self.rank}.{self.segment}.jsonl"

    def write(self, kind: str, /, **fields: Any) -> None:
        """Append one event.

        Args:
            kind: what it is: run, task, row, mid, conf, rep, cost, plug, alert, end, or a kind of your own.
            **fields: plain values, arrays or tensors; NaN and infinities are written as null, and ``schema``, ``kind``
                and ``time`` are this event's own.

        Raises:
            RuntimeError: after :meth:`close`.
            OSError: when the disk is full.
        """
        if self._file < 0:
            raise RuntimeError(f"run {self.run_id!r} is closed; open a new RunWriter to go on in a new file")
        envelope = {"schema": SCHEMA, "kind": kind, "time": round(time.time(), 3)}
        line = encode_event({**envelope, **fields, **envelope})
        if self._torn:
            line = b"\n" + line
        self._torn = True  # until the whole line is out
        written = os.write(self._file, line)
        while written < len(line):
            written += os.write(self._file, line[written:])
        self._torn = False

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        if self._file >= 0:
            os.fsync(self._file)

    def close(self) -> None:
        """Sync and close; a repeated call changes nothing."""
        descriptors = {self._file, self._lock_file} - {-1}
        try:
            self.sync()
        finally:
            self._file = self._lock_file = -1
            for descriptor in descriptors:
                os.close(descriptor)

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
