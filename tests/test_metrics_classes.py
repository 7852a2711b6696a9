"""The state of the matrix metrics: writing, growing, resetting, restoring, sharing, plotting."""

import copy
import math
import pickle

import matplotlib
import pytest
import torch
from torchmetrics import MetricCollection

from cl_plugins import functional as F
from cl_plugins import metrics as M

matplotlib.use("Agg")

CORRECT = torch.tensor([[90, 20, 30], [70, 85, 25], [55, 65, 95]])
TOTAL = torch.tensor([100, 100, 100])
MATRIX = CORRECT.double() / 100


def _fill(metric, rows=3):
    for row in range(rows):
        metric.update(row, range(3), CORRECT[row], TOTAL)
    return metric


MATRIX_METRICS = [
    M.AccuracyMatrix,
    M.AverageAccuracy,
    M.AverageIncrementalAccuracy,
    M.AccuracyOverTime,
    M.LearningAccuracy,
    M.WorstTaskAccuracy,
    M.Stability,
    M.Plasticity,
    M.StabilityPlasticity,
    M.PerformanceDrop,
    M.HarmonicAccuracy,
    M.Forgetting,
    M.BackwardTransfer,
    M.PositiveBackwardTransfer,
    M.Remembering,
    M.ForwardTransfer,
    M.TransferAccuracy,
    M.MTILScores,
    M.PlasticityGain,
    M.Intransigence,
    M.ForgettingRatio,
    M.NormalizedAccuracy,
    M.MinAccuracy,
    M.WorstCaseAccuracy,
    M.WindowedForgetting,
    M.WindowedPlasticity,
    M.StabilityGap,
    M.AnytimeAccuracy,
    M.LearningCurveArea,
]


def _same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("metric_class", MATRIX_METRICS)
def test_every_matrix_metric_survives_copies_and_checkpoints(metric_class):
    metric = _fill(metric_class(3))
    value = metric.compute()
    _same(copy.deepcopy(metric).compute(), value)
    _same(pickle.loads(pickle.dumps(metric)).compute(), value)
    assert {"correct", "total"} <= set(metric.state_dict())
    restored = metric_class(3)
    restored.load_state_dict(metric.state_dict())
    _same(restored.compute(), value)  # without the warning that nothing was updated
    assert hash(metric) != hash(restored)
    assert metric.is_differentiable is False
    metric.reset_all()
    assert metric.total.sum() == 0


@pytest.mark.parametrize("metric_class", MATRIX_METRICS)
def test_every_matrix_metric_is_defined_or_says_why(metric_class):
    metric = metric_class(3)
    metric.update_row(0, CORRECT[0], TOTAL)
    value = metric.compute()
    parts = list(value.values()) if isinstance(value, dict) else [value]
    if any(part.isnan().all() for part in parts):
        assert metric.undefined
    elif metric_class is not M.AccuracyMatrix:
        assert metric.undefined is None


def test_batches_add_up_to_the_row():
    whole, parts = M.AccuracyMatrix(3), M.AccuracyMatrix(3)
    _fill(whole)
    for row in range(3):
        for column in range(3):
            right = int(CORRECT[row, column])
            parts.update(row, column, right // 3, 33)
            parts.update(row, column, right - right // 3, 67)
    _same(parts.compute(), whole.compute())
    _same(parts.compute(), MATRIX)
    assert parts.correct.dtype == torch.int64


def test_the_initial_row_is_kept_apart():
    metric = M.ForwardTransfer(3)
    metric.update(-1, range(3), [10, 15, 20], TOTAL)
    _fill(metric)
    assert metric.matrix.shape == (3, 3)
    assert metric.initial.tolist() == pytest.approx([0.1, 0.15, 0.2])
    assert metric.compute() == pytest.approx(((0.2 - 0.15) + (0.25 - 0.2)) / 2)
    assert metric.undefined is None


def test_update_row_replaces_and_skips_what_was_not_measured():
    metric = M.AccuracyMatrix(2)
    metric.update_row(0, [5, 5], [10, 10])
    metric.update_row(0, [9, -1], [10, -1])
    _same(metric.compute(), torch.tensor([[0.9, math.nan]], dtype=torch.float64))


def test_a_single_cell_stays_a_matrix():
    metric = M.AccuracyMatrix(1)
    metric.update(0, 0, 4, 5)
    assert metric.compute().shape == (1, 1)


def test_columns_and_rows_grow():
    metric = M.AccuracyMatrix()
    metric.update(0, 0, 1, 2)
    metric.update(30, 20, 3, 4)
    matrix = metric.compute()
    assert matrix.shape == (31, 21)
    assert matrix[0, 0] == 0.5
    assert matrix[30, 20] == 0.75
    assert matrix.isnan().sum() == 31 * 21 - 2


def test_growing_gives_the_same_numbers():
    known, unknown = M.standard_metrics(3), M.standard_metrics()
    _fill(known)
    _fill(unknown)
    _same(known.compute(), unknown.compute())


def test_merging_states_of_different_size():
    first, second = M.AccuracyMatrix(), M.AccuracyMatrix()
    first.update(0, 0, 1, 2)
    second.update(0, 0, 1, 2)
    second.update(20, 12, 1, 4)
    first.merge_state(second)
    assert first.compute()[0, 0] == 0.5
    assert first.total[1, 0] == 4
    assert first.compute().shape == (21, 13)
    second.merge_state(M.AccuracyMatrix(3))
    assert second.compute().shape == (21, 13)


def test_reset_drops_only_the_row_being_filled():
    metric = _fill(M.AverageAccuracy(3), rows=2)
    metric.finish_row()
    metric.reset()
    assert metric.matrix.shape == (2, 3)
    metric.update(2, 0, 5, 10)
    metric.reset()
    assert metric.matrix.shape == (2, 3)
    metric.update_row(2, CORRECT[2], TOTAL)
    metric.reset()
    assert metric.matrix.shape == (3, 3)
    metric.reset_all()
    assert metric.matrix.shape == (0, 3)


def test_reset_of_the_initial_row():
    metric = M.AverageAccuracy(3)
    metric.update(-1, 0, 1, 2)
    metric.reset()
    assert metric.initial is None


def test_a_collection_keeps_one_state_and_every_variant():
    metrics = _fill(M.standard_metrics(3))
    assert len(metrics.compute_groups) == 1
    assert len({id(metric.correct) for metric in metrics.values(copy_state=False)}) == 1
    values = metrics.compute()
    variants = {key: value.item() for key, value in values.items() if key.startswith("forgetting")}
    assert set(variants) == {
        "forgetting[peak,since=learned]",
        "forgetting[peak,since=start]",
        "forgetting[peak,since=learned,clip]",
        "forgetting[learned]",
        "forgetting[peak,since=learned,relative]",
    }
    assert variants["forgetting[peak,since=learned]"] == F.forgetting(MATRIX).item()
    assert values["average_accuracy"] == F.average_accuracy(MATRIX)


def test_resetting_a_collection_keeps_its_finished_rows():
    metrics = _fill(M.standard_metrics(3), rows=2)
    metrics.compute()
    metrics.update(2, range(3), [1, 1, 1], TOTAL)
    metrics.reset()
    assert metrics["learning_accuracy"].matrix.shape == (2, 3)
    metrics.update(2, range(3), CORRECT[2], TOTAL)
    assert metrics.compute()["average_accuracy"] == F.average_accuracy(MATRIX)


def test_calling_a_collection_counts_once():
    metrics = _fill(M.standard_metrics(3), rows=2)
    values = metrics(2, range(3), CORRECT[2], TOTAL)
    assert values["average_accuracy"] == F.average_accuracy(MATRIX)
    assert all(int(metric.total.sum()) == 900 for metric in metrics.values())


def test_two_metrics_of_other_classes_may_share_a_collection():
    metrics = MetricCollection({"a": M.AverageAccuracy(3), "b": M.AccuracyMatrix(3), "c": M.MTILScores(3)})
    _fill(metrics)
    values = metrics.compute()
    _same(values["b"], MATRIX)
    assert values["mtil_last"] == MATRIX[-1].mean()


def test_factories_carry_the_variant_in_their_keys():
    assert "average_accuracy[micro]" in M.cil_metrics(3)
    assert "transfer_accuracy[order=row]" in M.vlm_metrics(3)
    assert "forward_transfer" in M.standard_metrics(3)
    assert M.Forgetting(3, nan_policy="omit").key == "forgetting[peak,since=learned,omit]"
    assert M.Forgetting(3, peak="learned", reduction="max").key == "forgetting[learned,max]"
    assert M.ForwardTransfer(3, baseline=None).key == "forward_transfer[baseline=none]"
    assert M.ForwardTransfer(3, scheme="triangle").key == "forward_transfer[triangle]"


@pytest.mark.parametrize("build", [M.standard_metrics, M.cil_metrics, M.vlm_metrics, M.online_metrics])
def test_factories_compute_and_restore(build):
    metrics = build(3)
    metrics.update(-1, range(3), [10, 15, 20], TOTAL)
    _fill(metrics)
    assert len(metrics.compute_groups) == 1
    assert not any(value.isnan() for key, value in metrics.compute().items() if "stability_gap" not in key)
    restored = build(3)
    restored.load_state_dict(metrics.state_dict())
    _same(restored.compute(), metrics.compute())
    restored.update(3, range(3), CORRECT[2], TOTAL)


def test_reasons_for_nan():
    metric = M.Forgetting(3)
    metric.update_row(0, CORRECT[0], TOTAL)
    assert metric.compute().isnan()
    assert metric.undefined == "no task was learned before the last row, so there is no old task"
    metric.update_row(1, CORRECT[1], [-1, 100, 100])
    assert metric.compute().isnan()
    assert metric.undefined == "row 1, column 0 was not measured; nan_policy='omit' leaves such cells out"
    metric.update_row(1, CORRECT[1], TOTAL)
    metric.compute()
    assert metric.undefined is None
    transfer = _fill(M.ForwardTransfer(3))
    transfer.compute()
    assert transfer.undefined == "the initial row was not measured: evaluate before training and write row -1"
    gain = _fill(M.PlasticityGain(3))
    gain.compute()
    assert gain.undefined == "the reference `independent` was not given"
    never = _fill(M.AverageAccuracy(3, learned_at=[None, None, None]))
    never.compute()
    assert never.undefined == "no task was learned by the last row"


def test_columns_learned_in_another_order():
    metric = M.Forgetting(3, learned_at=[2, 0, 1])
    for row in range(3):
        metric.update(row, range(3), CORRECT[row][[2, 0, 1]], TOTAL)
    assert metric.compute() == F.forgetting(MATRIX)


def test_counts_keep_their_type():
    metric = _fill(M.AccuracyMatrix(3))
    metric.half()
    metric.double()
    metric.set_dtype(torch.float64)
    assert metric.correct.dtype == torch.int64
    _same(metric.compute(), MATRIX)
    for narrow in (torch.half, torch.bfloat16, "torch.float16"):
        with pytest.raises(ValueError, match=r"`dst_type` must be float32 or float64, got .*whole numbers"):
            metric.set_dtype(narrow)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0, 3, 1, 2), ValueError, r"`column` must be below `n_tasks` \(3\), got 3"),
        ((0, -1, 1, 2), ValueError, r"`column` must be at least 0, got \[-1\]"),
        ((-2, 0, 1, 2), ValueError, r"`row` must be at least -1 \(the evaluation before training\), got -2"),
        ((0, 0, 3, 2), ValueError, r"`correct` must lie between 0 and `total`, got \[3\] of \[2\]"),
        ((0, [0, 1], [1], [2, 2]), ValueError, "must have one entry per task, got 2, 1 and 2 entries"),
        (
            (0, 0, torch.tensor(0.5), 2),
            TypeError,
            "`correct` must be integer counts, got torch.float32; pass the number",
        ),
    ],
)
def test_error_texts_of_update(arguments, error, text):
    with pytest.raises(error, match=text):
        M.AccuracyMatrix(3).update(*arguments)


def test_error_texts_of_the_constructor():
    with pytest.raises(ValueError, match="`n_tasks` must be at least 1, or None to grow, got 0"):
        M.AccuracyMatrix(0)
    with pytest.raises(ValueError, match=r"`learned_at` must have one row per task \(3\), got \[0\]"):
        M.AccuracyMatrix(3, learned_at=[0])
    with pytest.raises(ValueError, match="`nan_policy` must be one of 'propagate', 'omit', 'raise', got 'zero'"):
        M.Forgetting(3, nan_policy="zero")
    with pytest.raises(ValueError, match="`since` must be one of 'learned', 'start', got 'end'"):
        M.Forgetting(3, since="end")
    with pytest.raises(ValueError, match="`window` must hold at least 2 evaluations, got 1"):
        M.WindowedForgetting(3, window=1)
    with pytest.raises(ValueError, match="`every` must be at least 1 training step, or None, got 0"):
        M.MinAccuracy(3, every=0)


def test_plots():
    import matplotlib.pyplot as plt

    metric = _fill(M.AccuracyMatrix(3))
    figure, axes = metric.plot(names=["a", "b", "c"])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "c"]
    assert axes.texts[0].get_text() == "0.90"
    _, given = plt.subplots()
    assert metric.plot(ax=given)[1] is given
    curve = M.AverageAccuracy(3)
    values = []
    for row in range(3):
        curve.update_row(row, CORRECT[row], TOTAL)
        values.append(curve.compute())
    figure, axes = curve.plot(values)
    assert figure is axes.figure
    M.TaskConfusionMatrix([0, 1], unseen="count").plot(torch.tensor([[3, 1], [0, 2]]))
    plt.close("all")
