"""What every codebook of groups shares: its decisions, and the similarity from which a group is reused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

THRESHOLDS = {"strict": 0.90, "loose": 0.30}
"""Thresholds of the released code for ``"tfidf-pair"``: one wording per task, and many wordings per task."""


@dataclass(frozen=True)
class Match:
    """A decision about one task or one set of texts.

    Attributes:
        group: index of the chosen group, from 0; the number of groups when a new one is due.
        scores: similarity to each group.
        expanded: whether a new group is due.
        reason: the decision in words, with its numbers.
        texts: distinct texts it was made on.
        matched: whether the best score reached the threshold.
    """

    group: int
    scores: tuple[float, ...]
    expanded: bool
    reason: str
    texts: tuple[str, ...] = ()
    matched: bool = True

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "scores": list(self.scores), "texts": list(self.texts)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Match:
        """The inverse of :meth:`state_dict`."""
        return cls(**{**state, "scores": tuple(state["scores"]), "texts": tuple(state["texts"])})


def check_threshold(threshold: float | str | None, own_scale: bool) -> float:
    """The threshold as a number; None means the released one, where the scale of similarities is the released one."""
    if threshold is None:
        if own_scale:
            raise ValueError(
                "`threshold` must be given with an encoder of your own, since each has its own scale, got None;"
                " suggest_threshold(...) finds one from a few tasks"
            )
        threshold = "loose"
    if isinstance(threshold, str):
        if threshold not in THRESHOLDS:
            raise ValueError(f"`threshold` must be a number or one of {', '.join(THRESHOLDS)}, got {threshold!r}")
        return THRESHOLDS[threshold]
    if not -1.0 <= threshold <= 1.0:
        raise ValueError(f"`threshold` must be in [-1, 1], got {threshold!r}")
    return float(threshold)
