"""The functions of an accuracy matrix against short formulas, and properties that hold for every matrix."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_plugins import functional as F

NAN = math.nan
COMMON = [
    F.average_accuracy,
    F.average_incremental_accuracy,
    F.accuracy_over_time,
    F.learning_accuracy,
    F.worst_task_accuracy,
    F.stability,
    F.stability_plasticity,
    F.forgetting,
    F.backward_transfer,
    F.remembering,
    F.positive_backward_transfer,
    F.forward_transfer,
    F.transfer_accuracy,
]


@st.composite
def square(draw, least=2, most=6):
    size = draw(st.integers(least, most))
    cells = draw(st.lists(st.floats(0, 1, width=32), min_size=size * size, max_size=size * size))
    return torch.tensor(cells, dtype=torch.float64).reshape(size, size)


def _close(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=1e-12, equal_nan=True)


def _forgetting_by_loops(cells, peak_from, include_last=False):
    rows = len(cells)
    lost = []
    for j in range(rows - 1):
        best = max(cells[i][j] for i in range(peak_from(j), rows if include_last else rows - 1))
        lost.append(best - cells[rows - 1][j])
    return sum(lost) / len(lost)


@given(square())
@settings(max_examples=50, deadline=None)
def test_forgetting_equals_loops(matrix):
    cells = matrix.tolist()
    _close(F.forgetting(matrix).item(), _forgetting_by_loops(cells, lambda j: j))
    _close(F.forgetting(matrix, since="start").item(), _forgetting_by_loops(cells, lambda j: 0))
    _close(F.forgetting(matrix, clip=True).item(), _forgetting_by_loops(cells, lambda j: j, include_last=True))
    final = [cells[j][j] - cells[-1][j] for j in range(len(cells) - 1)]
    _close(F.forgetting(matrix, peak="learned").item(), sum(final) / len(final))
    _close(F.forgetting(matrix, peak="learned", reduction="max").item(), max(final))


@given(square())
@settings(max_examples=50, deadline=None)
def test_accuracy_is_learning_accuracy_plus_backward_transfer(matrix):
    tasks = len(matrix)
    _close(
        F.average_accuracy(matrix),
        F.learning_accuracy(matrix) + (tasks - 1) / tasks * F.backward_transfer(matrix),
    )


@given(square())
@settings(max_examples=50, deadline=None)
def test_the_waterfall_sums_to_the_average_accuracy(matrix):
    steps = F.retention_waterfall(matrix)
    assert steps.shape == (len(matrix),)
    _close(steps[0], F.learning_accuracy(matrix))
    _close(steps.sum(), F.average_accuracy(matrix))
    _close(steps[1:].sum(), (len(matrix) - 1) / len(matrix) * F.backward_transfer(matrix))


@given(square(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_permuting_the_tasks_changes_nothing(matrix, random):
    order = list(range(len(matrix)))
    random.shuffle(order)
    initial = matrix[0].flip(0)
    for function in COMMON:
        straight = function(matrix, initial=initial)
        _close(function(matrix[:, order], learned_at=order, initial=initial[order]), straight)
    _close(F.retention_waterfall(matrix[:, order], learned_at=order), F.retention_waterfall(matrix))


@given(square())
@settings(max_examples=50, deadline=None)
def test_the_variants_are_ordered(matrix):
    plain = F.forgetting(matrix)
    assert F.forgetting(matrix, clip=True) >= plain - 1e-12
    assert F.forgetting(matrix, since="start") >= plain - 1e-12
    assert F.forgetting(matrix, peak="learned") <= plain + 1e-12
    assert F.forgetting(matrix, reduction="max") >= plain - 1e-12
    _close(F.forgetting(matrix, peak="learned"), -F.backward_transfer(matrix))
    _close(F.forgetting(matrix, clip=True, reduction="none").nan_to_num(0.0).lt(0).sum().item(), 0)


@given(square(), st.integers(0, 6))
@settings(max_examples=50, deadline=None)
def test_a_row_without_a_measurement_changes_nothing(matrix, position):
    position = min(position, len(matrix))
    empty = torch.full_like(matrix[:1], NAN)
    with_row = torch.cat([matrix[:position], empty, matrix[position:]])
    learned_at = [j + (j >= position) for j in range(len(matrix))]
    initial = matrix[0].flip(0)
    for function in COMMON:
        _close(function(with_row, learned_at=learned_at, initial=initial), function(matrix, initial=initial))


@given(st.lists(square(least=3, most=3), min_size=2, max_size=4))
@settings(max_examples=30, deadline=None)
def test_leading_dimensions_are_a_batch(matrices):
    batch = torch.stack(matrices)
    for function in COMMON:
        _close(function(batch), torch.stack([function(matrix) for matrix in matrices]))
        assert function(batch[None]).shape == (1, len(matrices))
    for kwargs in ({"since": "start"}, {"clip": True}, {"normalize": "peak"}, {"reduction": "none"}):
        _close(F.forgetting(batch, **kwargs), torch.stack([F.forgetting(m, **kwargs) for m in matrices]))
    _close(F.accuracy_curve(batch), torch.stack([F.accuracy_curve(m) for m in matrices]))
    _close(F.retention_waterfall(batch), torch.stack([F.retention_waterfall(m) for m in matrices]))


def test_one_task_has_no_forgetting():
    matrix = torch.tensor([[0.8]])
    for function in (F.forgetting, F.backward_transfer, F.remembering, F.positive_backward_transfer, F.stability):
        assert function(matrix).isnan()
        assert function(matrix).dtype == torch.float64
    assert F.average_accuracy(matrix) == pytest.approx(0.8)
    assert F.forgetting_curve(matrix).isnan().all()
    assert F.retention_waterfall(matrix).tolist() == pytest.approx([0.8])


def test_no_row_at_all_is_undefined():
    empty = torch.zeros(0, 3)
    for function in COMMON:
        assert function(empty).isnan(), function.__name__
    assert F.accuracy_curve(empty).shape == (0,)
    assert F.forgetting(empty, reduction="none").isnan().all()
    assert all(value.isnan() for value in F.mtil_scores(empty).values())


def test_tasks_beyond_the_last_row_are_not_seen():
    matrix = torch.tensor([[0.9, 0.2, 0.3], [0.7, 0.8, 0.4]])
    assert F.average_accuracy(matrix) == pytest.approx(0.75)
    assert F.average_accuracy(matrix, learned_at=[0, 1, None]) == pytest.approx(0.75)
    assert F.average_accuracy(matrix, learned_at=torch.tensor([0, 1, -1])) == pytest.approx(0.75)


def test_two_tasks_learned_in_one_step():
    matrix = torch.tensor([[0.9, 0.8, 0.1], [0.6, 0.7, 0.9]])
    assert F.forgetting(matrix, learned_at=[0, 0, 1]) == pytest.approx((0.3 + 0.1) / 2)
    assert F.average_incremental_accuracy(matrix, learned_at=[0, 0, 1]) == pytest.approx((0.85 + 2.2 / 3) / 2)


def test_an_extra_evaluation_at_the_end_makes_every_task_old():
    matrix = torch.tensor([[0.9, 0.1], [0.7, 0.8], [0.6, 0.5]])
    assert F.forgetting(matrix) == pytest.approx((0.3 + 0.3) / 2)
    assert F.retention_waterfall(matrix).tolist() == pytest.approx([0.85, -0.1, -0.2])


def test_every_row_counts_where_one_set_is_tested():
    matrix = torch.tensor([[0.2], [math.nan], [0.5], [0.8]])
    assert F.accuracy_curve(matrix, learned_at=[0]).tolist() == pytest.approx([0.2])
    assert F.accuracy_curve(matrix, learned_at=[0], every_row=True).tolist() == pytest.approx([0.2, 0.5, 0.8])
    assert float(F.average_incremental_accuracy(matrix, learned_at=[0], every_row=True)) == pytest.approx(0.5)
    assert float(F.average_incremental_accuracy(matrix, learned_at=[2], every_row=True)) == pytest.approx(0.65)
    square = torch.tensor([[0.9, 0.1], [0.7, 0.8]])
    assert F.average_incremental_accuracy(square, every_row=True) == F.average_incremental_accuracy(square)
    assert F.accuracy_curve(torch.zeros(0, 2), every_row=True).shape == (0,)


def test_a_hole_follows_the_policy():
    matrix = torch.tensor([[0.9, 0.1, 0.1], [NAN, 0.8, 0.1], [0.6, 0.5, 0.7]])
    assert F.forgetting(matrix).isnan()
    assert F.forgetting(matrix, nan_policy="omit") == pytest.approx(0.3)
    assert F.backward_transfer(matrix) == pytest.approx(-0.3)  # never reads the hole
    with pytest.raises(ValueError, match=r"got NaN in row 1, column 0; measure it, or pass nan_policy='omit'"):
        F.accuracy_over_time(matrix, nan_policy="raise")
    with pytest.raises(ValueError, match="got NaN in column 0"):
        F.average_incremental_accuracy(matrix, nan_policy="raise")
    assert F.retention_waterfall(matrix, nan_policy="omit").sum() == pytest.approx(0.6)


def test_a_hole_before_learning_is_never_read():
    matrix = torch.tensor([[0.9, NAN], [0.7, 0.8]])
    assert F.forgetting(matrix, nan_policy="raise") == pytest.approx(0.2)
    assert F.forgetting(matrix, since="start") == pytest.approx(0.2)
    assert F.forward_transfer(matrix, initial=torch.tensor([0.1, 0.1])).isnan()


def test_forward_transfer_needs_the_initial_row():
    matrix = torch.tensor([[0.9, 0.3], [0.7, 0.8]])
    assert F.forward_transfer(matrix).isnan()
    assert F.forward_transfer(matrix, baseline=None) == pytest.approx(0.3)
    assert F.plasticity_gain(matrix).isnan()
    assert F.intransigence(matrix).isnan()
    assert F.forgetting_ratio(matrix, torch.tensor([1.0, 1.0])).isnan()
    assert F.normalized_accuracy(matrix).isnan()
    assert F.average_accuracy(matrix, average="micro").isnan()


def test_the_order_of_averaging_matters_for_transfer():
    matrix = torch.tensor([[0.9, 0.2, 0.4], [0.8, 0.9, 0.8], [0.8, 0.8, 0.9]])
    assert F.transfer_accuracy(matrix) == pytest.approx((0.2 + 0.6) / 2)
    assert F.transfer_accuracy(matrix, order="row") == pytest.approx((0.3 + 0.8) / 2)


def test_peaks_of_zero_are_left_out_of_relative_forgetting():
    matrix = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.8, 0.0], [0.0, 0.4, 0.9]])
    assert F.forgetting(matrix, normalize="peak") == pytest.approx(0.5)
    assert F.forgetting(torch.zeros(2, 2), normalize="peak").isnan()


def test_counts_become_accuracies():
    matrix = F.accuracy_matrix(torch.tensor([[1, 0]]), torch.tensor([[3, 0]]))
    assert matrix.dtype == torch.float64
    assert matrix[0, 0] == 1 / 3
    assert matrix[0, 1].isnan()


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"matrix": torch.tensor([[90.0, 3.0]])}, r"`matrix` must hold fractions in \[0, 1\], got 90; divide percent"),
        ({"matrix": torch.tensor([0.5])}, r"`matrix` must have the shape \(..., rows, tasks\), got \(1,\)"),
        ({"learned_at": [0]}, r"`learned_at` must have one row per column \(2\), got \[0\]"),
        ({"initial": torch.zeros(3)}, r"`initial` must have one value per column \(2\), got shape \(3,\)"),
        ({"nan_policy": "skip"}, "`nan_policy` must be one of 'propagate', 'omit', 'raise', got 'skip'"),
        ({"since": "begin"}, "`since` must be one of 'learned', 'start', got 'begin'"),
        ({"peak": "best"}, "`peak` must be one of 'max', 'learned', got 'best'"),
        ({"normalize": "max"}, "`normalize` must be one of None, 'peak', got 'max'"),
        ({"reduction": "sum"}, "`reduction` must be one of 'mean', 'max', 'none', got 'sum'"),
    ],
)
def test_error_texts(kwargs, text):
    with pytest.raises(ValueError, match=text):
        F.forgetting(**{"matrix": torch.tensor([[0.9, 0.3], [0.7, 0.8]]), **kwargs})


def test_error_texts_of_test_sizes_and_references():
    matrix = torch.tensor([[0.9, 0.3], [0.7, 0.8]])
    with pytest.raises(ValueError, match=r"`n_test` must have the shape \(2,\) or \(..., 2, 2\), got \(3,\)"):
        F.average_accuracy(matrix, average="micro", n_test=torch.ones(3))
    with pytest.raises(ValueError, match="`average` must be one of 'macro', 'micro', got 'mean'"):
        F.average_accuracy(matrix, average="mean")
    with pytest.raises(ValueError, match=r"`joint` must have one value per column \(2\)"):
        F.normalized_accuracy(matrix, torch.ones(3))
    with pytest.raises(ValueError, match="`order` must be one of 'column', 'row', got 'all'"):
        F.transfer_accuracy(matrix, order="all")


@pytest.mark.gpu
def test_values_are_the_same_on_a_gpu():
    matrix = torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for function in COMMON:
        value = function(matrix.cuda(), initial=matrix[0])
        assert value.device.type == "cuda"
        _close(value.cpu(), function(matrix, initial=matrix[0]))
