"""Statistics over runs: a run, not a task inside it, is the unit of replication.

Use the same order seeds for every method and compare pairwise. Five pairs cannot go below p = 0.0625 in the two-sided
sign-flip test; six are the first that can pass 0.05.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_EXACT_PAIRS = 20
_EXACT_SYSTEMS = 8


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


class Comparison(NamedTuple):
    """Paired comparison of two methods over the same runs.

    Attributes:
        first: name of the first method.
        second: name of the second method.
        difference: summary of first minus second.
        p_value: two-sided, of the exact sign-flip test.
        adjusted_p: the same after Holm's correction over all comparisons made together.
    """

    first: str
    second: str
    difference: SeedSummary
    p_value: float
    adjusted_p: float


class Ranking(NamedTuple):
    """Consensus of several rankings.

    Attributes:
        rank_sums: sum of ranks of each system, from 0 for the best; equal scores share the middle rank.
        orders: all optimal orders, each from best to worst; several when the data does not decide.
        cost: pairwise disagreements with an optimal order; None for Borda.
        method: what was computed.
    """

    rank_sums: list[float]
    orders: list[tuple[int, ...]]
    cost: float | None
    method: Literal["borda", "kemeny"]


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
    runs = [float(v) for v in values]
    if not runs or any(not math.isfinite(v) for v in runs):
        raise ValueError(f"`values` must be finite numbers of at least one run, got {runs!r}")
    n = len(runs)
    mean = statistics.fmean(runs)
    if n == 1:
        return SeedSummary(mean, None, None, 1)
    sd = statistics.stdev(runs)
    half = float(t.ppf(0.5 + confidence / 2, n - 1)) * sd / math.sqrt(n) if n >= 3 else None
    return SeedSummary(mean, sd, half, n)


def sign_flip_test(first: Sequence[float], second: Sequence[float]) -> float:
    """Exact two-sided p value of the mean paired difference: all ``2^n`` assignments of signs.

    Args:
        first: one number a run.
        second: the same runs (seeds) of the other method.

    Raises:
        ValueError: for unequal or empty runs, or more pairs than can be enumerated.

    Example:
        >>> sign_flip_test([0.8, 0.7, 0.9, 0.8, 0.7, 0.8], [0.6, 0.6, 0.7, 0.7, 0.5, 0.7])
        0.03125
    """
    differences = np.array(_paired(first, second))
    n = len(differences)
    if n > _EXACT_PAIRS:
        raise ValueError(
            f"`first` must hold at most {_EXACT_PAIRS} runs for the exact test, got {n}; use the t interval"
        )
    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    observed = abs(float(differences.sum()))
    tolerance = 1e-12 * max(1.0, float(np.abs(differences).sum()))
    return float(np.mean(np.abs(sums) >= observed - tolerance))


def _paired(first: Sequence[float], second: Sequence[float]) -> list[float]:
    if len(first) != len(second) or not len(first):
        raise ValueError(f"`first` and `second` must hold the same runs, got {len(first)} and {len(second)} values")
    return [float(a) - float(b) for a, b in zip(first, second, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction for several comparisons, in the order given.

    Raises:
        ValueError: for a value outside [0, 1].

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    if any(not 0 <= p <= 1 for p in p_values):
        raise ValueError(f"`p_values` must lie in [0, 1], got {list(p_values)!r}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def compare(
    runs: Mapping[str, Sequence[float]], baseline: str | None = None, confidence: float = 0.95
) -> list[Comparison]:
    """Paired comparison of methods that ran with the same seeds.

    Args:
        runs: one number a run for each method, runs in the same order of seeds.
        baseline: compare every other method with this one; None for all pairs.
        confidence: level of the intervals, in (0, 1).

    Raises:
        ValueError: for fewer than two methods, an unknown baseline, or different numbers of runs.

    Example:
        >>> (result,) = compare({"new": [0.8, 0.7, 0.9], "old": [0.6, 0.6, 0.7]})
        >>> round(result.difference.mean, 3), result.p_value
        (0.167, 0.25)
    """
    if len(runs) < 2 or (baseline is not None and baseline not in runs):
        raise ValueError(f"`runs` must hold two methods or more and the baseline, got {list(runs)!r}, {baseline!r}")
    names = list(runs)
    pairs = list(itertools.combinations(names, 2))
    if baseline is not None:
        pairs = [(name, baseline) for name in names if name != baseline]
    tests = [sign_flip_test(runs[a], runs[b]) for a, b in pairs]
    return [
        Comparison(a, b, summarize_seeds(_paired(runs[a], runs[b]), confidence), p, adjusted)
        for (a, b), p, adjusted in zip(pairs, tests, holm(tests), strict=True)
    ]


class VarianceParts(NamedTuple):
    """Where runs differ: between class orders, and between seeds under the same order.

    Attributes:
        order_sd: standard deviation between orders, 0 when seeds alone explain the differences.
        seed_sd: standard deviation between runs of one order.
        orders: number of orders.
        runs: number of runs.
    """

    order_sd: float
    seed_sd: float
    orders: int
    runs: int


def variance_parts(groups: Sequence[Sequence[float]]) -> VarianceParts | None:
    """Split the variance of runs into class orders and seeds: one-way random effects, analysis of variance.

    Args:
        groups: the runs of each order; their numbers may differ.

    Returns:
        Both parts; None with fewer than two orders, or when every order has one run, which mixes the two up.

    Raises:
        ValueError: for values that are not finite.

    Example:
        >>> parts = variance_parts([[0.80, 0.82], [0.90, 0.92]])
        >>> round(parts.order_sd, 4), round(parts.seed_sd, 4)
        (0.07, 0.0141)
    """
    kept = [[float(v) for v in group] for group in groups if len(group)]
    if any(not math.isfinite(v) for group in kept for v in group):
        raise ValueError(f"`groups` must hold finite numbers, got {kept!r}")
    runs, orders = sum(map(len, kept)), len(kept)
    if orders < 2 or runs == orders:
        return None
    total = statistics.fmean(v for group in kept for v in group)
    means = [statistics.fmean(group) for group in kept]
    within = sum((v - m) ** 2 for group, m in zip(kept, means, strict=True) for v in group) / (runs - orders)
    between = sum(len(g) * (m - total) ** 2 for g, m in zip(kept, means, strict=True)) / (orders - 1)
    size = (runs - sum(len(g) ** 2 for g in kept) / runs) / (orders - 1)
    return VarianceParts(math.sqrt(max(0.0, (between - within) / size)), math.sqrt(within), orders, runs)


def _ranks(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks within the columns of ``(systems, cells)`` from 0 for the highest score; ties share the middle."""
    higher = (scores[None, :, :] > scores[:, None, :]).sum(1)  # systems above each system
    equal = (scores[None, :, :] == scores[:, None, :]).sum(1) - 1
    ranks: NDArray[np.float64] = higher + equal / 2
    return ranks


def aggregate_rankings(
    scores: ArrayLike,
    method: Literal["borda", "kemeny"] = "borda",
    level: Literal[1, 2] = 1,
    higher_is_better: bool = True,
) -> Ranking:
    """One ranking of systems from many benchmarks, without averaging scores of different scales.

    Colombo et al. 2022, arXiv:2202.03799.

    Args:
        scores: ``(systems, cells)`` or ``(systems, benchmarks, seeds)``.
        method: ``"borda"`` sorts by the sum of ranks; ``"kemeny"`` finds the orders with the fewest pairwise
            disagreements, exactly, for up to 8 systems.
        level: 1 ranks in every cell; 2 ranks by the sum of ranks inside each benchmark first, so that a benchmark
            with more seeds does not count more.
        higher_is_better: whether the highest score is the best.

    Raises:
        ValueError: for a wrong shape, NaN, an unknown choice, or Kemeny with more than 8 systems.

    Example:
        >>> cycle = [[0.9, 0.5, 0.7], [0.7, 0.9, 0.5], [0.5, 0.7, 0.9]]
        >>> aggregate_rankings(cycle, "kemeny").orders
        [(0, 1, 2), (1, 2, 0), (2, 0, 1)]
    """
    if method not in ("borda", "kemeny") or level not in (1, 2):
        raise ValueError(f"`method` must be 'borda' or 'kemeny' and `level` 1 or 2, got {method!r} and {level!r}")
    table = np.asarray(scores, dtype=np.float64)
    if table.ndim not in (2, 3) or not table.size or np.isnan(table).any():
        raise ValueError(f"`scores` must be (systems, cells) or (systems, benchmarks, seeds), got shape {table.shape}")
    table = table if higher_is_better else -table
    systems = len(table)
    if level == 2 and table.ndim == 3:
        inside = [_ranks(table[:, b, :]).sum(1) for b in range(table.shape[1])]
        table = -np.stack(inside, axis=1)
    ranks = _ranks(table.reshape(systems, -1))
    sums = ranks.sum(1)
    if method == "borda":
        return Ranking(sums.tolist(), _orders_by(sums), None, "borda")
    if systems > _EXACT_SYSTEMS:
        raise ValueError(
            f"`scores` must hold at most {_EXACT_SYSTEMS} systems for 'kemeny', got {systems}; use 'borda'"
        )
    above = (ranks[:, None, :] < ranks[None, :, :]).sum(-1)  # cells in which the first beats the second
    orders = np.array(list(itertools.permutations(range(systems))))
    costs = np.zeros(len(orders), np.int64)
    for a, b in itertools.combinations(range(systems), 2):
        costs += above[orders[:, b], orders[:, a]]
    best = int(costs.min())
    return Ranking(sums.tolist(), [tuple(o) for o in orders[costs == best].tolist()], best, "kemeny")


def _orders_by(sums: NDArray[np.float64]) -> list[tuple[int, ...]]:
    """All orders by ascending sum; members of a tie of up to 8 systems in every order."""
    groups = [[index for index in range(len(sums)) if sums[index] == value] for value in np.unique(sums)]
    if math.prod(math.factorial(len(group)) for group in groups) > math.factorial(_EXACT_SYSTEMS):
        return [tuple(itertools.chain.from_iterable(groups))]
    choices = itertools.product(*(itertools.permutations(group) for group in groups))
    return [tuple(itertools.chain.from_iterable(choice)) for choice in choices]
