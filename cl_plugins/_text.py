"""Words in error messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


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
