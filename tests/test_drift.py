"""DriftTracker: its numbers by independent formulas, and that training does not notice it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from cl_plugins import ContinualCallback, fit_stream, functional
from cl_plugins.callbacks import DriftTracker, ForgettingDashboard, LoRA, NearestMean
from cl_plugins.cli import main
from cl_plugins.drift import DriftRow, recency_of_row, size_by_kind
from cl_plugins.drift_probe import probe_batches, probe_head
from cl_plugins.evaluation import default_predict
from cl_plugins.plugin import Row
from cl_plugins.runs import read_run
from cl_plugins.scenarios import ClassIncremental, DomainIncremental
from tests._helpers import PlainModule, StopAtTask, image_data, quiet_trainer, tiny_stream


def _rank(features):
    s = np.linalg.svd(features.astype(np.float64), compute_uv=False)
    p = s / s.sum() + 1e-7
    return math.exp(-(p * np.log(p)).sum())


def _cka(x, y):
    """HSIC form with n x n Gram matrices, where the library uses d x d products."""
    n = len(x)
    center = np.eye(n) - 1.0 / n
    k, other = center @ (x @ x.T) @ center, center @ (y @ y.T) @ center
    return (k * other).sum() / math.sqrt((k * k).sum() * (other * other).sum())


def _ece(confidence, correct, bins=15):
    total = 0.0
    for b in range(bins):
        inside = (confidence >= b / bins) & ((confidence < (b + 1) / bins) | (b == bins - 1))
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


class Look(ContinualCallback):
    """Keeps the model as it is after each task, and every weight after each step."""

    training = "neutral"

    def __init__(self):
        super().__init__()
        self.models, self.steps = [], []

    def on_train_batch_end(self, trainer, pl_module, *arguments):
        self.steps.append(torch.cat([p.detach().flatten().clone() for p in pl_module.parameters()]))

    def on_row(self, trainer, pl_module, row):
        self.models.append({k: v.clone() for k, v in pl_module.state_dict().items()})


def _run(*callbacks, stream=None, module=None, predict=default_predict, **options):
    look = Look()
    trainer = quiet_trainer(callbacks=[*callbacks, look], max_epochs=1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        result = fit_stream(trainer, module or PlainModule(), stream or tiny_stream(**options), predict=predict)
    return result, look


@pytest.mark.parametrize("bins", [15, 1])
def test_the_numbers_are_those_of_short_formulas(bins):
    stream, tracker = tiny_stream(), DriftTracker(probe=24, bins=bins)
    result, look = _run(tracker, module=PlainModule(lr=0.1))
    assert result.drift == tracker.rows
    assert [row.after for row in result.drift] == [0, 1, 2]
    features, errors = [], []
    model = PlainModule()
    for after, weights in enumerate(look.models):
        model.load_state_dict(weights)
        model.eval()
        found, judged = [], {}
        for task in stream.tasks:
            data = list(stream.test_loader(task.index))
            x, y = torch.cat([b[0] for b in data])[:8], torch.cat([b[1] for b in data])[:8]
            with torch.no_grad():
                inner = model.model.forward_head(model.model.forward_features(x), pre_logits=True)
                logits = model.model.head(inner)
            found.append(inner)
            if task.index <= after:
                shares = logits[:, : 2 * (after + 1)].softmax(1).numpy()
                judged[task.index] = shares.max(1), shares.argmax(1) == y.numpy()
        features.append(torch.cat(found).double().numpy())
        errors.append({k: _ece(*v, bins) for k, v in judged.items()})
        row = result.drift[after]
        assert row.samples == 24
        assert row.effective_rank == pytest.approx(_rank(features[-1]), rel=1e-5)
        assert row.cka_first == pytest.approx(_cka(features[-1], features[0]), rel=1e-5)
        if after:
            assert row.cka_previous == pytest.approx(_cka(features[-1], features[-2]), rel=1e-5)
        assert row.task_calibration_error == pytest.approx(errors[-1], abs=1e-6)
        pooled = [np.concatenate([v[k] for v in judged.values()]) for k in (0, 1)]
        assert row.calibration_error == pytest.approx(_ece(*pooled, bins), abs=1e-6)
        assert row.calibration_drift == pytest.approx({k: errors[-1][k] - errors[k][k] for k in range(after)}, abs=1e-6)
    assert abs(_ece(*judged[2], 15) - _ece(*judged[2], 1)) > 0.1  # confidences lie in several bins
    assert result.drift[2].cka_first < 0.999  # the features did move
    assert result.drift[0].undefined["cka_previous"] == "the first measurement has none before it"


class Drawing(PlainModule):
    """Draws from the global generator in every pass, so that one pass more shifts what training draws."""

    def forward(self, x):
        return self.model(x + 0.1 * torch.rand(1))


@pytest.mark.parametrize("module", [PlainModule, Drawing])
def test_training_is_the_same_to_the_last_bit(module):
    for extra in ((), (LoRA(rank=2),)):
        plain, without = _run(*extra, module=module(), stream=tiny_stream(num_workers=0))
        again, with_it = _run(*(LoRA(rank=2) for _ in extra), DriftTracker(probe=10), module=module())
        assert len(without.steps) == len(with_it.steps) > 0
        assert all(torch.equal(a, b) for a, b in zip(without.steps, with_it.steps, strict=True))
        assert torch.equal(plain.correct, again.correct)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.01, 100.0), st.integers(2, 6), st.integers(7, 12))
def test_cka_ignores_rotations_and_scales(seed, scale, dim, samples):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, dim, generator=draw, dtype=torch.float64)
    y = torch.randn(samples, dim + 1, generator=draw, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(dim, dim, generator=draw, dtype=torch.float64))
    assert float(functional.linear_cka(x, scale * x @ turn)) == pytest.approx(1.0, abs=1e-9)
    assert float(functional.linear_cka(scale * x @ turn, y)) == pytest.approx(
        float(functional.linear_cka(x, y)), abs=1e-9
    )
    assert float(functional.linear_cka(x, y)) == pytest.approx(_cka(x.numpy(), y.numpy()), abs=1e-9)
    rank = float(functional.effective_rank(x))
    assert 1.0 - 1e-5 <= rank <= dim + 1e-5
    assert float(functional.effective_rank(scale * x @ turn)) == pytest.approx(rank, rel=1e-6)


def test_the_rank_reaches_both_ends():
    assert float(functional.effective_rank(torch.ones(9, 4))) == pytest.approx(1.0, abs=1e-4)
    assert float(functional.effective_rank(3 * torch.eye(5))) == pytest.approx(5.0, abs=1e-4)


def test_recency_from_samples_one_by_one():
    draw = np.random.default_rng(0)
    true, named = draw.integers(0, 6, 400), draw.integers(0, 6, 400)  # two classes a task
    right = true == named
    table = [[int(((true // 2 == i) & (named // 2 == j)).sum()) for j in range(3)] for i in range(3)]
    correct = tuple(int(right[true // 2 == i].sum()) for i in range(3))
    total = tuple(int((true // 2 == i).sum()) for i in range(3))
    numbers = recency_of_row(Row(2, correct, total, correct, tuple(map(tuple, table)), 0.0), [0, 1, 2], [2])
    assert numbers["task_error"] == pytest.approx((true // 2 != named // 2).mean())
    assert numbers["recency_bias"] == pytest.approx((named // 2 == 2).mean() - (true // 2 == 2).mean())
    wrong_old = ~right & (true // 2 < 2)
    assert numbers["recency_pull"] == pytest.approx((named[wrong_old] // 2 == 2).mean())


def test_what_is_undefined_has_a_reason():
    first = _run(DriftTracker(probe=24))[0].drift[0]
    assert first.recency_bias is None
    assert "second task" in first.undefined["recency_bias"]
    domains = DomainIncremental([(image_data(4, seed=k), image_data(2, seed=9 + k)) for k in range(2)], batch_size=8)
    shared = _run(DriftTracker(probe=8), stream=domains)[0].drift[1]
    assert shared.task_error is None
    assert "share classes" in shared.undefined["task_error"]
    assert set(shared.task_calibration_error) == {0, 1}

    class TwoHeads(PlainModule):
        def __init__(self):
            super().__init__()
            self.model.head = nn.Identity()
            self.one, self.two = nn.Linear(16, 6), nn.Linear(16, 6)

        def forward(self, x):
            return self.one(self.model(x)) + self.two(self.model(x))

    row = _run(DriftTracker(probe=8), module=TwoHeads())[0].drift[2]
    assert row.effective_rank is None
    assert "one, two" in row.undefined["effective_rank"]
    assert row.calibration_error is not None
    named = _run(DriftTracker(probe=8, head="two"), module=(module := TwoHeads()))[0].drift[2]
    assert named.effective_rank is not None
    assert probe_head(module, "two") == (module.two, "")


def test_sizes_by_kind():
    _, look = _run(LoRA(rank=2), tracker := DriftTracker(probe=8))
    row, whole = tracker.rows[-1], sum(v.numel() for v in look.models[-1].values())
    assert sum(row.parameters.values()) == whole
    assert row.bytes["frozen"] == 4 * row.parameters["frozen"] > 0
    assert 0 < row.parameters["trained"] < row.parameters["frozen"]
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    state = {"a": [torch.zeros(5, dtype=torch.float64)], "shared": model[0].weight.detach()}
    counts, sizes = size_by_kind(model, state=state)
    assert counts == {"frozen": 2, "trained": 10, "method": 0, "buffers": 5, "callbacks": 5}
    assert sizes == {"frozen": 8, "trained": 40, "method": 0, "buffers": 24, "callbacks": 40}
    assert _run(NearestMean(), DriftTracker(probe=8))[0].drift[-1].parameters["trained"] == 0
    kept = _run(Holding(7), Measuring(100), DriftTracker(probe=8))[0].drift[-1]
    assert (kept.parameters["callbacks"], kept.bytes["callbacks"]) == (7, 28)  # of methods, not of what measures


class Holding(ContinualCallback):
    """Keeps tensors outside the model."""

    training = "required"

    def __init__(self, size):
        super().__init__()
        self.size = size

    def state_dict(self):
        return {"kept": [torch.zeros(self.size)]}


class Measuring(Holding):
    training = "neutral"


class Sure(ContinualCallback):
    """Predictions of this method name one class, whatever the model says."""

    training = "neutral"

    def __init__(self, label):
        super().__init__()
        self.label = label

    def predictor(self, predict):
        return lambda module, batch: 1e3 * F.one_hot(torch.full((len(batch[0]),), self.label), 6).float()


def test_it_predicts_as_the_evaluation_does():
    sure = Sure(1)
    row = _run(DriftTracker(probe=24), sure)[0].drift[0]  # task 0 has as many samples of class 0 as of class 1
    own = _run(DriftTracker(probe=24), sure, predict=Sure(5).predictor(None))[0].drift[2]
    labels = torch.cat([y for _, y in tiny_stream().test_loader(0)])[:8]
    assert row.task_calibration_error == pytest.approx({0: 1 - (labels == 1).float().mean().item()})
    labels = torch.cat([y for _, y in tiny_stream().test_loader(2)])[:8]
    assert own.task_calibration_error == pytest.approx({0: 1, 1: 1, 2: 1 - (labels == 5).float().mean().item()})


def test_a_long_stream_is_probed_at_twenty_tasks_from_the_first_to_the_last():
    data = (image_data(n, n_classes=25, seed=n) for n in (1, 4))
    stream = ClassIncremental(next(data), test=next(data), n_tasks=25)
    alone = [(task, most) for task, most, _ in probe_batches(stream, 50, 0, 1)]
    assert alone == [(round(k * 24 / 19), 3) for k in range(20)]  # 50 / 20, rounded up
    shares = [[most for _, most, _ in probe_batches(stream, 50, rank, 2)] for rank in (0, 1)]
    assert shares == [[2] * 20, [1] * 20]


def test_every_few_tasks_and_the_last_and_batches_of_the_user():
    batches = list(tiny_stream().test_loader(0))
    rows = _run(DriftTracker(probe=batches, every=4), n_tasks=6, n_per_class=4)[0].drift
    assert [row.after for row in rows] == [3, 5]
    assert {row.samples for row in rows} == {10}
    assert rows[-1].task_calibration_error == {}
    assert rows[-1].calibration_error is not None


def test_a_resumed_stream_goes_on_with_the_same_measurements(tmp_path):
    from cl_plugins.callbacks import StreamCheckpoint

    def run(*more, ckpt_path=None):
        callbacks = [DriftTracker(probe=24), StreamCheckpoint(tmp_path), *more]
        trainer = quiet_trainer(callbacks=callbacks, max_epochs=1, enable_checkpointing=True)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return fit_stream(trainer, PlainModule(), tiny_stream(), ckpt_path)

    with pytest.raises(KeyboardInterrupt):
        run(StopAtTask(2))
    assert run(ckpt_path="last").drift == _run(DriftTracker(probe=24))[0].drift


@pytest.mark.parametrize("first", ["tracker", "dashboard"])
def test_the_result_and_the_store_have_it(tmp_path, first):
    tracker, dashboard = DriftTracker(probe=24), ForgettingDashboard(tmp_path, "demo")
    result, _ = _run(*([tracker, dashboard] if first == "tracker" else [dashboard, tracker]))
    told = json.loads(result.save(tmp_path / "out").read_text())["drift"]
    assert [DriftRow.from_dict(row) for row in told] == result.drift
    events = {(e["name"], e["task"]): e for e in read_run(tmp_path / "demo").plug}
    for row in result.drift:
        assert events["drift/effective rank", row.after]["value"] == row.effective_rank
    assert events["drift/calibration drift per task", 2]["values"] == list(result.drift[2].calibration_drift.values())
    assert "Effective rank of the features" in (tmp_path / "demo" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe": 1}, "`probe` must be at least 2"),
        ({"probe": "all"}, "`probe` must be a number of samples or a list of batches, got 'all'"),
        ({"probe": []}, "`probe` must be a number of samples or a list of batches"),
        ({"every": 0}, "`every` must be 'task' or a number of tasks"),
        ({"every": "step"}, "`every` must be 'task' or a number of tasks"),
        ({"bins": 0}, "`bins` must be at least 1"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        DriftTracker(**options)


@pytest.mark.slow
def test_on_the_command_line(tmp_path):
    arguments = ["run", "--method", "lora", "--scenario", "split-digits", "--epochs", "1", "--drift", "--quiet"]
    assert main([*arguments, "--out", str(tmp_path / "run")]) == 0
    assert len(json.loads((tmp_path / "run" / "result.json").read_text())["drift"]) == 5
