"""Checkpoint files that are whole or not there: written beside, synced, renamed, with a SHA-256 checksum.

A folder holds ``stream-<number>-task-<task>-step-<step>.ckpt`` and, for each, ``<name>.sha256`` in the format of
``sha256sum``, so ``sha256sum -c *.sha256`` checks them without this library. The checksum is written first: a
checkpoint without one is not finished. Numbers are never used twice.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path

_NAME = re.compile(r"stream-(\d{6,})-task-(\d+)-step-(\d+)\.ckpt")
_BLOCK = 1 << 20


def checkpoint_files(folder: str | Path) -> list[Path]:
    """The stream checkpoints in a folder, oldest first.

    Example:
        >>> checkpoint_files("no such folder")
        []
    """
    return [p for _, p in _numbered(Path(folder))]


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    names = folder.iterdir() if folder.is_dir() else ()
    return sorted((int(m[1]), p) for p in names if (m := _NAME.fullmatch(p.name)))


def sha256(path: Path) -> str:
    """Checksum of a file's bytes, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _sums(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file; None when its checksum fits."""
    try:
        words = _sums(path).read_text(encoding="ascii").split()
    except FileNotFoundError:
        return "its checksum file is missing"
    except UnicodeDecodeError:
        return "its checksum file cannot be read"
    if not words or sha256(path) != words[0]:
        return "its SHA-256 checksum does not fit"
    return None


def newest_intact(folder: str | Path) -> Path | None:
    """The newest checkpoint whose checksum fits; damaged ones are left out with a warning that names them.

    Returns:
        None when the folder holds no checkpoint at all.

    Raises:
        ValueError: when there are checkpoints and every one is damaged.
    """
    files = checkpoint_files(folder)
    for path in reversed(files):
        wrong = damage(path)
        if wrong is None:
            return path
        warnings.warn(f"the checkpoint {path} is damaged, {wrong}; the one before it is taken", stacklevel=2)
    if files:
        raise ValueError(f"every checkpoint in {str(folder)!r} is damaged; start anew without `ckpt_path`")
    return None


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(folder: str | Path, task: int, step: int, write: Callable[[Path], None], keep: int = 2) -> Path:
    """Write a checkpoint so that a reader, or a crash at any moment, sees all of it or nothing.

    Args:
        folder: of the checkpoints; created when missing.
        task: the task under way, or the next one.
        step: optimizer steps so far.
        write: writes the checkpoint to the temporary path it is given.
        keep: how many checkpoints stay; older ones are removed when the new one is safe.

    Returns:
        The file.

    Raises:
        OSError: when it cannot be written; checkpoints from before stay, and nothing half-written does.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    old = _numbered(target)
    number = 1 + max((n for n, _ in old), default=-1)
    path = target / f"stream-{number:06d}-task-{task}-step-{step}.ckpt"
    temporary, sums = target / f".{path.name}.{os.getpid()}.tmp", _sums(path)
    try:
        write(temporary)
        _sync(temporary)
        sums.write_text(f"{sha256(temporary)}  {path.name}\n", encoding="ascii")
        _sync(sums)
        temporary.replace(path)
    except BaseException:  # Ctrl-C as well leaves nothing half-written
        temporary.unlink(missing_ok=True)
        if not path.exists():
            sums.unlink(missing_ok=True)
        raise
    _sync(target)
    keep_newest(target, keep)
    return path


def keep_newest(folder: Path, keep: int = 1) -> None:
    """Remove what is older than the newest ``keep``, and what killed processes left."""
    files = checkpoint_files(folder)
    for path in files[:-keep]:
        path.unlink(missing_ok=True)
    kept = {p.name for p in files[-keep:]}
    for path in (*folder.glob("stream-*.ckpt.sha256"), *folder.glob(".stream-*.tmp")):
        if path.name.removesuffix(".sha256") not in kept:
            path.unlink(missing_ok=True)
