"""Statistics over runs against scipy and enumeration."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from cl_plugins.stats import aggregate_rankings, compare, holm, sign_flip_test, summarize_seeds

runs = st.lists(st.floats(0, 1, width=32), min_size=3, max_size=8)


@given(runs)
@settings(max_examples=30, deadline=None)
def test_the_interval_is_the_t_interval(values):
    summary = summarize_seeds(values)
    assert summary.mean == pytest.approx(np.mean(values))
    assert summary.sd == pytest.approx(np.std(values, ddof=1), abs=1e-12)
    factor = scipy_stats.t.ppf(0.975, len(values) - 1)
    assert summary.half_width == pytest.approx(factor * np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-12)


def test_below_three_runs_there_is_no_interval():
    assert summarize_seeds([0.4]) == (0.4, None, None, 1)
    assert summarize_seeds([0.4, 0.6]).half_width is None
    assert summarize_seeds([0.4, 0.6]).n == 2


@given(st.lists(st.tuples(st.integers(0, 64), st.integers(0, 64)), min_size=1, max_size=7))
@settings(max_examples=40, deadline=None)
def test_sign_flips_equal_enumeration(pairs):
    first, second = ([value / 64 for value in side] for side in zip(*pairs, strict=True))
    differences = [a - b for a, b in pairs]
    signs = itertools.product([1, -1], repeat=len(pairs))
    sums = [sum(s * d for s, d in zip(chosen, differences, strict=True)) for chosen in signs]
    assert sign_flip_test(first, second) == np.mean([abs(s) >= abs(sum(differences)) for s in sums])


def test_six_pairs_are_the_first_that_can_pass():
    assert sign_flip_test([1.0] * 5, [0.0] * 5) == 0.0625
    assert sign_flip_test([1.0] * 6, [0.0] * 6) == 0.03125
    assert sign_flip_test([0.5] * 4, [0.5] * 4) == 1.0


def test_holm_is_monotone_and_bounded():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_compare_all_pairs_or_one_baseline():
    scores = {"a": [0.5, 0.6, 0.7], "b": [0.4, 0.6, 0.6], "c": [0.1, 0.2, 0.3]}
    assert [(r.first, r.second) for r in compare(scores)] == [("a", "b"), ("a", "c"), ("b", "c")]
    against = compare(scores, baseline="b")
    assert [(r.first, r.second) for r in against] == [("a", "b"), ("c", "b")]
    assert against[0].difference.mean == pytest.approx(0.2 / 3)
    assert all(r.adjusted_p >= r.p_value for r in compare(scores))


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=2, max_size=5))
@settings(max_examples=40, deadline=None)
def test_kemeny_orders_have_the_fewest_disagreements(columns):
    scores = np.array(columns).T

    def disagreements(order):
        return sum((scores[b] > scores[a]).sum() for a, b in itertools.combinations(order, 2))

    result = aggregate_rankings(scores, "kemeny")
    costs = {order: disagreements(order) for order in itertools.permutations(range(3))}
    assert result.cost == min(costs.values())
    assert result.orders == [order for order, cost in costs.items() if cost == result.cost]


def test_borda_shares_middle_ranks_and_returns_every_order_of_a_tie():
    ranks = scipy_stats.rankdata(-np.array([[0.5, 0.1], [0.5, 0.3], [0.2, 0.2]]), axis=0) - 1
    result = aggregate_rankings([[0.5, 0.1], [0.5, 0.3], [0.2, 0.2]])
    assert result.rank_sums == ranks.sum(1).tolist()
    assert aggregate_rankings([[1.0], [1.0]]).orders == [(0, 1), (1, 0)]
    assert aggregate_rankings([[1.0, 3.0], [2.0, 4.0]], higher_is_better=False).orders == [(0, 1)]


def test_level_two_counts_each_benchmark_once():
    scores = np.zeros((2, 2, 3))
    scores[0, 0] = 1.0  # the first system wins one benchmark in all seeds
    scores[1, 1, 0] = 1.0  # the second wins the other in one seed and ties in two
    assert aggregate_rankings(scores, level=1).orders == [(0, 1)]
    assert aggregate_rankings(scores, level=2).orders == [(0, 1), (1, 0)]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: summarize_seeds([]), "`values` must be finite numbers of at least one run"),
        (lambda: summarize_seeds([math.nan]), "`values` must be finite numbers of at least one run"),
        (lambda: summarize_seeds([0.5], confidence=95), "`confidence` must be between 0 and 1, got 95"),
        (lambda: sign_flip_test([1.0], []), "must hold the same runs, got 1 and 0 values"),
        (
            lambda: sign_flip_test([1.0] * 21, [0.0] * 21),
            "at most 20 runs for the exact test, got 21; use the t interval",
        ),
        (lambda: holm([1.5]), r"`p_values` must lie in \[0, 1\], got \[1.5\]"),
        (lambda: compare({"a": [1.0]}), r"`runs` must hold two methods or more and the baseline, got \['a'\]"),
        (lambda: aggregate_rankings([[1.0]], "mean"), "`method` must be 'borda' or 'kemeny' and `level` 1 or 2"),
        (lambda: aggregate_rankings([1.0]), r"`scores` must be \(systems, cells\) or .*got shape \(1,\)"),
        (lambda: aggregate_rankings([[1.0]] * 9, "kemeny"), "at most 8 systems for 'kemeny', got 9; use 'borda'"),
    ],
)
def test_error_texts(call, text):
    with pytest.raises(ValueError, match=text):
        call()
