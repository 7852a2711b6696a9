"""Side networks over a stream of tasks: who trains, who is frozen, who answers."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from cl_plugins import Task
from cl_plugins.callbacks import (
    CacheFeatures,
    ContinualEvaluation,
    HierarchicalSideTuning,
    NearestMean,
    SideTuning,
)
from cl_plugins.decay import exempt_from_decay
from cl_plugins.heads import HIDDEN_LOGIT
from cl_plugins.pooled_evaluation import PooledLoader, evaluate_pooled
from cl_plugins.scenarios import ClassIncremental, build_scenario
from cl_plugins.side_network import TapRecord
from tests._helpers import PlainModule, quiet_trainer, tiny_stream, tiny_vit
from tests._side import ALL_METHODS, METHODS, PYRAMID, images, started, train

# regimes


@pytest.mark.parametrize("name", ALL_METHODS)
def test_per_task_logits_of_the_first_task_stay_bit_equal(name):
    class Watch(pl.Callback):
        logits: list[torch.Tensor]

        def on_fit_end(self, trainer, pl_module):
            bank = pl_module.plugins["side"]
            bank.known_task = 0
            with torch.no_grad():
                self.logits.append(pl_module.eval()(images(5))[:, [0, 1]].clone())
            bank.known_task = None

    watch = Watch()
    watch.logits = []
    module = PlainModule(tiny_vit(depth=4), weight_decay=0.1)
    result = train(module, ALL_METHODS[name](regime="per_task"), callbacks=[watch])
    assert len(module.plugins["side"].sides) == 3
    assert all(torch.equal(watch.logits[0], later) for later in watch.logits[1:])
    assert result.forgetting >= 0


def test_frozen_side_networks_keep_every_bit_and_gates_do_not_decay():
    module = PlainModule(tiny_vit(depth=4), weight_decay=0.5)
    method = METHODS["lst"](regime="per_task_dense")
    states = []

    class Keep(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            states.append(copy.deepcopy(pl_module.plugins["side"].state_dict()))

    train(module, method, callbacks=[Keep()])
    for before, after in pairwise(states):
        names = [n for n in before if n.startswith(("sides.", "mix."))]
        assert names
        assert all(torch.equal(before[n], after[n]) for n in names)
    bank = module.plugins["side"]
    assert [len(m) for m in bank.mix] == [2, 3, 4]
    assert not any(p.requires_grad for s in bank.sides[:2] for p in s.parameters())


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_exempt_parameters_move_as_without_decay(optimizer):
    values = []
    for decay, exempt in ((0.0, False), (0.3, True), (0.3, False)):
        gate, weight = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        steps = optimizer([gate, weight], lr=0.1, weight_decay=decay)
        handles = exempt_from_decay([gate], steps) if exempt else []
        for _ in range(3):
            gate.grad, weight.grad = torch.ones(1), torch.ones(1)
            steps.step()
        for handle in handles:
            handle.remove()
        values.append((gate.item(), weight.item()))
    assert values[0][0] == pytest.approx(values[1][0], abs=1e-6)
    assert values[1][1] == pytest.approx(values[2][1])
    assert abs(values[2][1] - values[0][1]) > 1e-3 or optimizer is torch.optim.Adam
    assert exempt_from_decay([gate], torch.optim.SGD([gate], lr=1.0)) == []


def test_first_session_trains_once():
    module = PlainModule(tiny_vit(depth=4))
    states = []

    class Keep(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            states.append({n: p.detach().clone() for n, p in pl_module.plugins["side"].named_parameters()})

    start = started(METHODS["lst"](regime="first_session"))
    train(module, METHODS["lst"](regime="first_session"), callbacks=[Keep()])
    assert all(torch.equal(states[0][n], states[2][n]) for n in states[0])
    assert any(not torch.equal(states[0][n], p) for n, p in start.plugins["side"].named_parameters())


@pytest.mark.parametrize("name", ["lean-hst", "hst"])
def test_batch_statistics_follow_the_regime(name):
    for regime, moves in (("shared", False), ("per_task", True)):
        module = PlainModule(tiny_vit(depth=4))
        means = []

        class Keep(pl.Callback):
            def __init__(self, means) -> None:
                self.means = means

            def on_fit_end(self, trainer, pl_module):
                bank = pl_module.plugins["side"]
                self.means.append([s.batch_norm.running_mean.clone() for s in bank.sides])

        train(module, ALL_METHODS[name](regime=regime), callbacks=[Keep(means)])
        assert all(torch.equal(means[0][0], later[0]) for later in means[1:])  # those of the first task stay
        assert len(means[2]) == (3 if moves else 1)
        assert not torch.equal(means[0][0], torch.zeros(16))


@pytest.mark.parametrize("routing", ["prototype", "logits", "posterior", "both"])
@pytest.mark.parametrize("regime", ["per_task", "per_task_dense"])
def test_routing_against_a_written_out_version(routing, regime):
    module = PlainModule(tiny_vit(depth=4))
    train(module, METHODS["lst"](regime=regime, routing=routing, seed=3))
    bank, head = module.plugins["side"], module.model.head
    x = images(7)
    with torch.no_grad():
        got = module.eval()(x)
        bank.bypass = True
        record_base = []
        handle = head.register_forward_pre_hook(lambda _, args: record_base.append(args[0]))
        module(x)
        record, base = bank.taps.take(), record_base[0]
        handle.remove()
        bank.bypass = False
        features = bank.features(record, base, 2)
        if regime == "per_task":
            torch.testing.assert_close(features[1], bank.side(1)(record, base))
        else:
            raw = [bank.side(i)(record, base) for i in range(3)]
            w = bank.mix[2].softmax(0)
            torch.testing.assert_close(features[2], w[0] * base + w[1] * raw[0] + w[2] * raw[1] + w[3] * raw[2])
        rows = torch.cat(
            [
                F.linear(f, head.weight[[2 * t, 2 * t + 1]], head.bias[[2 * t, 2 * t + 1]])
                for t, f in enumerate(features)
            ],
            1,
        )
        rows = rows / bank.temperature
        p_task = bank.router.log_probabilities(base, bank.owner, 3).exp()
        if routing == "logits":
            torch.testing.assert_close(got, rows)
        elif routing == "prototype":
            chosen = p_task.argmax(1)
            mask = torch.arange(6)[None] // 2 == chosen[:, None]
            torch.testing.assert_close(got, rows.masked_fill(~mask, HIDDEN_LOGIT), rtol=1e-4, atol=1e-5)
        else:
            inside = rows.unflatten(1, (3, 2)).softmax(2) * p_task[:, :, None]
            joint = rows.softmax(1) if routing == "both" else 0.0
            torch.testing.assert_close(got, (joint + inside.flatten(1)).log(), rtol=1e-4, atol=1e-4)


def noisy_stream(signal=0.35):
    """Three tasks that class means confuse here and there."""

    def data(n, seed):
        g = torch.Generator().manual_seed(seed)
        patterns = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(99))
        labels = torch.arange(6).repeat_interleave(n)
        return TensorDataset(signal * patterns[labels] + torch.randn(len(labels), 3, 8, 8, generator=g), labels)

    return ClassIncremental(data(30, 0), test=data(30, 1), n_tasks=3, batch_size=8, eval_batch_size=7)


@pytest.mark.parametrize(("name", "cache"), [("side-tuning", False), ("side-tuning", True), ("hst", False)])
def test_one_task_that_answers_alone_counts_the_known_task_by_its_own_side_network(name, cache):
    stream, module = noisy_stream(), PlainModule(tiny_vit(depth=4))
    callbacks = [CacheFeatures(progress=False)] if cache else []
    result = train(module, ALL_METHODS[name](regime="per_task", routing="prototype"), stream, callbacks=callbacks)
    bank, row = module.plugins["side"].eval(), result.rows[-1]
    pooled = evaluate_pooled(module, stream, PooledLoader({t: stream.test_loader(t) for t in range(3)}), range(3), 2)
    for task in stream.tasks:
        free, known, own = [], [], torch.tensor(task.classes)
        with torch.no_grad():
            for x, y in stream.test_loader(task.index):
                bank.known_task = None
                logits = module.eval()(x)
                assert (logits == HIDDEN_LOGIT).sum(1).eq(4).all()  # the answer itself stays as it was
                free.append(logits.argmax(1) == y)
                bank.known_task = task.index
                known.append(own[module(x)[:, own].argmax(1)] == y)
        bank.known_task = None
        free, known = torch.cat(free).sum().item(), torch.cat(known).sum().item()
        assert free < known
        assert (row.correct[task.index], row.correct_in_task[task.index]) == (free, known)
        assert (pooled.correct[task.index], pooled.correct_in_task[task.index]) == (free, known)


class _Validated(PlainModule):
    """Keeps the accuracy of each validation epoch, and the task it is of."""

    def __init__(self, model):
        super().__init__(model)
        self.seen, self.hits = [], []

    def validation_step(self, batch, batch_idx):
        self.hits += (self(batch[0]).argmax(1) == batch[1]).tolist()

    def on_validation_epoch_end(self):
        if not self.trainer.sanity_checking:
            self.seen.append((self.trainer.datamodule.task, sum(self.hits) / len(self.hits)))
        self.hits = []


@pytest.mark.parametrize("routing", ["prototype", "posterior", "both"])
@pytest.mark.parametrize("cache", [False, True])
def test_the_task_under_way_can_be_chosen(routing, cache):
    module, inside = _Validated(tiny_vit(depth=4)), ContinualEvaluation(every_n_steps=2)
    callbacks = [inside, CacheFeatures(progress=False)] if cache else [inside]
    stream = tiny_stream(validation_fraction=0.25)
    method = METHODS["side-tuning"](regime="per_task", routing=routing)
    result = train(module, method, stream, callbacks=callbacks, max_epochs=3)
    assert len(module.seen) == 9
    assert all(accuracy > 0.8 for _, accuracy in module.seen[2::3])
    last = {row.task: row for row in inside.rows if not row.end}
    assert [last[t].correct[t] for t in range(3)] == [result.rows[t].correct[t] for t in range(3)]


@pytest.mark.parametrize("routing", ["prototype", "both"])
def test_a_router_that_was_prepared_is_finished_in_fewer_passes(routing):
    class Counted(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            return super().__iter__()

    states = []
    for prepared in (False, True):
        module, method = tiny_vit(depth=4), METHODS["lst"](regime="per_task", routing=routing)
        method.install(module)
        for k in range(2):
            method.start_task(module, Task(k, (2 * k, 2 * k + 1)))
            loader = Counted([(images(6, seed=k), torch.tensor([2 * k, 2 * k + 1] * 3))])
            for _ in range(2 * prepared):
                method.prepare_router(module, loader)
            assert loader.passes == prepared
            with torch.no_grad():
                module.plugins["side"].active.up.weight.add_(0.1)  # what trains is not in the class means
            method.fit_router(module, loader)
            assert loader.passes == (1 if routing == "prototype" else 2)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_calibration_softens_and_never_sharpens():
    bank = started(METHODS["lst"](regime="per_task"), tasks=1).plugins["side"]
    columns = (bank.owner == 0).nonzero()[:, 0]
    labels = columns.repeat(50)
    right = torch.full((len(labels), len(bank.owner)), -5.0)
    right[torch.arange(len(labels)), labels] = 1.0  # fitted to the last sample: more certainty always costs less
    bank.calibrate(right, labels)
    assert bank.temperature[columns].tolist() == [1.0] * len(columns)
    wrong = right.clone()
    wrong[::4] = right[::4].roll(1, 1)  # a quarter is certain and wrong
    wrong[::4, columns] = right[::4][:, columns.flip(0)]
    bank.calibrate(wrong, labels)
    assert (bank.temperature[columns] > 2).all()


def test_tasks_that_share_classes_are_refused_before_the_first():
    stream = build_scenario("domain-glyphs", n_classes=2, train_images=2, test_images=1)
    module = PlainModule(tiny_vit(depth=4))
    with pytest.raises(ValueError, match=r"must have tasks with classes of their own, got classes \[0, 1\] in several"):
        METHODS["lst"](regime="per_task").on_stream_start(None, module, stream)
    METHODS["lst"](regime="shared").on_stream_start(None, module, stream)


def test_routing_needs_a_fitted_router():
    module = started(METHODS["lst"](regime="per_task"), tasks=2).eval()
    with pytest.raises(RuntimeError, match="the router must be fitted"):
        module(images())
    with pytest.raises(ValueError, match="classes of their own, got classes \\[0\\] twice"):
        METHODS["lst"](regime="per_task").start_task(module, Task(2, (0, 4)))


def test_warm_start_continues_from_the_side_network_before():
    warm, cold = (started(METHODS["lst"](regime="per_task", warm_start=w), tasks=1) for w in (True, False))
    for module, w in ((warm, True), (cold, False)):
        side = module.plugins["side"].active
        with torch.no_grad():
            side.up.weight.fill_(7.0)
        METHODS["lst"](regime="per_task", warm_start=w).start_task(module, Task(1, (2, 3)))
    assert (warm.plugins["side"].active.up.weight == 7.0).all()
    assert not (cold.plugins["side"].active.up.weight == 7.0).any()


def test_closed_form_classifier_on_the_feature_of_the_first_session():
    module = PlainModule(tiny_vit(depth=4))
    result = train(module, METHODS["lst"](regime="first_session"), callbacks=[NearestMean()])
    assert result.average_accuracy > 0.5
    assert (module.plugins["nearest_mean"].count > 0).all()


def test_fisher_start_differs_from_magnitude_and_needs_the_stream():
    weights = {}
    for init in ("magnitude", "fisher", "random"):
        method, module = METHODS["lst"](init=init, fisher_samples=8), PlainModule(tiny_vit(depth=4))
        stream = tiny_stream()
        started(method, module)
        method.initialize(module, stream.train_loader_for_features(0))
        weights[init] = module.plugins["side"].active.blocks["1"].mlp.fc1.weight.detach()
        assert module.plugins["taps"].frozen
        assert not module.plugins["side"].bypass
    assert not torch.equal(weights["magnitude"], weights["fisher"])
    assert not torch.equal(weights["magnitude"], weights["random"])


class DictModule(PlainModule):
    def forward(self, batch):
        return self.model(batch["image"])


def test_fisher_start_is_the_same_in_all_regimes_and_for_dict_batches():
    def ladder(regime, module, as_dict=False):
        batches = tiny_stream().train_loader_for_features(0)
        if as_dict:
            batches = [{"image": x, "label": y, "names": ["a"] * len(y), "scale": 2} for x, y in batches]
        method = METHODS["lst"](init="fisher", fisher_samples=11, regime=regime)
        started(method, module)
        final = module.plugins["taps"].needs_final
        method.initialize(module, batches)
        assert module.plugins["taps"].needs_final is final
        return method, module.plugins["side"].active.state_dict()

    _, expected = ladder("per_task", PlainModule(tiny_vit(depth=4)))
    for regime in ("shared", "first_session", "per_task_dense"):
        torch.testing.assert_close(ladder(regime, PlainModule(tiny_vit(depth=4)))[1], expected, rtol=0, atol=0)
    torch.testing.assert_close(ladder("shared", DictModule(tiny_vit(depth=4)), True)[1], expected, rtol=0, atol=0)


def test_fisher_start_is_refused_where_the_loss_does_not_depend_on_the_backbone():
    module = PlainModule(tiny_vit(depth=4))
    nn.init.zeros_(module.model.head.weight)
    with pytest.raises(RuntimeError, match=r"`init='fisher'` must find a loss .* init='magnitude'"):
        train(module, METHODS["lst"](init="fisher", fisher_samples=4))


@pytest.mark.parametrize(
    ("method", "warns"),
    [
        (lambda: METHODS["lst"](init="fisher"), True),
        (lambda: SideTuning(width=4), True),
        (METHODS["lst"], False),
        (lambda: SideTuning(width=4, distill_epochs=0), False),
    ],
)
def test_first_weights_from_data_are_missed_aloud_where_there_is_no_stream(method, warns):
    trainer = quiet_trainer(callbacks=[method()], max_epochs=1, limit_train_batches=1, limit_val_batches=0)
    stream = tiny_stream()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(PlainModule(tiny_vit(depth=4)), datamodule=stream)
    told = [w for w in caught if "train with fit_stream" in str(w.message)]
    assert len(told) == warns


def test_distillation_brings_the_side_network_to_the_backbone():
    def distance(epochs):
        method, module = SideTuning(width=8, distill_epochs=epochs, distill_lr=1e-2), PlainModule(tiny_vit(depth=4))
        stream = tiny_stream()
        started(method, module)
        method.initialize(module, stream.train_loader_for_features(0))
        bank = module.plugins["side"]
        x = torch.cat([x for x, _ in stream.train_loader_for_features(0)])
        with torch.no_grad():
            bank.bypass = True
            base = module.model.forward_head(module.model.forward_features(x), pre_logits=True)
            return float(bank.active.distillation_loss(bank.taps.take(), base))

    assert distance(20) < 0.5 * distance(0)


@pytest.mark.parametrize("training", [False, True])
def test_what_tells_tasks_apart_reads_the_backbone_without_the_norms_of_a_side_network(training):
    plain, x = tiny_vit(depth=4).eval(), images()
    module = started(HierarchicalSideTuning(**PYRAMID, regime="per_task"), tiny_vit(depth=4)).train(training)
    bank, seen = module.plugins["side"], []
    module.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for norm in bank.active.norms[0].values():
            norm["weight"].mul_(3)
        bank.bypass = True
        module(x)
        torch.testing.assert_close(seen[0], plain.forward_head(plain.forward_features(x), pre_logits=True))


def test_published_pyramid_trains_registers_and_norms_of_its_own():
    module = PlainModule(tiny_vit(depth=4))
    start = copy.deepcopy(module.model.state_dict())
    method = HierarchicalSideTuning(**PYRAMID)
    train(module, method)
    end = module.model.state_dict()
    assert {n for n in start if not torch.equal(start[n], end[n])} == {"head.weight", "head.bias"}
    side, fresh = (dict(m.plugins["side"].active.named_parameters()) for m in (module, started(ALL_METHODS["hst"]())))
    norms = {f"norms.{i}.norm{k}.{p}" for i in range(4) for k in (1, 2) for p in ("weight", "bias")}
    inside = norms | {f"registers.{i}" for i in range(4)}
    assert inside <= side.keys()
    assert all(not torch.equal(side[n], fresh[n]) for n in inside)
    assert all(torch.equal(fresh[n], start["blocks." + n.removeprefix("norms.")]) for n in norms)


def test_published_pyramid_freezes_after_the_first_session():
    module = PlainModule(tiny_vit(depth=4))
    states = []

    class Keep(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            states.append(copy.deepcopy(pl_module.plugins["side"].active.state_dict()))

    train(module, HierarchicalSideTuning(**PYRAMID, regime="first_session"), callbacks=[Keep()])
    assert all(torch.equal(states[0][n], states[2][n]) for n in states[0])
    assert not torch.equal(states[0]["norms.0.norm1.weight"], torch.ones(16))


def _alone(side, vit, x):
    """The feature of one published pyramid on a copy of the backbone that has its norms for good."""
    vit, own = copy.deepcopy(vit), side.state_dict()
    values = {f"blocks.{n.removeprefix('norms.')}": v for n, v in own.items() if n.startswith("norms.")}
    vit.load_state_dict({**vit.state_dict(), **values})
    tokens, taps = vit.norm_pre(vit._pos_embed(vit.patch_embed(x))), {}
    for i, block in enumerate(vit.blocks):
        taps[i + 1] = block(torch.cat([own[f"registers.{i}"].expand(len(x), -1, -1), tokens], 1))
        tokens = taps[i + 1][:, 1:]
    return side(TapRecord(taps, x), x)


@pytest.mark.parametrize("routing", ["prototype", "logits", "both"])
@pytest.mark.parametrize("regime", ["per_task", "per_task_dense"])
def test_each_published_pyramid_has_a_backbone_with_its_own_norms(routing, regime):
    module = PlainModule(tiny_vit(depth=4), lr=0.05)
    train(module, HierarchicalSideTuning(**PYRAMID, regime=regime, routing=routing))
    bank, head, x = module.plugins["side"].eval(), module.model.head, images(9)
    plain = tiny_vit(depth=4).eval()
    with torch.no_grad():
        got = module.eval()(x)
        base = plain.forward_head(plain.forward_features(x), pre_logits=True)
        features = [_alone(bank.side(t), plain, x) for t in range(3)]
        assert not torch.allclose(features[0], features[1], atol=1e-2)
        if regime == "per_task_dense":
            weights = [m.softmax(0) for m in bank.mix]
            features = [
                sum(w * f for w, f in zip(weights[t], [base, *features[: t + 1]], strict=True)) for t in range(3)
            ]
        rows = [F.linear(f, head.weight, head.bias)[:, 2 * t : 2 * t + 2] for t, f in enumerate(features)]
        rows = torch.cat(rows, 1) / bank.temperature
        p_task = bank.router.log_probabilities(base, bank.owner, 3).exp()  # of the backbone as it was pretrained
        if routing == "logits":
            expected = rows
        elif routing == "prototype":
            mask = torch.arange(6)[None] // 2 == p_task.argmax(1)[:, None]
            expected = rows.masked_fill(~mask, HIDDEN_LOGIT)
        else:
            inside = rows.unflatten(1, (3, 2)).softmax(2) * p_task[:, :, None]
            expected = (rows.softmax(1) + inside.flatten(1)).log()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        bank.known_task = 1
        own = F.linear(features[1], head.weight, head.bias)
        torch.testing.assert_close(module(x)[:, 2:4], own[:, 2:4], rtol=1e-4, atol=1e-4)
    loss = F.cross_entropy(module.train()(x), torch.tensor([4, 5, 4] * 3))
    loss.backward()
    trained = {n.split(".")[3] for n, p in module.named_parameters() if p.grad is not None and "sides." in n}
    assert trained == {"2"}  # the newest alone
    assert bank.side(2).norms[0]["norm1"]["weight"].grad.abs().sum() > 0
    assert all(p.grad is None for n, p in module.model.named_parameters() if not n.startswith("head."))
