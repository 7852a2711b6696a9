"""Words in error messages, and texts that users write."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import yaml


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` with the nearest known word, or a list of what is known when nothing is near.

    Example:
        >>> did_you_mean("ovro", ["ovor", "finetune"])
        "; did you mean 'ovor'?"
    """
    names = [k for k in known if k]
    near = get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    if 0 < len(names) <= 40:
        return f"; known: {', '.join(sorted(names))}"
    return ""


def parse_yaml(text: str, what: str) -> Any:
    """The value of a YAML text; ``what`` names it in the error.

    Raises:
        ValueError: for what is no YAML, or asks for objects of a program.
    """
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # impossible dates and numbers as well
        reason = getattr(error, "problem", None) or str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"{what} must be YAML, got {text[:80]!r} ({reason}); put text with signs in quotes") from None
