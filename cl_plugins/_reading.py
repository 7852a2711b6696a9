"""Reading files that may be damaged or not what they seem: what is wrong is said in words, naming the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        ValueError: for other bytes.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} must be UTF-8 text, got byte {error.start} that is not") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: for what is no JSON, as a file that was cut off.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} must be JSON, got {error.msg} in line {error.lineno}") from None
    except (RecursionError, ValueError) as error:  # nested without end, or a number of too many digits
        raise ValueError(f"{str(path)!r} must be JSON, got {error}") from None


def load_tensors(path: Path) -> Any:
    """What ``torch.save`` wrote, as tensors and plain values; code in the file is never run.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: for a damaged file, or one with other things in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there must be a file {str(path)!r}, got none")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise a dozen types, OSError among them
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise ValueError(
            f"{str(path)!r} must be a whole checkpoint of tensors and plain values, got one that is damaged or holds"
            f" other objects ({reason}); go on from an earlier one"
        ) from error


def read_safetensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file.

    Raises:
        ValueError: for a damaged file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            names = file.keys()  # the file itself is no mapping
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError, OverflowError) as error:
        raise ValueError(f"`path` must be a whole safetensors file, got {str(path)!r}: {error}") from error
