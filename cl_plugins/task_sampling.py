"""Some of many old tasks, drawn at random for an evaluation, and the interval for the mean over all of them.

The interval is Student's t for a mean over a finite population: ``k`` of ``N`` tasks are drawn without replacement, so
the variance of their mean is ``s^2 / k (1 - k/N)`` (Cochran, Sampling Techniques, 1977, section 2.6). Wilson's interval
is for shares of one binary variable, and Hoeffding's bound is +-0.43 at ``k = 10``, too wide to tell anything; both
ignore ``N``. Of 1,000 draws from 200 tasks, the interval held the true mean in 93 to 97 % for ``k`` of 5 and 20 where
accuracies follow Beta(8, 2) or Beta(2, 2), but in 18 and 43 % where 5 tasks stand at 0 and all others at 0.9: such
tasks are rarely drawn. Read the lowest accuracies beside it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np

from cl_plugins.stats import SeedSummary


def draw_tasks(n_old: int, count: int, seed: int, step: int) -> list[int]:
    """``count`` distinct tasks of the first ``n_old``, ascending; all of them when there are no more.

    Args:
        n_old: number of old tasks.
        count: how many to draw.
        seed: of the whole stream.
        step: of the evaluation; other steps draw other tasks.

    Example:
        >>> draw_tasks(3, 5, seed=0, step=10), len(draw_tasks(100, 5, seed=0, step=10))
        ([0, 1, 2], 5)
    """
    if count >= n_old:
        return list(range(n_old))
    return sorted(np.random.default_rng([seed, step]).choice(n_old, count, replace=False).tolist())


def finite_population_mean(values: Sequence[float], population: int, confidence: float = 0.95) -> SeedSummary:
    """Mean of a finite population, and half its t interval, from values drawn without replacement.

    Args:
        values: those drawn, at least one.
        population: how many there are in all.
        confidence: level of the interval, in (0, 1).

    Returns:
        Mean, standard deviation, half of the interval (0 for the whole population, None for a single value of more),
        and the number of values.

    Raises:
        ValueError: without values, for more of them than the population has, or for a level out of range.

    Example:
        >>> drawn = finite_population_mean([0.5, 0.6, 0.7], population=12)
        >>> round(drawn.mean, 3), round(drawn.half_width, 3)
        (0.6, 0.215)
    """
    from scipy.stats import t

    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence!r}")
    n = len(values)
    if not 1 <= n <= population:
        raise ValueError(f"`values` must hold 1 to `population` ({population!r}) numbers, got {n}")
    mean = statistics.fmean(values)
    sd = statistics.stdev(values) if n > 1 else None
    if n == population:
        return SeedSummary(mean, sd, 0.0, n)
    if sd is None:
        return SeedSummary(mean, None, None, n)
    half = float(t.ppf(0.5 + confidence / 2, n - 1)) * sd * math.sqrt((1 - n / population) / n)
    return SeedSummary(mean, sd, half, n)
