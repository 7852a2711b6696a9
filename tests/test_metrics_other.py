"""Traces, predictions, multi-label, representation and cost against short formulas."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_plugins import functional as F
from cl_plugins import metrics as M

traces = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@given(traces, st.integers(2, 6))
@settings(max_examples=60, deadline=None)
def test_windowed_changes_equal_all_pairs(trace, window):
    pairs = [(m, n) for m in range(len(trace)) for n in range(m + 1, len(trace)) if n - m < window]
    column = torch.tensor(trace, dtype=torch.float64)[:, None]
    fall = max([trace[m] - trace[n] for m, n in pairs] + [0.0])
    rise = max([trace[n] - trace[m] for m, n in pairs] + [0.0])
    assert F.windowed_forgetting(column, window) == pytest.approx(fall, abs=1e-12)
    assert F.windowed_plasticity(column, window) == pytest.approx(rise, abs=1e-12)


@given(traces, traces)
@settings(max_examples=40, deadline=None)
def test_more_evaluations_never_raise_the_minimum(trace, extra):
    both = torch.tensor(trace + extra, dtype=torch.float64)[:, None]
    few = torch.cat([both[:1], both[-1:]])
    if len(both) > 1:
        assert F.min_accuracy(both, learned_at=[0]) <= F.min_accuracy(few, learned_at=[0])


def test_worst_case_accuracy_of_the_first_task_is_its_accuracy():
    matrix = torch.tensor([[0.4, 0.1], [0.6, 0.1]])
    assert F.worst_case_accuracy(matrix, learned_at=[4, 9]) == pytest.approx(0.6)
    assert F.min_accuracy(matrix, learned_at=[4, 9]).isnan()


def test_worst_case_accuracy_inside_the_third_task():
    matrix = torch.tensor([[0.9, 0.1, 0.1], [0.5, 0.8, 0.1], [0.7, 0.6, 0.3]])
    assert F.worst_case_accuracy(matrix, learned_at=[0, 1, 5]) == pytest.approx(0.3 / 3 + 2 / 3 * (0.5 + 0.6) / 2)


def test_a_hole_in_a_trace_follows_the_policy():
    matrix = torch.tensor([[0.9], [math.nan], [0.6]])
    matrix = torch.cat([matrix, torch.tensor([[0.1], [0.2], [0.8]])], dim=1)
    assert F.min_accuracy(matrix, learned_at=[0, 2]).isnan()
    assert F.min_accuracy(matrix, learned_at=[0, 2], nan_policy="omit") == pytest.approx(0.6)
    assert F.windowed_forgetting(matrix, 3, learned_at=[0, 2]).isnan()
    assert F.windowed_forgetting(matrix, 3, learned_at=[0, 2], nan_policy="omit") == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("trace", "depth", "recovery"),
    [([0.9, 0.5, 0.9, 0.8], 0.4, 2), ([0.9, 0.95, 0.97], -0.05, 0), ([0.9, 0.4, 0.6], 0.5, math.nan)],
)
def test_stability_gap(trace, depth, recovery):
    gap = F.stability_gap(torch.tensor(trace, dtype=torch.float64), 0)
    assert gap.depth == pytest.approx(depth)
    assert gap.recovery_steps.item() == pytest.approx(recovery, nan_ok=True)
    assert gap.residual == pytest.approx(trace[0] - trace[-1])


def test_stability_gap_without_an_evaluation_after_the_switch():
    assert all(value.isnan() for value in F.stability_gap(torch.tensor([0.5, 0.6]), 1))
    with pytest.raises(ValueError, match="`switch` must be an index of the trace of 2 evaluations, got 2"):
        F.stability_gap(torch.tensor([0.5, 0.6]), 2)


def test_anytime_accuracy_on_an_uneven_grid():
    accuracy, samples = torch.tensor([0.2, 0.4, 0.8]), torch.tensor([0, 10, 40])
    expected = ((0.2 + 0.4) / 2 * 10 + (0.4 + 0.8) / 2 * 30) / 40
    assert F.anytime_accuracy(accuracy, samples, rule="trapezoid") == pytest.approx(expected)
    assert F.anytime_accuracy(accuracy, samples) == pytest.approx(0.6)
    with pytest.raises(ValueError, match=r"`samples_seen` must have one entry per evaluation \(3\), got \(2,\)"):
        F.anytime_accuracy(accuracy, samples[:2])


def test_a_short_learning_curve_is_undefined():
    assert F.learning_curve_area(torch.rand(2, 5, generator=_generator()), beta=5).isnan()


def test_trace_metrics_from_counts():
    cells = torch.tensor([[9, 1], [4, 5], [6, 8], [5, 7]])
    options = {"learned_at": [0, 2]}
    metrics = M.online_metrics(2, every=5, window=2, **options)
    for row, counts in enumerate(cells):
        metrics.update(row, range(2), counts, [10, 10])
    values = metrics.compute()
    matrix = cells.double() / 10
    assert values["min_accuracy@every=5"] == F.min_accuracy(matrix, **options) == pytest.approx((0.4 + 0.7) / 2)
    assert values["windowed_forgetting[window=2]@every=5"] == pytest.approx((0.5 + 0.1) / 2)
    assert values["windowed_plasticity[window=2]@every=5"] == pytest.approx((0.2 + 0.4) / 2)
    assert values["worst_case_accuracy@every=5"] == pytest.approx(0.7 / 2 + 0.5 * 0.4)
    assert values["stability_gap[depth]@every=5"] == pytest.approx((0.5 + 0.1 + 0.1) / 3)
    assert values["anytime_accuracy[rectangle]"] == pytest.approx((0.5 + 0.45 + 0.7 + 0.6) / 4)


def test_learning_curve_area_from_counts():
    metric = M.LearningCurveArea(2, beta=1)
    for row, counts in enumerate(([1, 2], [3, 4], [9, 9])):
        metric.update(row, range(2), counts, [10, 10])
    assert metric.key == "learning_curve_area[beta=1]"
    assert metric.compute() == pytest.approx(0.25)


def test_class_balanced_accuracy_is_mean_recall_over_classes_that_occur():
    target = torch.randint(0, 4, (200,), generator=_generator())
    preds = torch.where(torch.rand(200, generator=_generator(1)) < 0.7, target, (target + 1) % 5)
    confusion = F.class_confusion(preds, target, 6)
    recalls = [(preds[target == c] == c).double().mean() for c in range(4)]
    assert F.seen_class_accuracy(confusion, range(6), average="class") == pytest.approx(sum(recalls) / 4)
    assert F.seen_class_accuracy(confusion, range(6)) == pytest.approx((preds == target).double().mean().item())
    tasks = [0, 0, 1, 1, 2, 2]
    by_task = [(preds == target)[target // 2 == t].double().mean() for t in range(2)]
    average = F.seen_class_accuracy(confusion, range(6), average="task", task_of_class=tasks)
    assert average == pytest.approx(sum(by_task) / 2)
    assert F.task_id_accuracy(confusion, tasks) == pytest.approx((preds // 2 == target // 2).double().mean().item())


def test_recency_is_undefined_before_the_second_task():
    confusion = F.class_confusion(torch.tensor([0, 1]), torch.tensor([0, 0]), 4)
    assert F.task_recency_bias(confusion, [0, 1], [0, 0, 1, 1]).isnan()
    assert F.task_recency_pull(confusion, [0, 1], [0, 0, 1, 1]).isnan()


def test_prediction_metrics_share_one_state_and_mask_unseen_classes():
    from torchmetrics import MetricCollection

    tasks = [0, 0, 1, 1]
    options = {"unseen": "mask", "seen_classes": [0, 1, 2]}
    members = [
        M.SeenClassAccuracy(tasks, **options),
        M.SeenClassAccuracy(tasks, average="class", **options),
        M.TaskConfusionMatrix(tasks, **options),
        M.TaskRecencyBias(tasks, **options),
        M.TaskRecencyPull(tasks, **options),
    ]
    collection = MetricCollection({m.key: m for m in members})
    logits = torch.randn(64, 4, generator=_generator())
    target = torch.randint(0, 3, (64,), generator=_generator(1))
    for part in (slice(0, 40), slice(40, 64)):
        collection.update(logits[part], target[part])
    assert len(collection.compute_groups) == 1
    preds = logits[:, :3].argmax(1)
    values = collection.compute()
    assert values["seen_class_accuracy[micro,unseen=mask]"] == pytest.approx((preds == target).double().mean().item())
    bias = (preds == 2).double().mean() - (target == 2).double().mean()
    assert values["task_recency_bias[unseen=mask]"] == pytest.approx(bias.item())
    assert values["task_confusion_matrix[unseen=mask]"].sum() == 64


def test_prediction_metrics_say_what_they_need():
    with pytest.raises(ValueError, match=r'`preds` must be logits .* with unseen="mask", got predicted classes'):
        M.SeenClassAccuracy([0, 1], unseen="mask").update(torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"`preds` must have one logit per class \(2\), got shape \(1, 3\)"):
        M.SeenClassAccuracy([0, 1], unseen="mask").update(torch.zeros(1, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="`target` must hold classes from 0 to 1, got 5 to 5"):
        M.SeenClassAccuracy([0, 1], unseen="count").update(torch.tensor([0]), torch.tensor([5]))
    with pytest.raises(TypeError, match="unseen"):
        M.SeenClassAccuracy([0, 1])


def test_negative_flips():
    before, after = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 0, 1, 1])
    target = torch.tensor([0, 1, 2, 1])
    metric = M.NegativeFlipRate()
    metric.update(before[:3], after[:3], target[:3])
    metric.update(before[3:], after[3:], target[3:])
    assert metric.compute() == F.negative_flip_rate(before, after, target) == pytest.approx(0.5)


def test_multilabel_against_sklearn():
    sklearn = pytest.importorskip("sklearn.metrics")
    scores = torch.rand(60, 5, generator=_generator()).mul(20).round().div(20)  # with ties
    labels = (torch.rand(60, 5, generator=_generator(1)) < 0.3).long()
    wanted = [sklearn.average_precision_score(labels[:, c], scores[:, c]) for c in range(5)]
    torch.testing.assert_close(F.average_precision(scores, labels).tolist(), wanted, rtol=0, atol=1e-9)
    counts = F.multilabel_counts(scores, labels)
    chosen = scores >= 0.5
    pooled = sklearn.f1_score(labels, chosen, average="micro")
    assert F.multilabel_of1(counts) == pytest.approx(pooled)
    precision = sklearn.precision_score(labels, chosen, average="macro")
    recall = sklearn.recall_score(labels, chosen, average="macro")
    assert F.multilabel_cf1(counts) == pytest.approx(2 * precision * recall / (precision + recall))
    metric, mean = M.MultilabelCF1(5), M.SeenLabelMAP([1, 3])
    for part in (slice(0, 13), slice(13, 60)):
        metric.update(scores[part], labels[part])
        mean.update(scores[part], labels[part])
    assert metric.compute() == F.multilabel_cf1(counts)
    assert mean.compute() == pytest.approx((wanted[1] + wanted[3]) / 2)


def test_multilabel_top_k():
    counts = F.multilabel_counts(torch.tensor([[0.1, 0.3, 0.2]]), torch.tensor([[0, 1, 1]]), k=1)
    assert counts.tolist() == [[0, 1, 0], [0, 1, 0], [0, 1, 1]]
    assert M.MultilabelOF1(3, k=1).key == "multilabel_of1[k=1]"


def test_representation_metrics_do_not_depend_on_the_batches():
    before = torch.randn(50, 6, generator=_generator(), dtype=torch.float64)
    after = before @ torch.randn(6, 4, generator=_generator(1), dtype=torch.float64)
    rank, similarity, drift = M.EffectiveRank(6), M.LinearCKA(6, 4), M.RepresentationDrift(6, 4)
    for x, y in zip(before.split(7), after.split(7), strict=True):
        rank.update(x)
        similarity.update(x, y)
        drift.update(x, y)
    assert rank.compute() == pytest.approx(F.effective_rank(before).item(), abs=1e-9)
    assert similarity.compute() == pytest.approx(F.linear_cka(before, after).item(), abs=1e-9)
    assert drift.compute() == pytest.approx(1 - F.linear_cka(before, after).item(), abs=1e-9)


def test_effective_rank_with_fewer_samples_than_dimensions():
    features = torch.randn(3, 8, generator=_generator(), dtype=torch.float64)
    metric = M.EffectiveRank(8)
    metric.update(features)
    assert metric.compute() == pytest.approx(F.effective_rank(features).item(), abs=1e-9)


def test_constant_features_have_no_similarity():
    assert F.linear_cka(torch.ones(4, 2), torch.randn(4, 2, generator=_generator())).isnan()
    assert F.effective_rank(torch.zeros(4, 2)).isnan()
    with pytest.raises(ValueError, match=r"`features` must have the shape \(batch, 3\), got \(4, 2\)"):
        M.EffectiveRank(3).update(torch.zeros(4, 2))


def test_calibration_follows_torchmetrics_off_the_edges():
    from torchmetrics.functional.classification import binary_calibration_error

    confidence = torch.rand(300, generator=_generator(), dtype=torch.float64)
    correct = (torch.rand(300, generator=_generator(1)) < confidence).long()
    theirs = binary_calibration_error(confidence, correct, n_bins=10, norm="l1")
    assert F.expected_calibration_error(confidence, correct, 10) == pytest.approx(theirs.item(), abs=1e-6)


def test_edges_belong_to_the_chosen_side():
    confidence, correct = torch.tensor([0.5, 0.5]), torch.tensor([1, 1])
    assert F.expected_calibration_error(torch.tensor([0.5, 0.9]), torch.tensor([1, 0]), 2) == pytest.approx(0.2)
    right = F.expected_calibration_error(torch.tensor([0.5, 0.9]), torch.tensor([1, 0]), 2, closed="right")
    assert right == pytest.approx((0.5 + 0.9) / 2)
    assert F.expected_calibration_error(confidence, correct, 100) == pytest.approx(0.5)


def test_calibration_drift_compares_with_the_row_of_learning():
    metric = M.CalibrationDrift(2, bins=1)
    metric.update(0, 0, torch.tensor([0.9, 0.9]), torch.tensor([1, 1]))
    assert metric.compute().isnan()
    metric.update(1, 0, torch.tensor([0.9, 0.9]), torch.tensor([1, 0]))
    metric.update(1, 1, torch.tensor([0.5, 0.5]), torch.tensor([1, 0]))
    assert metric.compute() == pytest.approx(0.4 - 0.1)
    restored = M.CalibrationDrift(2, bins=1)
    restored.load_state_dict(metric.state_dict())
    assert restored.compute() == metric.compute()
    with pytest.raises(ValueError, match="`row` and `column` must lie in a matrix of 2 x 2, got 2, 0"):
        metric.update(2, 0, torch.tensor([0.5]), torch.tensor([1]))


def test_cost_metrics_are_their_functions():
    size, growth = M.ModelSizeEfficiency(), M.ParameterGrowth()
    storage, compute = M.SampleStorageEfficiency(200), M.ComputeEfficiency()
    for parameters, stored, operations in ((100, 10, 99), (150, 30, 199), (50, 50, 399)):
        size.update(parameters)
        growth.update(parameters)
        storage.update(stored)
        compute.update(operations, 50)
    assert size.compute() == pytest.approx(min(1.0, (1 + 100 / 150 + 2) / 3))
    assert growth.compute() == pytest.approx(0.5)
    assert storage.compute() == pytest.approx(1 - 0.15)
    assert compute.compute() == pytest.approx((0.5 + 0.25 + 0.125) / 3)
    with pytest.warns(UserWarning, match="called before the ``update`` method"):
        assert M.SampleStorageEfficiency(1).compute().isnan()
    with pytest.raises(ValueError, match="a cost must be at least 0, got"):
        size.update(-1)
