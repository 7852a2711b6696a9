"""Statistics over runs: a run, not a task inside it, is the unit of replication."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class SeedSummary(NamedTuple):
    """Mean of runs with its interval.

    Attributes:
        mean: arithmetic mean.
        sd: standard deviation with n - 1; None for one run.
        half_width: half of the t interval; None below three runs, where it would say little.
        n: number of runs.
    """

    mean: float
    sd: float | None
    half_width: float | None
    n: int


def summarize_seeds(values: Sequence[float], confidence: float = 0.95) -> SeedSummary:
    """Mean, standard deviation and t interval over runs.

    Args:
        values: one number a run.
        confidence: level of the interval, in (0, 1).

    Raises:
        ValueError: without values, with NaN among them, or for a level out of range.

    Example:
        >>> summary = summarize_seeds([0.5, 0.6, 0.7])
        >>> round(summary.mean, 3), round(summary.half_width, 3), summary.n
        (0.6, 0.248, 3)
    """
    from scipy.stats import t

    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence!r}")
    if not values or any(not math.isfinite(v) for v in values):
        raise ValueError(f"`values` must be finite numbers of at least one run, got {list(values)!r}")
    n = len(values)
    mean = statistics.fmean(values)
    if n == 1:
        return SeedSummary(mean, None, None, 1)
    sd = statistics.stdev(values)
    half = float(t.ppf(0.5 + confidence / 2, n - 1)) * sd / math.sqrt(n) if n >= 3 else None
    return SeedSummary(mean, sd, half, n)
