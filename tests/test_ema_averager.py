"""The averager without Lightning: formulas, fallbacks, precision, selection, memory."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from cl_plugins import tensor_lists
from cl_plugins.ema import BalancedAverager
from cl_plugins.ema_log import WeightLog
from cl_plugins.ema_rules import RULES, Rule, group_ids, make_rule
from cl_plugins.tensor_lists import l1_change_, l1_distances


def _course(steps: int = 12, seed: int = 0) -> tuple[list[list[torch.Tensor]], list[list[torch.Tensor]]]:
    """Weights (one more than steps) and gradients of two tensors, large enough for weights inside (0, 1)."""
    g = torch.Generator().manual_seed(seed)
    weights = [[torch.randn(20, 30, generator=g), torch.randn(40, generator=g)]]
    grads = []
    for _ in range(steps):
        grads.append([0.05 * torch.randn(20, 30, generator=g), 0.5 * torch.randn(40, generator=g)])
        weights.append([w - 0.5 * d for w, d in zip(weights[-1], grads[-1], strict=True)])
    return weights, grads


def _by_hand(weights: list[torch.Tensor], grads: list[torch.Tensor], kappa: float, fallback: float) -> list[float]:
    """The released rule with the average starting before the first step, in float64 and with plain numbers."""
    average, last, alphas = weights[0].double(), None, []
    for weight, grad in zip(weights[1:], grads, strict=True):
        alpha = fallback
        if last is not None:
            a = float((weight.double() - average).abs().sum())
            b = float(grad.double().abs().sum())
            c = float((grad.double() - last).abs().sum())
            raw = kappa * (1 + b) / (a * c)
            alpha = raw if 0 < raw < 1 else fallback
        average = (1 - alpha) * average + alpha * weight.double()
        last = grad.double()
        alphas.append(alpha)
    return alphas


@pytest.mark.parametrize(("name", "kappa", "fallback"), [("released", 2.0, 0.01), ("toolbox", 0.01, 0.001)])
def test_rule_equals_plain_arithmetic(name, kappa, fallback):
    weights, grads = _course()
    averager = BalancedAverager(name)
    averager.join(["a", "b"], weights[0])
    alphas = torch.stack([averager.update(w, g) for w, g in zip(weights[1:], grads, strict=True)])
    for k in range(2):
        expected = _by_hand([w[k] for w in weights], [g[k] for g in grads], kappa, fallback)
        torch.testing.assert_close(alphas[:, k].double(), torch.tensor(expected).double(), rtol=1e-5, atol=0)
    assert 0 < averager.log.share_of_fallbacks() < 1


def test_dimension_free_follows_learning_rate_and_size():
    weights, grads = _course()
    lrs, rho = [1e-3, 2e-3], 0.3
    averager = BalancedAverager(Rule("dimension_free", rho=rho, on_overflow="fallback"))
    averager.join(["a", "b"], weights[0])
    alphas = torch.stack([averager.update(w, g, lrs=lrs) for w, g in zip(weights[1:], grads, strict=True)])
    for k in range(2):
        kappa = rho * lrs[k] * weights[0][k].numel()
        expected = _by_hand([w[k] for w in weights], [g[k] for g in grads], kappa, 0.01)
        torch.testing.assert_close(alphas[:, k].double(), torch.tensor(expected).double(), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="`lrs` must hold a learning rate per tensor"):
        averager.update(weights[-1], grads[-1])


def test_fixed_decay_equals_torch_from_the_second_step():
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    net = nn.Linear(5, 3)
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ours = BalancedAverager(make_rule("fixed", decay=0.9), start="after_first_step")
    ours.join(["w", "b"], list(net.parameters()))
    for step in range(6):
        with torch.no_grad():
            for p in net.parameters():
                p.add_(torch.full_like(p, 0.1 * (step + 1)))
        theirs.update_parameters(net)
        ours.update([p.detach() for p in net.parameters()], [None, None])
    for mine, other in zip(ours.averages, theirs.module.parameters(), strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=1e-6, atol=1e-7)
    assert ours.previous == []  # a fixed decay reads no gradient and keeps none


def test_horizon_leaves_its_share_of_the_old_weights():
    averager = BalancedAverager(make_rule("horizon", keep=0.3))
    averager.join(["w"], [torch.ones(3)])
    with pytest.raises(
        ValueError, match="`steps` must be the number of steps of the task for rule 'horizon', got None"
    ):
        averager.update([torch.zeros(3)], [None])
    averager.total_steps = 250
    for _ in range(250):
        averager.update([torch.zeros(3)], [None])
    torch.testing.assert_close(averager.averages[0], torch.full((3,), 0.3), rtol=1e-4, atol=0)


@pytest.mark.parametrize("granularity", ["module", "global"])
def test_shared_weights_come_from_summed_norms(granularity):
    weights, grads = _course()
    names = ["layer.weight", "layer.bias"]
    averager = BalancedAverager(granularity=granularity)
    averager.join(names, weights[0])
    joined = BalancedAverager()
    joined.join(["all"], [torch.cat([w.flatten() for w in weights[0]])])
    for w, g in zip(weights[1:], grads, strict=True):
        alpha = averager.update(w, g)
        expected = joined.update([torch.cat([x.flatten() for x in w])], [torch.cat([x.flatten() for x in g])])
        assert alpha[0] == alpha[1]
        torch.testing.assert_close(alpha[:1], expected, rtol=1e-4, atol=0)


def test_lora_factors_are_one_module():
    names = ["q.lora_A.default.weight", "q.lora_B.default.weight", "k.lora_A.default.weight"]
    assert group_ids(names, "module") == [0, 0, 1]


def test_overflow_can_follow():
    averager = BalancedAverager(make_rule("released", kappa=1e6, on_overflow="follow"))
    weights, grads = _course(2)
    averager.join(["a", "b"], weights[0])
    averager.update(weights[1], grads[0])
    assert averager.update(weights[2], grads[1]).tolist() == [1.0, 1.0]
    assert torch.equal(averager.averages[0], weights[2][0])


def test_missing_gradient_falls_back_twice():
    weights, grads = _course(5)
    averager = BalancedAverager()
    averager.join(["a", "b"], weights[0])
    seen = []
    for step in range(5):
        given = [None if step == 2 else grads[step][0], grads[step][1]]
        seen.append(float(averager.update(weights[step + 1], given)[0]))
    assert [round(a, 6) == 0.01 for a in seen] == [True, False, True, True, False]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_gradient_falls_back_as_released_or_is_skipped(bad):
    weights, grads = _course(3)
    for rule, expected in ((make_rule(), 0.01), (make_rule("released", on_nonfinite="skip"), 0.0)):
        averager = BalancedAverager(rule)
        averager.join(["a", "b"], weights[0])
        averager.update(weights[1], grads[0])
        before = averager.averages[0].clone()
        broken = torch.full_like(weights[2][0], bad) if expected == 0.0 else weights[2][0]
        alpha = averager.update([broken, weights[2][1]], [torch.full_like(grads[1][0], bad), grads[1][1]])
        assert float(alpha[0]) == pytest.approx(expected)
        assert torch.equal(averager.averages[0], before) == (expected == 0.0)
        assert float(averager.update(weights[3], grads[2])[0]) == pytest.approx(
            0.01
        )  # its previous gradient is unusable


def test_chunks_change_nothing(monkeypatch):
    weights, grads = _course()
    results = []
    for limit in (1 << 22, 50):
        monkeypatch.setattr(tensor_lists.chunks, "__defaults__", (limit,))
        averager = BalancedAverager()
        averager.join(["a", "b"], weights[0])
        for w, g in zip(weights[1:], grads, strict=True):
            averager.update(w, g)
        results.append(averager.averages)
    assert len(averager._plan((0, 1)).parts) == 2
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_selected_tensors_alone_move():
    weights, grads = _course(3)
    averager = BalancedAverager()
    averager.join(["a", "b"], weights[0])
    for step in range(3):
        averager.update([weights[step + 1][1]], [grads[step][1]], chosen=[1])
    assert torch.equal(averager.averages[0], weights[0][0])
    assert averager.steps == [0, 3]


@pytest.mark.parametrize("rule", [r for r in RULES if r != "eq60"])
def test_memory_is_two_float32_copies(rule):
    averager = BalancedAverager(rule)
    weights = [torch.zeros(100, 30, dtype=torch.bfloat16), torch.zeros(7)]
    averager.join(["a", "b"], weights)
    copies = 1 if rule in ("fixed", "horizon") else 2
    assert averager.state_bytes() == copies * 4 * 3007
    assert {t.dtype for t in [*averager.averages, *averager.previous]} == {torch.float32}


def _train(dtype: torch.dtype, average_dtype: torch.dtype | None, steps: int = 2000) -> BalancedAverager:
    """Weights near 1 that drift by less than half a bfloat16 step at decay 0.99."""
    averager = BalancedAverager("fixed", dtype=average_dtype)
    start, target = torch.ones(64, dtype=dtype), torch.full((64,), 1.046875, dtype=dtype)
    averager.join(["w"], [start])
    for _ in range(steps):
        averager.update([target], [None])
    return averager


def test_bfloat16_training_moves_the_average_as_float32_does():
    wide, narrow = _train(torch.float32, torch.float32), _train(torch.bfloat16, torch.float32)
    assert torch.equal(wide.averages[0], narrow.averages[0])
    assert float(narrow.averages[0][0]) == pytest.approx(1.046875, abs=1e-5)
    frozen = _train(torch.bfloat16, None)
    assert frozen.averages[0].unique().tolist() == [1.0]  # why averages are float32


def test_bfloat16_course_of_the_balanced_rule():
    """2,000 steps of noisy descent in bfloat16; the averages see the same rounded weights, so they agree closely."""
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(400, generator=g).bfloat16()
    narrow, wide = BalancedAverager(), BalancedAverager()
    narrow.join(["w"], [weight])
    wide.join(["w"], [weight.float()])
    for _ in range(2000):
        grad = (0.1 * weight.float() + 0.05 * torch.randn(400, generator=g)).bfloat16()
        weight = weight - 0.1 * grad
        a = narrow.update([weight], [grad])
        b = wide.update([weight.float()], [grad.float()])
        assert a == b
    assert torch.equal(narrow.averages[0], wide.averages[0])


def test_state_round_trip_continues_bitwise():
    weights, grads = _course()
    for rule in RULES:
        whole = BalancedAverager(rule)
        whole.join(["a", "b"], weights[0])
        rest = BalancedAverager(rule)
        whole.total_steps = rest.total_steps = 12
        for step in range(12):
            if step == 6:
                rest.load_state_dict(copy.deepcopy(whole.state_dict()), [torch.zeros_like(w) for w in weights[0]])
            for averager in (whole, rest) if step >= 6 else (whole,):
                averager.update(weights[step + 1], grads[step], lrs=[0.1, 0.1])
        assert all(torch.equal(x, y) for x, y in zip(whole.averages, rest.averages, strict=True))
        assert whole.log.series() == rest.log.series()


def test_state_refuses_other_shapes_and_rules():
    averager = BalancedAverager()
    averager.join(["a"], [torch.zeros(2)])
    with pytest.raises(ValueError, match=r"average of 'a' must have the weight's shape \(3,\), got \(2,\)"):
        BalancedAverager().load_state_dict(averager.state_dict(), [torch.zeros(3)])
    with pytest.raises(ValueError, match="must be one of rule 'fixed'"):
        BalancedAverager("fixed").load_state_dict(averager.state_dict(), [torch.zeros(2)])


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: make_rule("relased"), "did you mean 'released'"),
        (lambda: make_rule("released", kappa=0.0), r"`kappa` must be in \(0, inf\), got 0.0"),
        (lambda: make_rule("fixed", decay=1.0), r"`decay` must be in \[0, 1.0\), got 1.0"),
        (lambda: make_rule("released", fallback=0.0), r"`fallback` must be in \(0, 1.0\], got 0.0"),
        (lambda: make_rule("released", on_overflow="clamp"), "`on_overflow` must be 'fallback' or 'follow'"),
        (lambda: make_rule("released", on_nonfinite="stop"), "`on_nonfinite` must be 'fallback' or 'skip'"),
        (lambda: BalancedAverager(granularity="layer"), "`granularity` must be 'tensor', 'module' or 'global'"),
        (lambda: BalancedAverager(start="later"), "`start` must be 'before_first_step'"),
        (lambda: WeightLog(1), "`max_points` must be 2 or more"),
    ],
)
def test_bad_settings_are_refused(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_lists_of_other_lengths_are_refused():
    averager = BalancedAverager()
    averager.join(["a"], [torch.zeros(2)])
    with pytest.raises(ValueError, match="must hold 1 tensors, got 2 and 2"):
        averager.update([torch.zeros(2)] * 2, [None] * 2)
    with pytest.raises(ValueError, match="`names` must be new and distinct"):
        averager.join(["a"], [torch.zeros(2)])
    with pytest.raises(ValueError, match="`weights` must hold 1 tensors"):
        averager.copy_to([])


def test_log_stays_bounded_and_evenly_spaced():
    log = WeightLog(max_points=8)
    for step in range(1000):
        log.add(torch.tensor([step / 1000, 0.5, 0.25]), torch.tensor([True, False, False]))
    steps = log.series()["step"]
    assert 8 <= len(steps) <= 16
    assert len({b - a for a, b in pairwise(steps)}) == 1
    assert log.share_of_fallbacks() == pytest.approx(1 / 3)


@pytest.mark.gpu
def test_no_synchronization_with_the_host():
    weights, grads = _course(4)
    averager = BalancedAverager()
    on_device = [[w.cuda() for w in ws] for ws in weights], [[g.cuda() for g in gs] for gs in grads]
    averager.join(["a", "b"], on_device[0][0])
    averager.update(on_device[0][1], on_device[1][0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            averager.update(on_device[0][step + 1], on_device[1][step])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # one tensor after the other, and all at once
def test_sums_of_changes(dtype):
    g = torch.Generator().manual_seed(5)
    old = [torch.randn(s, generator=g, dtype=dtype) for s in ((4, 3), (7,), ())]
    new = [torch.randn(o.shape, generator=g, dtype=dtype) for o in old]
    pairs = list(zip(old, new, strict=True))
    expected = [sum(abs(x - y) for x, y in zip(*(t.flatten().tolist() for t in p), strict=True)) for p in pairs]
    cpu = torch.device("cpu")
    assert l1_distances(old, new, cpu, dtype).tolist() == pytest.approx(expected, rel=1e-5)
    assert l1_change_(old, new, cpu, dtype).tolist() == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(o, n) for o, n in pairs)
