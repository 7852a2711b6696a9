"""The numbers of continual evaluation from rows: short formulas of their own, intervals, what is undefined."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_plugins import functional, metrics
from cl_plugins.inside_tasks import InsideRow, InsideTasks, sorted_rows
from cl_plugins.task_sampling import draw_tasks, finite_population_mean

N = 20


def _row(step, task, correct, end=False, tasks=None, every=2, sampled=False):
    tasks = tuple(range(len(correct))) if tasks is None else tuple(tasks)
    return InsideRow(
        step, task, task, task + 1, tasks, tuple(correct), (N,) * len(tasks), tuple(correct), every, sampled, end
    )


@st.composite
def streams(draw):
    """Rows of a stream of 1 to 3 tasks with 1 to 3 evaluations in each and one at its end."""
    rows, step = [], 0
    for task in range(draw(st.integers(1, 3))):
        for _ in range(draw(st.integers(1, 3))):
            step += 2
            rows.append(_row(step, task, draw(st.lists(st.integers(0, N), min_size=task + 1, max_size=task + 1))))
        step += draw(st.integers(0, 1))  # a task may end at the step of an evaluation
        rows.append(_row(step, task, draw(st.lists(st.integers(0, N), min_size=task + 1, max_size=task + 1)), True))
        step += step % 2
    return rows


@given(streams())
@settings(max_examples=60, deadline=None)
def test_the_numbers_follow_their_definitions(rows):
    inside = InsideTasks(rows, window=3)
    values = inside.metrics()
    ends = {(r.task, r.step) for r in rows if r.end}
    trace = [r for r in rows if r.end or (r.task, r.step) not in ends]
    n_tasks = rows[-1].task + 1
    accuracy = {j: [(k, r.correct[j] / N) for k, r in enumerate(trace) if j <= r.task] for j in range(n_tasks)}
    end_of = {r.task: k for k, r in enumerate(trace) if r.end}

    def near(key, expected):
        if expected is None:
            assert values[key] is None
            assert key in inside.undefined()
        else:
            assert values[key] == pytest.approx(expected)

    lows = [min(a for k, a in accuracy[j] if k > end_of[j]) for j in range(n_tasks - 1)]
    low = statistics.fmean(lows) if lows else None
    near("min_accuracy@every=2", low)
    now = accuracy[n_tasks - 1][-1][1]
    near("worst_case_accuracy@every=2", now if low is None else now / n_tasks + (1 - 1 / n_tasks) * low)
    for name, sign in (("forgetting", 1), ("plasticity", -1)):
        largest = [
            max([0.0, *(sign * (a - b) for k, a in of for m, b in of if k < m <= k + 2)]) for of in accuracy.values()
        ]
        near(f"windowed_{name}[window=3]@every=2", statistics.fmean(largest))
    dips = []
    for old in range(n_tasks - 1):
        for switch in range(old, n_tasks - 1):
            at = dict(accuracy[old])
            after = [at[k] for k in range(end_of[switch] + 1, end_of[switch + 1] + 1)]
            back = [i for i, a in enumerate(after, 1) if a >= at[end_of[switch]] and i > after.index(min(after))]
            depth = at[end_of[switch]] - min(after)
            dips.append((depth, at[end_of[switch]] - after[-1], back[0] if back else None))
    near("stability_gap[depth]@every=2", statistics.fmean(d for d, _, _ in dips) if dips else None)
    near("stability_gap[residual]@every=2", statistics.fmean(r for _, r, _ in dips) if dips else None)
    fell = [b for d, _, b in dips if d > 0]
    steps = [b for b in fell if b is not None]
    near("stability_gap[recovered]@every=2", len(steps) / len(fell) if fell else None)
    near("stability_gap[recovery_steps]@every=2", statistics.fmean(steps) if steps else None)
    grid = {(r.task, r.step) for r in rows if not r.end}
    means = [sum(r.correct) / N / len(r.correct) for r in trace if (r.task, r.step) in grid]
    near("anytime_average_accuracy@every=2", statistics.fmean(means))


def test_what_is_undefined_says_why():
    assert InsideTasks([]).metrics() == {}
    ends_only = InsideTasks([_row(3, 0, (5,), True, every=9), _row(6, 1, (5, 5), True, every=9)])
    assert ends_only.undefined()["anytime_average_accuracy@every=9"].startswith("no task was as long as 9 steps")
    never = InsideTasks([_row(2, 0, (9,), True), _row(4, 1, (3, 5)), _row(5, 1, (4, 5), True)])
    assert never.undefined() == {"stability_gap[recovery_steps]@every=2": "no dip was recovered"}
    rose = InsideTasks([_row(2, 0, (9,), True), _row(4, 1, (9, 5)), _row(5, 1, (10, 5), True)])
    assert rose.undefined() == {
        f"stability_gap[{part}]@every=2": "accuracy fell after no switch" for part in ("recovered", "recovery_steps")
    }
    first = InsideTasks([_row(2, 0, (9,))])
    assert first.metrics()["worst_case_accuracy@every=2"] == pytest.approx(9 / N)  # of the task under way
    assert "min_accuracy@every=2" in first.undefined()


def test_a_chosen_list_of_tasks_has_columns_for_these_alone():
    rows = [_row(2, 0, (9,), True, [0]), _row(4, 1, (7,), False, [0]), _row(5, 1, (8,), True, [0]),
            _row(6, 2, (3, 9), False, [0, 2]), _row(8, 2, (8, 10), True, [0, 2])]  # fmt: skip
    inside = InsideTasks(rows, 4)
    assert inside.columns == [0, 2]
    assert inside.learned_at == [0, 4]
    assert inside.metrics()["min_accuracy@every=2"] == pytest.approx(3 / N)
    assert rows[-2].average == (pytest.approx(6 / N), 0.0)


def test_rows_are_sorted_and_the_last_of_two_counts():
    a, b = _row(2, 0, (5,)), _row(2, 0, (6,))
    assert sorted_rows([_row(4, 0, (7,)), a, b]) == [b, _row(4, 0, (7,))]


def test_drawn_tasks_give_the_average_over_all_with_the_interval_of_a_finite_population():
    drawn = _row(40, 10, (10, 14, 18, 20), tasks=(1, 4, 7, 10), sampled=True)
    value, half = drawn.average
    assert value == pytest.approx((10 * 0.7 + 1.0) / 11)
    t = 4.302652729911275  # 97.5 % of t with two degrees of freedom
    assert half == pytest.approx(10 / 11 * t * 0.2 * math.sqrt(0.7 / 3))
    assert drawn.current == 1.0
    whole = _row(40, 3, (10, 14, 18, 20), tasks=(0, 1, 2, 3), sampled=False)
    assert whole.average == (pytest.approx(0.775), 0.0)


@pytest.mark.parametrize(("k", "shape"), [(5, (8, 2)), (10, (8, 2)), (20, (2, 2))])
def test_the_interval_holds_the_true_average_about_as_often_as_it_says(k, shape):
    rng = np.random.default_rng(0)
    tasks = rng.beta(*shape, size=200)
    held = 0
    for step in range(1000):
        estimate = finite_population_mean(tasks[draw_tasks(200, k, 7, step)].tolist(), 200)
        held += abs(estimate.mean - tasks.mean()) <= estimate.half_width
    assert 0.92 <= held / 1000 <= 0.98


@given(st.integers(0, 50), st.integers(2, 20), st.integers(0, 5), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_draws_are_distinct_old_tasks(n_old, count, seed, step):
    drawn = draw_tasks(n_old, count, seed, step)
    assert drawn == sorted(set(drawn)) == draw_tasks(n_old, count, seed, step)
    assert len(drawn) == min(n_old, count)
    assert all(0 <= t < n_old for t in drawn)


def test_the_interval_of_a_finite_population_at_its_ends():
    assert finite_population_mean([0.2, 0.4], 2).half_width == 0.0
    assert finite_population_mean([0.2], 9).half_width is None
    with pytest.raises(ValueError, match=r"`values` must hold 1 to `population` \(1\) numbers, got 2"):
        finite_population_mean([0.1, 0.2], 1)
    with pytest.raises(ValueError, match="`confidence` must be between 0 and 1"):
        finite_population_mean([0.1], 1, confidence=1.0)


@pytest.mark.parametrize(
    "damage",
    [{"correct": [21]}, {"total": [-1]}, {"tasks": [0, 0]}, {"step": 1.5}, {"every": 0}, {"end": 3}, {"correct": "9"}],
)
def test_rows_that_are_none_are_refused(damage):
    with pytest.raises(ValueError, match="a row inside a task must"):
        InsideRow.from_dict({**_row(2, 0, (9,)).to_dict(), **damage})
    with pytest.raises(ValueError, match="must have all fields"):
        InsideRow.from_dict({"step": 2})
    with pytest.raises(ValueError, match="must be a mapping"):
        InsideRow.from_dict([1])


@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_all_gaps_at_once_are_those_of_each_task_and_switch(seed, rows, width):
    draw = torch.Generator().manual_seed(seed)
    matrix = (torch.rand(rows, width, generator=draw, dtype=torch.float64) * 8).round() / 8
    matrix[torch.rand(rows, width, generator=draw) < 0.25] = torch.nan
    learned = [None if int(e) == rows else int(e) for e in torch.randint(0, rows + 1, (width,), generator=draw)]
    gaps, stops = functional.stability_gaps(matrix, learned)
    assert stops == sorted({e for e in learned if e is not None and e < rows - 1})
    for k, (stop, after) in enumerate(zip(stops, [*stops[1:], rows - 1][: len(stops)], strict=True)):
        for j, end in enumerate(learned):
            one = functional.stability_gap(matrix[:, j], stop, after - stop)
            expected = torch.stack(one) if end is not None and end <= stop else torch.full((4,), torch.nan)
            torch.testing.assert_close(torch.stack([g[k, j] for g in gaps]), expected.double(), equal_nan=True)


def test_rows_written_at_once_are_those_written_one_by_one():
    correct, total = torch.tensor([[9, 0, 0], [7, 8, 0]]), torch.tensor([[10, 0, 0], [10, 10, 0]])
    at_once, by_row = metrics.MinAccuracy(learned_at=[0, 1]), metrics.MinAccuracy(learned_at=[0, 1])
    at_once.update(4, 1, 3, 10)
    at_once.update_rows(correct, total)
    for row in range(2):
        by_row.update_row(row, correct[row], total[row])
    torch.testing.assert_close(at_once.matrix, by_row.matrix, equal_nan=True)
    assert at_once.compute() == by_row.compute() == 0.7
    with pytest.raises(ValueError, match="`correct` must lie between 0 and `total` in every cell"):
        at_once.update_rows(total, correct)
    with pytest.raises(ValueError, match="must be one matrix each"):
        at_once.update_rows(correct, total[:1])
