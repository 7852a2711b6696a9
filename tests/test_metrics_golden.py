"""Every number of the golden files in ``<root>/metrics``: ours by definition, other libraries' through ``compat``."""

import json
import math

import pytest
import torch

from cl_plugins import functional as F
from cl_plugins import metrics as M
from cl_plugins.compat import peer_values
from cl_plugins.stats import aggregate_rankings, compare, summarize_seeds
from tests._golden import golden_files

TOLERANCE = 1e-9
PEERS = {  # prefix of a golden key -> name of ours
    "avalanche": "avalanche",
    "clarena": "clarena",
    "continuum-1.2.7": "continuum",
    "continuum-head": "continuum-head",
    "mammoth": "mammoth",
    "pilot": "pilot",
    "renate": "renate",
    "zscl": "zscl",
}


def _contents():
    return [(path, json.loads(path.read_text())) for path in golden_files("metrics", "*.json")]


def _table(values):
    """Nested lists with None for NaN as a float64 tensor."""

    def fill(entry):
        return [fill(e) for e in entry] if isinstance(entry, list) else (math.nan if entry is None else entry)

    return None if values is None else torch.tensor(fill(values), dtype=torch.float64)


def _counts(case):
    """The case as integer counts ``(rows, tasks)``; None when its accuracies are no counts."""
    matrix, tests = _table(case["input"]["R"]), _table(case["input"].get("n_test"))
    counts = None if tests is None else (matrix * tests).nan_to_num(0.0)
    return counts.round().long() if counts is not None and torch.allclose(counts, counts.round(), atol=1e-9) else None


def _cases(kind, keep=lambda case: True):
    found = []
    for path, content in _contents():
        cases = content.get(kind, {})
        named = cases.items() if isinstance(cases, dict) else ((case["id"], case) for case in cases)
        found += [pytest.param(case, id=f"{path.stem}-{name}") for name, case in named if keep(case)]
    return found


def _inputs(case):
    given = case["input"]
    names = ("initial", "n_test", "joint_upto", "joint_final", "independent", "random")
    return _table(given["R"]), given.get("learned_at"), {name: _table(given.get(name)) for name in names}


def _ours(case, nan_policy):
    matrix, learned_at, given = _inputs(case)
    common = {"learned_at": learned_at, "initial": given["initial"], "nan_policy": nan_policy}
    micro = {"average": "micro", "n_test": given["n_test"], **common}
    mtil = F.mtil_scores(matrix, **common)
    return {
        "average_accuracy": F.average_accuracy(matrix, **common),
        "average_accuracy_micro": F.average_accuracy(matrix, **micro),
        "average_incremental_accuracy": F.average_incremental_accuracy(matrix, **common),
        "average_incremental_accuracy_micro": F.average_incremental_accuracy(matrix, **micro),
        "accuracy_over_time": F.accuracy_over_time(matrix, **common),
        "learning_accuracy": F.learning_accuracy(matrix, **common),
        "worst_task_accuracy": F.worst_task_accuracy(matrix, **common),
        "forgetting": F.forgetting(matrix, **common),
        "forgetting_since_start": F.forgetting(matrix, since="start", **common),
        "forgetting_clipped": F.forgetting(matrix, clip=True, **common),
        "forgetting_from_learned": F.forgetting(matrix, peak="learned", **common),
        "forgetting_relative": F.forgetting(matrix, normalize="peak", **common),
        "forgetting_max": F.forgetting(matrix, reduction="max", **common),
        "backward_transfer": F.backward_transfer(matrix, **common),
        "backward_transfer_running": F.backward_transfer(matrix, scheme="running", **common),
        "remembering": F.remembering(matrix, **common),
        "positive_backward_transfer": F.positive_backward_transfer(matrix, **common),
        "forward_transfer": F.forward_transfer(matrix, **common),
        "forward_transfer_no_baseline": F.forward_transfer(matrix, baseline=None, **common),
        "forward_transfer_triangle": F.forward_transfer(matrix, scheme="triangle", **common),
        "forward_transfer_independent": F.plasticity_gain(matrix, given["independent"], **common),
        "intransigence": F.intransigence(matrix, given["joint_upto"], **common),
        "intransigence_last": F.intransigence(matrix, given["joint_upto"], reduction="last", **common),
        "forgetting_ratio": F.forgetting_ratio(matrix, given["joint_final"], given["random"], **common),
        "normalized_accuracy": F.normalized_accuracy(matrix, given["joint_final"], **common),
        "stability": F.stability(matrix, **common),
        "plasticity": F.plasticity(matrix, **common),
        "stability_plasticity": F.stability_plasticity(matrix, **common),
        "mtil_last": mtil["last"],
        "mtil_average": mtil["average"],
        "mtil_transfer": mtil["transfer"],
        "mtil_transfer_rowwise": F.transfer_accuracy(matrix, order="row", **common),
        "performance_drop": F.performance_drop(matrix, given["n_test"], **common),
        "harmonic_accuracy": F.harmonic_accuracy(matrix, given["n_test"], **common),
        "accuracy_curve": F.accuracy_curve(matrix, **common),
        "forgetting_curve": F.forgetting_curve(matrix, **common),
        "backward_transfer_curve": F.backward_transfer_curve(matrix, **common),
    }


def _check(name, value, expected):
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(expected, list):
        assert len(value) == len(expected), name
        for entry, wanted in zip(value, expected, strict=True):
            _check(name, entry, wanted)
    elif isinstance(value, list):  # a curve with a hole is undefined as a whole
        assert expected is None
        assert any(map(math.isnan, value)), name
    elif expected is None:
        assert math.isnan(value), f"{name}: expected undefined, got {value}"
    else:
        assert value == pytest.approx(expected, abs=TOLERANCE, rel=0), name


@pytest.mark.parametrize("case", _cases("matrix_cases"))
@pytest.mark.parametrize(("field", "nan_policy"), [("expected", "propagate"), ("expected_nan_omit", "omit")])
def test_golden_definitions(case, field, nan_policy):
    values = _ours(case, nan_policy)
    for name, expected in case.get(field, {}).items():
        _check(name, values[name], expected)


@pytest.mark.parametrize("case", _cases("matrix_cases", lambda case: _counts(case) is not None))
def test_golden_classes_from_counts(case):
    """The classes give the same from integer counts."""
    matrix, learned_at, given = _inputs(case)
    tests, counts = given["n_test"], _counts(case)
    width = matrix.shape[1]
    options = {"learned_at": learned_at}
    members = {
        "average_accuracy": M.AverageAccuracy(width, **options),
        "average_accuracy_micro": M.AverageAccuracy(width, average="micro", **options),
        "average_incremental_accuracy": M.AverageIncrementalAccuracy(width, **options),
        "average_incremental_accuracy_micro": M.AverageIncrementalAccuracy(width, average="micro", **options),
        "accuracy_over_time": M.AccuracyOverTime(width, **options),
        "learning_accuracy": M.LearningAccuracy(width, **options),
        "worst_task_accuracy": M.WorstTaskAccuracy(width, **options),
        "forgetting": M.Forgetting(width, **options),
        "forgetting_since_start": M.Forgetting(width, since="start", **options),
        "forgetting_clipped": M.Forgetting(width, clip=True, **options),
        "forgetting_from_learned": M.Forgetting(width, peak="learned", **options),
        "forgetting_relative": M.Forgetting(width, normalize="peak", **options),
        "forgetting_max": M.Forgetting(width, reduction="max", **options),
        "backward_transfer": M.BackwardTransfer(width, **options),
        "backward_transfer_running": M.BackwardTransfer(width, scheme="running", **options),
        "remembering": M.Remembering(width, **options),
        "positive_backward_transfer": M.PositiveBackwardTransfer(width, **options),
        "forward_transfer_no_baseline": M.ForwardTransfer(width, baseline=None, **options),
        "forward_transfer_triangle": M.ForwardTransfer(width, scheme="triangle", **options),
        "forward_transfer_independent": M.PlasticityGain(width, independent=given["independent"], **options),
        "intransigence": M.Intransigence(width, joint_upto=given["joint_upto"], **options),
        "forgetting_ratio": M.ForgettingRatio(width, joint=given["joint_final"], random=given["random"], **options),
        "normalized_accuracy": M.NormalizedAccuracy(width, joint=given["joint_final"], **options),
        "stability": M.Stability(width, **options),
        "stability_plasticity": M.StabilityPlasticity(width, **options),
        "mtil_transfer": M.TransferAccuracy(width, **options),
        "performance_drop": M.PerformanceDrop(width, **options),
        "harmonic_accuracy": M.HarmonicAccuracy(width, **options),
    }
    for name, metric in members.items():
        for row, (right, accuracy) in enumerate(zip(counts, matrix, strict=True)):
            metric.update(row, range(width), right, torch.where(accuracy.isnan(), -1, tests.long()))
        value = metric.compute()
        _check(name, value, case["expected"][name])
        assert (metric.undefined is not None) == bool(value.isnan()), name


@pytest.mark.parametrize("case", _cases("matrix_cases"))
def test_golden_other_libraries(case):
    matrix, learned_at, given = _inputs(case)
    inputs = {name: given[name] for name in ("initial", "n_test", "independent", "random")}
    checked = 0
    for golden_key, peer in case.get("peers", {}).items():
        prefix = next((p for p in PEERS if golden_key.startswith(f"{p}.")), None)
        if prefix is None:
            continue
        reported = peer_values(matrix, PEERS[prefix], learned_at=learned_at, joint=given["joint_final"], **inputs)
        value, expected = reported[golden_key.removeprefix(f"{prefix}.")], peer["value"]
        if isinstance(expected, str) and expected != "nan":
            assert value == expected, golden_key
        else:
            _check(golden_key, value, None if expected == "nan" else expected)
        checked += 1
    assert checked == sum(any(k.startswith(f"{p}.") for p in PEERS) for k in case.get("peers", {}))


def _traces(given):
    matrix, ends = _table(given["traces"]).T, given["end_step"]
    values = {
        "min_accuracy": F.min_accuracy(matrix, learned_at=ends),
        "worst_case_accuracy": F.worst_case_accuracy(matrix, learned_at=ends),
    }
    for window in given.get("windows", []):
        values[f"windowed_forgetting@{window}"] = F.windowed_forgetting(matrix, window, learned_at=ends)
        values[f"windowed_plasticity@{window}"] = F.windowed_plasticity(matrix, window, learned_at=ends)
    for task in range(matrix.shape[1]):
        gap = F.stability_gap(matrix[:, task], given.get("switch", 0), given.get("horizon"))
        values[f"stability_gap_task{task}"] = gap._asdict()
    return values


def _short_trace(given):
    matrix, window = _table(given["trace"])[:, None], given["window"]
    return {
        "windowed_forgetting": F.windowed_forgetting(matrix, window),
        "windowed_plasticity": F.windowed_plasticity(matrix, window),
    }


def _anytime(given):
    accuracy, samples = _table(given["accuracy"]), torch.tensor(given["samples_seen"])
    return {
        "a_auc_rectangle": F.anytime_accuracy(accuracy, samples, given["period"]),
        "a_auc_trapezoid": F.anytime_accuracy(accuracy, samples, rule="trapezoid"),
    }


def _predictions(given):
    tasks, seen = given["task_of_class"], given["seen_classes"]
    confusion = F.class_confusion(torch.tensor(given["pred"]), torch.tensor(given["true"]), len(tasks))
    return {
        "accuracy_micro": F.seen_class_accuracy(confusion, seen),
        "accuracy_class_balanced": F.seen_class_accuracy(confusion, seen, average="class"),
        "task_recency_bias": F.task_recency_bias(confusion, seen, tasks),
        "task_recency_pull": F.task_recency_pull(confusion, seen, tasks),
        "task_confusion_counts": F.task_confusion_matrix(confusion, tasks),
    }


def _calibration(given):
    confidence, correct = _table(given["confidence"]), _table(given["correct"])
    return {
        f"ece_{closed}_closed": F.expected_calibration_error(confidence, correct, given["bins"], closed)
        for closed in ("left", "right")
    }


def _multilabel(given):
    scores, labels = _table(given["scores"]), torch.tensor(given["labels"])
    counts = F.multilabel_counts(scores, labels, threshold=given["threshold"])
    right, predicted, present = counts.double()
    precision, recall = right / predicted.clamp(min=1), right / present
    return {
        "CP": precision.mean(),
        "CR": recall.mean(),
        "CF1": F.multilabel_cf1(counts),
        "CF1_mean_of_f1": torch.where(right > 0, 2 * precision * recall / (precision + recall), 0.0).mean(),
        "OP": right.sum() / predicted.sum(),
        "OR": right.sum() / present.sum(),
        "OF1": F.multilabel_of1(counts),
        "mAP": F.seen_label_map(scores, labels),
        "AP": F.average_precision(scores, labels),
    }


def _representation(given):
    before, after = _table(given["before"]), _table(given["after"])
    spectrum = torch.linalg.svdvals(before)
    share = spectrum / spectrum.sum()
    batches = zip(before.split(10), after.split(10), strict=True)
    return {
        "effective_rank_before": F.effective_rank(before),
        "effective_rank_after": F.effective_rank(after),
        "effective_rank_before_centered": F.effective_rank(before - before.mean(0)),
        "effective_rank_before_no_eps": (-(share * share.log()).sum()).exp(),
        "linear_cka": F.linear_cka(before, after),
        "linear_cka_self": F.linear_cka(before, before),
        "cka_batch_mean_of_4x10": torch.stack([F.linear_cka(x, y) for x, y in batches]).mean(),
    }


def _cost(given):
    return {
        "model_size_efficiency": F.model_size_efficiency(given["params"]),
        "sample_storage_efficiency": F.sample_storage_efficiency(given["stored_samples"], given["total_samples"]),
        "compute_efficiency": F.compute_efficiency(given["ops"], given["ops_forward_backward"], given["eps"]),
        "params_final_over_first": F.parameter_growth(given["params"]),
    }


def _ranking(given):
    kemeny = aggregate_rankings(given["scores"], "kemeny")
    return {
        "borda_rank_sums": aggregate_rankings(given["scores"], "borda").rank_sums,
        "kemeny_cost": kemeny.cost,
        "kemeny_orders": [list(order) for order in kemeny.orders],
    }


def _seeds(given):
    first = summarize_seeds(given["a"])
    (comparison,) = compare({"a": given["a"], "b": given["b"]})
    return {
        "mean_a": first.mean,
        "sd_a_ddof1": first.sd,
        "ci95_half_a": first.half_width,
        "mean_diff": comparison.difference.mean,
        "ci95_half_diff": comparison.difference.half_width,
        "sign_flip_p": comparison.p_value,
    }


KINDS = [  # a key that only inputs of the kind have, and what computes them
    ("traces", _traces),
    ("trace", _short_trace),
    ("samples_seen", _anytime),
    ("first_batches", lambda i: {"learning_curve_area": F.learning_curve_area(_table(i["first_batches"]), i["beta"])}),
    ("pred", _predictions),
    ("confidence", _calibration),
    ("labels", _multilabel),
    ("before", _representation),
    ("params", _cost),
    ("scores", _ranking),
    ("a", _seeds),
]


@pytest.mark.parametrize("case", _cases("other_cases"))
def test_golden_other_measures(case):
    compute = next(function for key, function in KINDS if key in case["input"])
    values = compute(case["input"])
    for name, expected in case["expected"].items():
        if isinstance(expected, dict):
            for part, wanted in expected.items():
                _check(f"{name}.{part}", values[name][part], wanted)
        else:
            _check(name, values[name], expected)
