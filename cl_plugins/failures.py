"""Says of a failure what happened, what is saved and how to go on."""

from __future__ import annotations

import errno
from pathlib import Path

from cl_plugins.checkpoint_files import checkpoint_files

_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")
_WORKER = ("DataLoader worker", "worker process")


class RunStopped(RuntimeError):
    """A run that ended early but can go on; the text says how."""


def what_happened(error: BaseException) -> tuple[str, str] | None:
    """A failure of the machine or the numbers, and what mends it; None for every other error.

    Example:
        >>> what_happened(MemoryError())
        ('the memory was not enough', 'free some')
        >>> what_happened(KeyError("x")) is None
        True
    """
    text = str(error)
    if isinstance(error, MemoryError) or any(word in text for word in _MEMORY):
        return "the memory was not enough", "free some"
    if any(word in text for word in _WORKER):
        return "a process that loads data died, often for want of memory", "free some or use fewer workers"
    if isinstance(error, OSError):
        cause: BaseException | None = error
        while isinstance(cause, OSError) and cause.errno is None:  # one of ours, around the system's
            cause = cause.__cause__
        number = cause.errno if isinstance(cause, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
            return "the disk is full", "make room"
        if number in (errno.EROFS, errno.EACCES, errno.EPERM) or "Read-only file system" in text:
            return "the folder cannot be written", "allow writing there"
        return "a file could not be read or written", "mend what the message names"
    if isinstance(error, FloatingPointError):
        return (
            "the loss is not finite",
            "start anew with a lower learning rate; the same settings would fail the same way",
        )
    return None


def explained(error: BaseException, checkpoints: Path) -> RunStopped | None:
    """The failure as an error whose text says what happened, what is saved and how to go on."""
    found = what_happened(error)
    if found is None:
        return None
    happened, mend = found
    try:
        files = checkpoint_files(checkpoints)
    except OSError:
        files = []
    saved = f"saved up to {files[-1].name} in {str(checkpoints)!r}" if files else "nothing is saved yet"
    go_on = mend if isinstance(error, FloatingPointError) else f"{mend}, then run the same command with --resume"
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return RunStopped(f"{happened} ({first}); {saved}; to go on: {go_on}")
