"""Grouping of tasks without text, by the mean of their features; and thresholds from data instead of by hand."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from cl_plugins.group_match import Match, check_threshold
from cl_plugins.instruction_groups import InstructionGroups
from cl_plugins.text_similarity import Array, clean_texts, cosines

log = logging.getLogger(__name__)


def _rows(features: Any) -> Array:
    if isinstance(features, Tensor):
        features = features.detach().double().cpu()
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f"`features` must have the shape (samples, dim), got {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError("`features` must be finite, got NaN or infinity")
    return rows


class FeatureGroups:
    """Groups tasks whose mean features point the same way; the features come from a frozen network.

    WHEN: as :class:`~cl_plugins.instruction_groups.InstructionGroups`.

    Args:
        threshold: cosine of mean features from which a group is reused, in [-1, 1]; :func:`bootstrap_threshold` gives
            one.

    Raises:
        ValueError: for a threshold out of range.

    Example:
        >>> groups = FeatureGroups(threshold=0.5)
        >>> groups.commit(groups.match([[1.0, 0.0]]))
        0
        >>> groups.match([[0.0, 1.0]]).expanded, groups.match([[0.9, 0.1]]).expanded
        (True, False)
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = check_threshold(threshold, own_scale=True)
        self.means: list[list[Array]] = []  # of each task, by group
        self.history: list[dict[str, Any]] = []
        self._pending: Array | None = None

    def _scores(self, rows: Array) -> Array:
        return np.stack([cosines(rows, np.stack(means)).mean(axis=1) for means in self.means], axis=1)

    def match(self, features: Any) -> Match:
        """Decide for a task from features ``(samples, dim)`` of its training data."""
        mean = _rows(features).mean(axis=0, keepdims=True)
        self._pending = mean[0]
        if not self.means:
            return Match(0, (), True, "new group 0: there is none yet", matched=False)
        scores = tuple(float(s) for s in self._scores(mean)[0])
        best = int(np.argmax(scores))
        if scores[best] >= self.threshold:
            reason = f"reuse group {best}: best score {scores[best]:.3f} reaches the threshold {self.threshold:.3f}"
            return Match(best, scores, False, reason)
        reason = f"new group {len(scores)}: best score {scores[best]:.3f} is below the threshold {self.threshold:.3f}"
        return Match(len(scores), scores, True, reason, matched=False)

    def commit(self, match: Match, task_name: str = "") -> int:
        """Store the mean of the task that :meth:`match` saw last.

        Raises:
            RuntimeError: without a preceding :meth:`match`.
        """
        if self._pending is None:
            raise RuntimeError("`commit` must follow `match`; no task is pending")
        if match.group == len(self.means):
            self.means.append([])
        self.means[match.group].append(self._pending)
        self._pending = None
        log.info("%s: %s", task_name or f"task {len(self.history)}", match.reason)
        self.history.append({"task": task_name, "group": match.group, "scores": list(match.scores),
                             "expanded": match.expanded, "reason": match.reason})  # fmt: skip
        return match.group

    def allocate_samples(self, features: Any) -> list[int]:
        """The nearest group of each sample ``(samples, dim)``.

        Raises:
            RuntimeError: before any task was committed.
        """
        if not self.means:
            raise RuntimeError("`allocate_samples` needs a group; commit the match of a trained task first")
        return [int(g) for g in self._scores(_rows(features)).argmax(axis=1)]

    def state_dict(self) -> dict[str, Any]:
        """Plain Python."""
        return {
            "threshold": self.threshold,
            "means": [[m.tolist() for m in group] for group in self.means],
            "history": [dict(h) for h in self.history],
            "pending": None if self._pending is None else self._pending.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self.threshold = float(state["threshold"])
        self.means = [[np.asarray(m, dtype=np.float64) for m in group] for group in state["means"]]
        self.history = [dict(h) for h in state["history"]]
        pending = state.get("pending")
        self._pending = None if pending is None else np.asarray(pending, dtype=np.float64)


def bootstrap_threshold(features: Any, quantile: float = 0.05, draws: int = 200, seed: int = 0) -> float:
    """A threshold from the spread inside one task: a low quantile of the cosine between means of random halves.

    Args:
        features: ``(samples, dim)`` of one task.
        quantile: share of halves of one task that the threshold would call different, in (0, 1).
        draws: number of random splits.
        seed: of the splits.

    Example:
        >>> bootstrap_threshold([[1.0, 0.0]] * 8)
        1.0
    """
    rows = _rows(features)
    if len(rows) < 4:
        raise ValueError(f"`features` must hold at least 4 samples to be split, got {len(rows)}")
    if not 0.0 < quantile < 1.0:
        raise ValueError(f"`quantile` must be in (0, 1), got {quantile!r}")
    rng, half, values = np.random.default_rng(seed), len(rows) // 2, []
    for _ in range(draws):
        order = rng.permutation(len(rows))
        pair = [rows[order[:half]].mean(axis=0, keepdims=True), rows[order[half:]].mean(axis=0, keepdims=True)]
        values.append(float(cosines(pair[0], pair[1])[0, 0]))
    return min(1.0, float(np.quantile(values, quantile)))


def suggest_threshold(
    groups: InstructionGroups, tasks: Sequence[Sequence[str]], labels: Sequence[int] | None = None
) -> float:
    """A threshold for an encoder from a few tasks: the middle of the gap between similar and different ones.

    Args:
        groups: gives the encoder and the reduction; stays as it is.
        tasks: texts of each task.
        labels: the group that each task should be in; without them the largest gap among all scores is taken.

    Returns:
        The threshold.

    Raises:
        ValueError: for less than three tasks, or when scores within and between the wanted groups overlap.

    Example:
        >>> groups = InstructionGroups()
        >>> texts = [["Translate to French"], ["Translate to Spanish"], ["Count vowels"]]
        >>> round(suggest_threshold(groups, texts, labels=[0, 0, 1]), 3)
        0.168
    """
    cleaned = [clean_texts(t) for t in tasks]
    if len(cleaned) < 3 or (labels is not None and len(labels) != len(cleaned)):
        raise ValueError(f"`tasks` must be at least 3, with a label each or none, got {len(cleaned)}")
    reduce = np.mean if groups.reduce == "mean" else np.max
    scores = {
        (i, j): float(reduce(groups.similarities(cleaned[i], cleaned[j])))
        for i in range(len(cleaned))
        for j in range(i + 1, len(cleaned))
    }
    if labels is None:
        ordered = sorted(scores.values())
        gaps = [b - a for a, b in pairwise(ordered)]
        at = int(np.argmax(gaps))
        return (ordered[at] + ordered[at + 1]) / 2
    within = [s for (i, j), s in scores.items() if labels[i] == labels[j]]
    between = [s for (i, j), s in scores.items() if labels[i] != labels[j]]
    if not within or not between:
        raise ValueError(f"`labels` must name at least two groups and one pair inside a group, got {list(labels)!r}")
    if min(within) <= max(between):
        raise ValueError(
            f"`labels` must be separable, got a score of {min(within):.3f} inside a group and {max(between):.3f}"
            " between two; use another encoder, or more texts per task"
        )
    return (min(within) + max(between)) / 2
