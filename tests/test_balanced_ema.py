"""BalancedEMA in a Trainer: when it reads, what it averages, streams, plain loops, refusals."""

from __future__ import annotations

import warnings

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning import strategies
from torch import nn
from torch.nn.functional import mse_loss

from cl_plugins import Task, fit_stream
from cl_plugins.callbacks import BalancedEMA, MaskedHead
from cl_plugins.ema_rules import make_rule
from cl_plugins.module_average import ParameterFilter
from cl_plugins.plugin import Row
from tests._helpers import PlainModule, quiet_trainer, tiny_stream
from tests._regression import Regression, all_equal, regression_data, weights_of


class Spy(pl.Callback):
    """Keeps gradients and weights at the moment a step has been made, through its own hook on the optimizer."""

    def __init__(self) -> None:
        self.grads: list[list[torch.Tensor]] = []

    def on_train_start(self, trainer, pl_module):
        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(
                lambda o, a, k: self.grads.append([p.grad.clone() for g in o.param_groups for p in g["params"]])
            )


# when it starts, and what it reads


def test_average_starts_before_the_first_step_and_ends_in_the_module():
    module = Regression()
    start = module.net[0].weight.detach().clone()
    quiet_trainer(callbacks=[BalancedEMA("fixed", decay=0.75)], max_epochs=1, limit_train_batches=1).fit(
        module, regression_data()
    )
    expected = 0.75 * start + 0.25 * module.seen["steps"][0]
    torch.testing.assert_close(module.net[0].weight.detach(), expected)


def test_training_itself_is_unchanged():
    plain, averaged = Regression(), Regression()
    quiet_trainer().fit(plain, regression_data())
    quiet_trainer(callbacks=[BalancedEMA("released")]).fit(averaged, regression_data())
    assert all_equal(plain.seen["steps"], averaged.seen["steps"])
    assert not torch.equal(plain.net[0].weight, averaged.net[0].weight)


@pytest.mark.parametrize(("accumulate", "updates"), [(1, 8), (3, 3), (8, 1)])
def test_one_update_per_accumulation_window(accumulate, updates):
    ema = BalancedEMA("released", finalize=False)
    trainer = quiet_trainer(callbacks=[ema], max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(Regression(), regression_data())
    assert ema.average.averager.steps == [updates] * 4
    assert trainer.global_step == updates


@pytest.mark.parametrize("clip", [None, 0.01])
def test_gradients_are_read_after_clipping(clip):
    ema, spy = BalancedEMA("released", finalize=False), Spy()
    quiet_trainer(callbacks=[ema, spy], max_epochs=1, gradient_clip_val=clip).fit(Regression(), regression_data())
    norm = torch.cat([g.flatten() for g in ema.average.averager.previous]).norm()
    assert all_equal(ema.average.averager.previous, spy.grads[-1])
    assert (float(norm) <= 0.0101) == (clip is not None)


def test_manual_optimization_with_two_optimizers():
    class Manual(Regression):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            for optimizer in (first, second, second):
                optimizer.zero_grad()
                self.manual_backward(mse_loss(self(batch[0]), batch[1]))
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            return [torch.optim.SGD(self.net[0].parameters(), 0.1), torch.optim.Adam(self.net[2].parameters(), 0.01)]

    ema = BalancedEMA("released", finalize=False)
    quiet_trainer(callbacks=[ema], max_epochs=1).fit(Manual(), regression_data())
    assert dict(zip(ema.average.averager.names, ema.average.averager.steps, strict=True)) == {
        "net.0.weight": 8,
        "net.0.bias": 8,
        "net.2.weight": 16,
        "net.2.bias": 16,
    }
    assert all(float(g.abs().sum()) > 0 for g in ema.average.averager.previous)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_skipped_by_mixed_precision_do_not_count(fused):
    net = nn.Linear(4, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ema = BalancedEMA("released", finalize=False)
    ema.watch(net, optimizer)
    for factor in (1.0, float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(1, 4)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
    assert ema.average.averager.steps == [2, 2]
    assert ema.average.averager.previous[0].tolist() == [[1.0] * 4]  # unscaled


def test_closures_of_lbfgs_count_once():
    net = nn.Linear(4, 1)
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=5)
    ema = BalancedEMA("released", finalize=False)
    ema.watch(net, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.eye(4)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert ema.average.averager.steps == [1, 1]


def test_bfloat16_weights_keep_float32_averages():
    ema = BalancedEMA("released", finalize=False)
    trainer = quiet_trainer(callbacks=[ema], max_epochs=1, precision="bf16-true")
    module = Regression()
    trainer.fit(module, regression_data())
    assert module.net[0].weight.dtype == torch.bfloat16
    assert {t.dtype for t in [*ema.average.averager.averages, *ema.average.averager.previous]} == {torch.float32}


@pytest.mark.parametrize("epochs", [1, 5])
def test_horizon_does_not_depend_on_the_number_of_steps(epochs):
    class Fixed(Regression):
        """Ends where it is after the first step."""

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

        def on_train_start(self):
            with torch.no_grad():
                for p in self.parameters():
                    p.add_(1.0)

    module, start = Fixed(), Fixed().net[0].weight.detach().clone()
    trainer = quiet_trainer(callbacks=[BalancedEMA("horizon", keep=0.25)], max_epochs=epochs)
    trainer.fit(module, regression_data())
    torch.testing.assert_close(module.net[0].weight.detach(), start + 0.75, rtol=1e-5, atol=1e-5)


def test_horizon_needs_an_end():
    trainer = quiet_trainer(callbacks=[BalancedEMA("horizon")], max_epochs=-1)
    with pytest.raises(ValueError, match="set the Trainer's `max_epochs`"):
        trainer.fit(Regression(), regression_data())


# what it averages


def test_filters_choose_by_name_and_owner():
    module = Regression()
    module.plugins = nn.ModuleDict({"mora": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    module.net[0].requires_grad_(False)
    assert list(ParameterFilter(plugins=["mora"]).of(module)) == ["plugins.mora.weight", "plugins.mora.bias"]
    assert list(ParameterFilter(exclude="bias|plugins").of(module)) == ["net.2.weight"]
    assert list(ParameterFilter(include=r"net\.2").of(module)) == ["net.2.weight", "net.2.bias"]
    with pytest.raises(ValueError, match="`include` must be a regular expression, got '\\('"):
        ParameterFilter(include="(")
    with pytest.raises(TypeError, match="`plugins` must be a list of names, got 'mora'"):
        ParameterFilter(plugins="mora")


def test_frozen_parameters_are_neither_copied_nor_moved():
    module = Regression()
    module.net[0].requires_grad_(False)
    before = module.net[0].weight.detach().clone()
    ema = BalancedEMA("released", finalize=False)
    quiet_trainer(callbacks=[ema]).fit(module, regression_data())
    assert ema.average.averager.names == ["net.2.weight", "net.2.bias"]
    assert ema.average.averager.state_bytes() == 2 * 4 * (16 + 2)
    assert torch.equal(module.net[0].weight, before)


@pytest.mark.parametrize("late_layer", [False, True])
def test_parameters_made_in_setup_are_averaged(late_layer):
    """Lightning's averaging copies the module before its setup and misses these."""
    ema = BalancedEMA("released", finalize=False)
    quiet_trainer(callbacks=[ema], max_epochs=1).fit(Regression(late_layer=late_layer), regression_data())
    assert len(ema.average.averager.names) == (6 if late_layer else 4)


def test_parameters_that_start_training_later_join():
    class Unfreeze(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.net[0].requires_grad_(True)
                trainer.optimizers[0].add_param_group({"params": list(pl_module.net[0].parameters()), "lr": 0.01})

    class Head(Regression):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net[2].parameters(), lr=0.05)

    module, ema = Head(), BalancedEMA("fixed", decay=0.5, finalize=False)
    module.net[0].requires_grad_(False)
    start = module.net[0].weight.detach().clone()
    quiet_trainer(callbacks=[ema, Unfreeze()], limit_train_batches=1).fit(module, regression_data())
    average = dict(zip(ema.average.averager.names, ema.average.averager.averages, strict=True))
    assert ema.average.averager.steps == [2, 2, 1, 1]
    torch.testing.assert_close(average["net.0.weight"], (start + module.net[0].weight.detach()) / 2)


def test_new_parameters_at_a_task_boundary_join():
    module, ema = Regression(), BalancedEMA("fixed", decay=0.5)
    quiet_trainer(callbacks=[ema], max_epochs=1).fit(module, regression_data())
    module.late_layer, module.late = True, nn.Linear(2, 2)
    ema.finalize = False
    quiet_trainer(callbacks=[ema], max_epochs=1).fit(module, regression_data())
    assert ema.average.averager.names[-2:] == ["late.weight", "late.bias"]


# streams


def test_a_stream_is_evaluated_with_the_average():
    ema = BalancedEMA("fixed", decay=0.99, active="after_first")
    module, stream = PlainModule(), tiny_stream()
    at_row: list[torch.Tensor] = []

    class Look(MaskedHead):
        def on_row(self, trainer, pl_module, row):
            at_row.append(pl_module.model.head.weight.detach().clone())

    ended: list[torch.Tensor] = []

    class Raw(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            ended.append(pl_module.model.head.weight.detach().clone())

    result = fit_stream(quiet_trainer(callbacks=[Look(), ema, Raw()]), module, stream)
    assert result.correct.shape == (3, 3)
    assert torch.equal(at_row[0], ended[7])  # the first task is not averaged
    assert not torch.equal(at_row[1], ended[15])
    assert not ema.average.running


@pytest.mark.parametrize("order", [0, 1])
def test_rows_of_other_tasks_stay_bitwise_in_either_order(order):
    """The average of something that another plugin holds fixed, by a hook of its own, is that same something."""
    callbacks = [MaskedHead(), BalancedEMA("released")][:: 1 - 2 * order]
    module, stream = PlainModule(weight_decay=0.1), tiny_stream()
    rows: list[torch.Tensor] = []

    fit_stream(quiet_trainer(callbacks=[*callbacks, _Rows(rows)]), module, stream)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


class _Rows(MaskedHead):
    """Reads the first two rows of the head after each task."""

    def __init__(self, rows: list[torch.Tensor]) -> None:
        super().__init__()
        self.rows = rows

    def on_row(self, trainer, pl_module, row):
        self.rows.append(pl_module.model.head.weight.detach()[:2].clone())


def test_report_has_a_bounded_series_per_task():
    ema = BalancedEMA("released", active="always")
    module = PlainModule()
    fit_stream(quiet_trainer(callbacks=[MaskedHead(), ema]), module, tiny_stream())
    events = ema.report_events(module)
    assert [e["task"] for e in events] == [0, 1, 2]
    for event in events:
        assert event["name"] == "BalancedEMA/weight"
        assert len(event["step"]) == len(event["median"]) == 8
        assert all(a <= b <= c for a, b, c in zip(event["q25"], event["median"], event["q75"], strict=True))
        assert 0.0 <= event["fallback_share"] <= 1.0


def test_plain_loop_without_a_trainer():
    net, ema = nn.Linear(3, 1), BalancedEMA("released")
    for index in range(2):
        task = Task(index, (index,))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        ema.start_task(net, task)
        ema.watch(net, optimizer)
        start = weights_of(net)
        for _ in range(5):
            optimizer.zero_grad()
            net(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
        raw = weights_of(net)
        ema.end_task(net, task)
        assert not all_equal(raw, weights_of(net))
        assert not all_equal(start, weights_of(net))
    assert [e["task"] for e in ema.report_events(net)] == [0, 1]


def test_the_default_keeps_half_of_what_was_before_a_task_from_the_second_on():
    starts, ends, ema, module = [], [], BalancedEMA(finalize=False), PlainModule()

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            starts.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

        def on_train_batch_end(self, trainer, pl_module, *args):
            ends.append({n: p.detach().clone() for n, p in pl_module.named_parameters()})

    fit_stream(quiet_trainer(callbacks=[ema, Look()], max_epochs=1), module, tiny_stream(2))
    assert [e["task"] for e in ema.report_events(module)] == [1]
    steps = len(ends) // 2
    share = 0.5 ** (1 / steps)
    expected = starts[1]
    for weights in ends[steps:]:
        expected = {n: share * e + (1 - share) * weights[n] for n, e in expected.items()}
    for name, average in zip(ema.average.averager.names, ema.average.averager.averages, strict=True):
        torch.testing.assert_close(average, expected[name])


def test_a_task_that_the_average_does_not_learn_is_said():
    def run(keep):
        ema = BalancedEMA(keep=keep)
        return ema, fit_stream(quiet_trainer(callbacks=[ema], max_epochs=4), PlainModule(), tiny_stream(2))

    with pytest.warns(UserWarning, match=r"task 1 was learned to 0\.00 under the average and task 0 to 1\.00 without"):
        held, result = run(keep=0.999)
    assert result.accuracy_matrix.diagonal().tolist() == [1.0, 0.0]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, result = run(keep=0.01)
    assert result.accuracy_matrix[1, 1] > 0.5
    assert not any("under the average" in str(w.message) for w in told)

    resumed = BalancedEMA()
    resumed.on_stream_start(quiet_trainer(), PlainModule(), tiny_stream(2))
    resumed.load_state_dict(held.state_dict())
    row = Row(1, (5, 4), (10, 9), (5, 4), (), 0.0)  # 0.44 of the newest task, below half of 1.00
    with pytest.warns(UserWarning, match=r"learned to 0\.44 under the average and task 0 to 1\.00"):
        resumed.on_row(quiet_trainer(), PlainModule(), row)
    resumed.load_state_dict({k: v for k, v in held.state_dict().items() if k != "plainly"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.on_row(quiet_trainer(), PlainModule(), row)  # a checkpoint from before says nothing


def test_tasks_that_add_no_column_are_not_compared():
    stream = tiny_stream(2)
    stream.evaluation_tasks = (Task(0, (0, 1, 2, 3, 4, 5)),)  # one column, which the first task teaches
    stream.learned_after = lambda task: 1
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = fit_stream(quiet_trainer(callbacks=[BalancedEMA(keep=0.999)]), PlainModule(), stream)
    assert result.correct.shape == (2, 1)
    assert not any("under the average" in str(w.message) for w in told)


def test_a_loop_of_ones_own_must_say_how_long_it_is():
    net = nn.Linear(3, 1)
    with pytest.raises(ValueError, match=r"`steps` must be the number of steps .* give `steps` to `watch`"):
        BalancedEMA().watch(net, torch.optim.SGD(net.parameters(), 0.1))


# refusals


def test_nothing_to_average_is_refused():
    module = Regression()
    before = weights_of(module)
    with pytest.raises(RuntimeError, match="no trainable parameter to average"):
        quiet_trainer(callbacks=[BalancedEMA(include="no such name")]).fit(module, regression_data())
    assert all_equal(before, weights_of(module))


def test_optimizer_without_the_parameters_is_refused():
    net = nn.Linear(2, 2)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="no optimizer holds any of the 2 parameters"):
        BalancedEMA("released").watch(net, other)


def test_hidden_gradients_are_refused():
    class Hiding(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = None

    net = nn.Linear(2, 2)
    before, optimizer = weights_of(net), Hiding(net.parameters(), lr=0.1)
    BalancedEMA("released").watch(net, optimizer)
    net(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="`Hiding` made a step although none of its 2 averaged parameters"):
        optimizer.step()
    assert all_equal(before, weights_of(net))


@pytest.mark.parametrize("kind", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_sharding_strategies_are_refused(kind):
    """Lightning's own objects where they can be made on a CPU; a Trainer takes them with GPUs only."""
    trainer, module = quiet_trainer(), Regression()
    before = weights_of(module)
    if kind == "DeepSpeedStrategy":  # its constructor wants a package
        trainer.strategy.__class__ = type(kind, (type(trainer.strategy),), {})
    else:
        trainer._accelerator_connector.strategy = getattr(strategies, kind)()
    ema = BalancedEMA("released")
    with pytest.raises(RuntimeError, match=f"must leave whole gradients on each process, got {kind}"):
        ema.on_fit_start(trainer, module)
    assert not ema.average.running
    assert all_equal(before, weights_of(module))


def test_spawned_processes_are_refused():
    with pytest.raises(RuntimeError, match="must not spawn processes, got DDPStrategy with a spawn or fork launcher"):
        BalancedEMA("released").on_fit_start(quiet_trainer(strategy="ddp_spawn", devices=2), Regression())


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork"])
def test_a_stream_with_spawned_processes_is_refused_before_they_begin(strategy):
    module = PlainModule()
    before = weights_of(module)
    trainer = quiet_trainer(callbacks=[MaskedHead(), BalancedEMA("released")], strategy=strategy, devices=2)
    with pytest.raises(ValueError, match="`strategy` must not spawn processes"):
        fit_stream(trainer, module, tiny_stream())
    assert all_equal(before, weights_of(module))


def test_memory_beside_the_model_is_two_float32_copies():
    """All tensors that the callback can reach in the middle of a training, counted by their storage."""
    module, ema, bytes_ = Regression(), BalancedEMA("released"), []

    def reach(thing: object, found: dict[int, int], known: set[int]) -> None:
        if id(thing) in known:
            return
        known.add(id(thing))
        if isinstance(thing, nn.Parameter | nn.Module | torch.optim.Optimizer | pl.Trainer):
            return
        if isinstance(thing, torch.Tensor):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, dict):
            for value in thing.values():
                reach(value, found, known)
        elif isinstance(thing, list | tuple | set):
            for value in thing:
                reach(value, found, known)
        elif hasattr(thing, "__dict__"):
            reach(vars(thing), found, known)

    class Count(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            found: dict[int, int] = {}
            reach(ema, found, set())
            bytes_.append(sum(found.values()))

    quiet_trainer(callbacks=[ema, Count()], max_epochs=1).fit(module, regression_data())
    copies = 2 * 4 * sum(p.numel() for p in module.parameters())
    tensors = len(list(module.parameters()))
    assert len(bytes_) == 8
    assert all(copies <= b <= copies + 8 * 4 * tensors * (i + 1) for i, b in enumerate(bytes_))  # scalars and their log


def test_two_averages_need_tags_and_their_own_parameters():
    trainer = quiet_trainer(callbacks=[BalancedEMA(tag="a")])
    trainer.callbacks.append(BalancedEMA(tag="a"))  # Lightning itself looks at what its constructor gets
    with pytest.raises(ValueError, match="`tag` must differ between the averages of a Trainer, got 'a' twice"):
        trainer.fit(Regression(), regression_data())
    with pytest.raises(RuntimeError, match="must belong to one average, got two"):
        quiet_trainer(callbacks=[BalancedEMA("released"), BalancedEMA(tag="b")]).fit(Regression(), regression_data())
    module = Regression()
    pair = [BalancedEMA(include="net.0"), BalancedEMA("fixed", include="net.2", tag="b")]
    quiet_trainer(callbacks=pair).fit(module, regression_data())
    assert [c.state_key for c in pair] == ["BalancedEMA", "BalancedEMA[b]"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"rule": "relased"}, "did you mean 'released'"),
        ({"evaluate": "both"}, "`evaluate` must be 'average' or 'weights', got 'both'"),
        ({"active": "never"}, "`active` must be 'always', 'after_first', 'reused' or a function"),
        ({"rule": make_rule(), "kappa": 1.0}, "holds its constants, got kappa beside it"),
        ({"granularity": "layer"}, "`granularity` must be"),
        ({"kappa": 1.0}, "`kappa` must be left out for rule 'horizon', which reads keep"),
        ({"rule": "fixed", "keep": 0.5}, "`keep` must be left out for rule 'fixed', which reads decay"),
    ],
)
def test_bad_arguments_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        BalancedEMA(**arguments)
