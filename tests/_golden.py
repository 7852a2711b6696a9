"""Finds the golden files: numbers that reference implementations produced, as inputs with expected outputs."""

from __future__ import annotations

import os
from pathlib import Path


def golden_root() -> Path:
    """The folder with the golden files: ``CL_GOLDEN`` when set, else the one beside the tests."""
    return Path(os.environ.get("CL_GOLDEN") or Path(__file__).parent / "golden")


def golden_files(kind: str, pattern: str) -> list[Path]:
    """Files of ``<root>/<kind>`` that match ``pattern``, in order of name.

    Raises:
        FileNotFoundError: when there is none, so that an empty folder can never pass as checked.
    """
    files = sorted((golden_root() / kind).glob(pattern))
    if not files:
        raise FileNotFoundError(f"no golden file {pattern!r} in {golden_root() / kind}: copy the golden files there")
    return files
