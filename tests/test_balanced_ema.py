"""BalancedEMA in a Trainer: when it reads, what it averages, swapping, checkpoints, and plain loops."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from cl_plugins import Task, fit_stream
from cl_plugins.callbacks import BalancedEMA, MaskedHead
from cl_plugins.ema_rules import make_rule
from cl_plugins.module_average import ParameterFilter
from tests._helpers import PlainModule, quiet_trainer, tiny_stream


def _data(n: int = 32, seed: int = 0, batch_size: int = 4) -> DataLoader:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g)
    return DataLoader(TensorDataset(x, x[:, :2].sin()), batch_size=batch_size)


class Regression(pl.LightningModule):
    def __init__(self, lr: float = 0.05, late_layer: bool = False, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        self.lr, self.late_layer = lr, late_layer
        self.seen: dict[str, list[torch.Tensor]] = {"validation": [], "test": [], "steps": []}

    def setup(self, stage):
        if self.late_layer and not hasattr(self, "late"):
            self.late = nn.Linear(2, 2)

    def forward(self, x):
        y = self.net(x)
        return self.late(y) if self.late_layer else y

    def training_step(self, batch, batch_idx):
        return mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.seen["validation"].append(self.net[0].weight.detach().clone())

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(self.net[0].weight.detach().clone())

    def on_train_batch_end(self, *args):
        self.seen["steps"].append(self.net[0].weight.detach().clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def _weights(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def _equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


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
        module, _data()
    )
    expected = 0.75 * start + 0.25 * module.seen["steps"][0]
    torch.testing.assert_close(module.net[0].weight.detach(), expected)


def test_training_itself_is_unchanged():
    plain, averaged = Regression(), Regression()
    quiet_trainer().fit(plain, _data())
    quiet_trainer(callbacks=[BalancedEMA()]).fit(averaged, _data())
    assert _equal(plain.seen["steps"], averaged.seen["steps"])
    assert not torch.equal(plain.net[0].weight, averaged.net[0].weight)


@pytest.mark.parametrize(("accumulate", "updates"), [(1, 8), (3, 3), (8, 1)])
def test_one_update_per_accumulation_window(accumulate, updates):
    ema = BalancedEMA(finalize=False)
    trainer = quiet_trainer(callbacks=[ema], max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(Regression(), _data())
    assert ema.average.averager.steps == [updates] * 4
    assert trainer.global_step == updates


@pytest.mark.parametrize("clip", [None, 0.01])
def test_gradients_are_read_after_clipping(clip):
    ema, spy = BalancedEMA(finalize=False), Spy()
    quiet_trainer(callbacks=[ema, spy], max_epochs=1, gradient_clip_val=clip).fit(Regression(), _data())
    norm = torch.cat([g.flatten() for g in ema.average.averager.previous]).norm()
    assert _equal(ema.average.averager.previous, spy.grads[-1])
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

    ema = BalancedEMA(finalize=False)
    quiet_trainer(callbacks=[ema], max_epochs=1).fit(Manual(), _data())
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
    ema = BalancedEMA(finalize=False)
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
    ema = BalancedEMA(finalize=False)
    ema.watch(net, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = net(torch.eye(4)).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert ema.average.averager.steps == [1, 1]


def test_bfloat16_weights_keep_float32_averages():
    ema = BalancedEMA(finalize=False)
    trainer = quiet_trainer(callbacks=[ema], max_epochs=1, precision="bf16-true")
    module = Regression()
    trainer.fit(module, _data())
    assert module.net[0].weight.dtype == torch.bfloat16
    assert {t.dtype for t in [*ema.average.averager.averages, *ema.average.averager.previous]} == {torch.float32}


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
    ema = BalancedEMA(finalize=False)
    quiet_trainer(callbacks=[ema]).fit(module, _data())
    assert ema.average.averager.names == ["net.2.weight", "net.2.bias"]
    assert ema.average.averager.state_bytes() == 2 * 4 * (16 + 2)
    assert torch.equal(module.net[0].weight, before)


@pytest.mark.parametrize("late_layer", [False, True])
def test_parameters_made_in_setup_are_averaged(late_layer):
    """Lightning's averaging copies the module before its setup and misses these."""
    ema = BalancedEMA(finalize=False)
    quiet_trainer(callbacks=[ema], max_epochs=1).fit(Regression(late_layer=late_layer), _data())
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
    quiet_trainer(callbacks=[ema, Unfreeze()], limit_train_batches=1).fit(module, _data())
    average = dict(zip(ema.average.averager.names, ema.average.averager.averages, strict=True))
    assert ema.average.averager.steps == [2, 2, 1, 1]
    torch.testing.assert_close(average["net.0.weight"], (start + module.net[0].weight.detach()) / 2)


def test_new_parameters_at_a_task_boundary_join():
    module, ema = Regression(), BalancedEMA("fixed", decay=0.5)
    quiet_trainer(callbacks=[ema], max_epochs=1).fit(module, _data())
    module.late_layer, module.late = True, nn.Linear(2, 2)
    ema.finalize = False
    quiet_trainer(callbacks=[ema], max_epochs=1).fit(module, _data())
    assert ema.average.averager.names[-2:] == ["late.weight", "late.bias"]


# swapping


def test_validation_sees_the_average_and_training_continues_from_the_weights():
    plain, module = Regression(), Regression()
    quiet_trainer().fit(plain, _data())
    ema = BalancedEMA("fixed", decay=0.5, finalize=False)
    quiet_trainer(callbacks=[ema]).fit(module, _data(), _data(4))
    assert _equal(plain.seen["steps"], module.seen["steps"])
    assert torch.equal(module.seen["validation"][-1], ema.average.averager.averages[0])
    assert not torch.equal(module.seen["validation"][-1], module.seen["steps"][-1])
    assert torch.equal(module.net[0].weight, module.seen["steps"][-1])


def test_validation_can_see_the_weights():
    module = Regression()
    quiet_trainer(callbacks=[BalancedEMA(evaluate="weights")]).fit(module, _data(), _data(4))
    assert torch.equal(module.seen["validation"][-1], module.seen["steps"][-1])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_validation_leaves_the_weights(error):
    class Broken(Regression):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if not self.trainer.sanity_checking:
                raise error("broken")

    module, ema = Broken(), BalancedEMA()
    with pytest.raises((error, SystemExit)):
        quiet_trainer(callbacks=[ema]).fit(module, _data(), _data(4))
    assert torch.equal(module.net[0].weight, module.seen["steps"][-1])
    assert not torch.equal(module.seen["validation"][-1], module.seen["steps"][-1])
    assert not ema.average.attached


def test_averaged_context_restores_after_an_exception():
    module, ema = Regression(), BalancedEMA(finalize=False)
    quiet_trainer(callbacks=[ema]).fit(module, _data())
    raw = _weights(module)
    with pytest.raises(ZeroDivisionError), ema.averaged(module):
        assert _equal(_weights(module), ema.average.averager.averages)
        with pytest.raises(RuntimeError, match="in place already"), ema.averaged(module):
            pass
        raise ZeroDivisionError
    assert _equal(_weights(module), raw)
    exported = ema.averaged_state_dict(module)
    assert list(exported) == list(module.state_dict())
    assert torch.equal(exported["net.0.weight"], ema.average.averager.averages[0])
    assert _equal(_weights(module), raw)


def test_averaged_needs_an_average():
    with (
        pytest.raises(RuntimeError, match="there is no average beside the weights"),
        BalancedEMA().averaged(Regression()),
    ):
        pass


def test_export_of_averaged_parameters_alone():
    module, ema = Regression(), BalancedEMA()
    module.net[0].requires_grad_(False)
    quiet_trainer(callbacks=[ema]).fit(module, _data())
    assert list(ema.averaged_state_dict(module, only_averaged=True)) == ["net.2.weight", "net.2.bias"]


# several Trainers, and evaluation from checkpoints


def test_one_callback_in_three_trainers():
    """Lightning's averaging stops updating in the second Trainer and then throws the second training away."""
    module, ema = Regression(), BalancedEMA()
    for seed in range(3):
        before = _weights(module)
        quiet_trainer(callbacks=[ema], max_epochs=1).fit(module, _data(seed=seed))
        assert not _equal(before, _weights(module))
    fresh = Regression()
    for seed in range(3):
        quiet_trainer(callbacks=[BalancedEMA()], max_epochs=1).fit(fresh, _data(seed=seed))
    assert _equal(_weights(fresh), _weights(module))


def _fit_with_checkpoint(folder: Path, **options) -> tuple[Regression, BalancedEMA, pl.Trainer, Path]:
    module, ema = Regression(), BalancedEMA(**options)
    keeper = ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    trainer = quiet_trainer(callbacks=[ema, keeper], enable_checkpointing=True)
    trainer.fit(module, _data())
    return module, ema, trainer, folder / "step=5.ckpt"


def test_testing_a_checkpoint_gives_the_average_in_every_process(tmp_path):
    """Lightning's averaging tests raw weights after a fit, and averaged ones in a new process."""
    module, ema, trainer, path = _fit_with_checkpoint(tmp_path)
    trainer.test(module, _data(4), ckpt_path=path, verbose=False)
    fresh = Regression()
    quiet_trainer(callbacks=[BalancedEMA()]).test(fresh, _data(4), ckpt_path=path, verbose=False)
    saved = torch.load(path, weights_only=True)
    average = saved["callbacks"]["BalancedEMA"]["average"]["averages"][0]
    assert torch.equal(module.seen["test"][-1], average)
    assert torch.equal(fresh.seen["test"][-1], average)
    assert not torch.equal(saved["state_dict"]["net.0.weight"], average)
    assert torch.equal(fresh.net[0].weight, saved["state_dict"]["net.0.weight"])
    assert torch.equal(saved["state_dict"]["net.0.weight"], module.seen["steps"][4])


def test_standalone_validation_uses_the_weights_it_is_given():
    """Lightning's averaging puts a stale average into whatever module is validated."""
    module, ema = Regression(), BalancedEMA()
    trainer = quiet_trainer(callbacks=[ema])
    trainer.fit(module, _data())
    with torch.no_grad():
        module.net[0].weight.fill_(7.0)
    trainer.validate(module, _data(4), verbose=False)
    assert module.seen["validation"][-1].unique().tolist() == [7.0]
    trainer.test(module, _data(4), verbose=False)
    assert module.seen["test"][-1].unique().tolist() == [7.0]


def test_a_checkpoint_average_can_be_loaded_without_a_trainer(tmp_path):
    from cl_plugins.callbacks.balanced_ema import load_average

    _, _, _, path = _fit_with_checkpoint(tmp_path)
    saved = torch.load(path, weights_only=True)
    module = Regression()
    module.load_state_dict(saved["state_dict"])
    load_average(saved, module)
    assert _equal(_weights(module), saved["callbacks"]["BalancedEMA"]["average"]["averages"])
    with pytest.raises(ValueError, match="must be one of a Trainer with BalancedEMA"):
        load_average({"callbacks": {}}, module)
    with pytest.raises(RuntimeError, match=r"4 parameters that the module lacks, such as 'net.0.weight'"):
        load_average(saved, nn.Linear(2, 2))


@pytest.mark.parametrize("rule", ["released", "eq45", "fixed"])
@pytest.mark.parametrize("step", [5, 10, 15])
def test_resume_is_bitwise(tmp_path, rule, step):
    """Inside an epoch of 8 batches, and across its end."""
    whole, _, _, _ = _fit_with_checkpoint(tmp_path, rule=rule)
    resumed, ema = Regression(seed=1), BalancedEMA(rule)
    trainer = quiet_trainer(callbacks=[ema], enable_checkpointing=False)
    trainer.fit(resumed, _data(), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert trainer.global_step == 16
    assert _equal(_weights(whole), _weights(resumed))


def test_resume_of_a_finished_fit_still_ends_in_the_average(tmp_path):
    whole, ema, _, _ = _fit_with_checkpoint(tmp_path)
    keeper = ModelCheckpoint(tmp_path / "end", save_last=True)
    module, ema = Regression(), BalancedEMA()
    quiet_trainer(callbacks=[ema, keeper], enable_checkpointing=True).fit(module, _data())
    raw = module.seen["steps"][-1]
    resumed = Regression(seed=1)
    quiet_trainer(callbacks=[BalancedEMA()]).fit(resumed, _data(), ckpt_path=tmp_path / "end" / "last.ckpt")
    assert _equal(_weights(resumed), _weights(whole))
    assert not torch.equal(resumed.net[0].weight, raw)


def test_resume_refuses_a_module_without_the_parameters(tmp_path):
    _, _, _, path = _fit_with_checkpoint(tmp_path)
    state = torch.load(path, weights_only=True)["callbacks"]["BalancedEMA"]
    ema, module = BalancedEMA(), nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="build the module as it was"):
        ema.average.begin(module, state["average"])


def test_callback_survives_a_deepcopy_during_training():
    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            copy.deepcopy(trainer.callbacks[0].state_dict())

    quiet_trainer(callbacks=[BalancedEMA(), Copies()], max_epochs=1).fit(Regression(), _data())


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
    callbacks = [MaskedHead(), BalancedEMA()][:: 1 - 2 * order]
    module, stream = PlainModule(weight_decay=0.1), tiny_stream()
    rows: list[torch.Tensor] = []

    class Look(BalancedEMA):
        def on_row(self, trainer, pl_module, row):
            rows.append(pl_module.model.head.weight.detach()[:2].clone())

    fit_stream(quiet_trainer(callbacks=[*callbacks, Look(include="nothing else|model.norm", tag="look", exclude=".")][:2]
                             + [_Rows(rows)]), module, stream)  # fmt: skip
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
    ema = BalancedEMA()
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
    net, ema = nn.Linear(3, 1), BalancedEMA()
    for index in range(2):
        task = Task(index, (index,))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
        ema.start_task(net, task)
        ema.watch(net, optimizer)
        start = _weights(net)
        for _ in range(5):
            optimizer.zero_grad()
            net(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
        raw = _weights(net)
        ema.end_task(net, task)
        assert not _equal(raw, _weights(net))
        assert not _equal(start, _weights(net))
    assert [e["task"] for e in ema.report_events(net)] == [0, 1]


# refusals


def test_nothing_to_average_is_refused():
    module = Regression()
    before = _weights(module)
    with pytest.raises(RuntimeError, match="no trainable parameter to average"):
        quiet_trainer(callbacks=[BalancedEMA(include="no such name")]).fit(module, _data())
    assert _equal(before, _weights(module))


def test_optimizer_without_the_parameters_is_refused():
    net = nn.Linear(2, 2)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match="no optimizer holds any of the 2 parameters"):
        BalancedEMA().watch(net, other)


def test_hidden_gradients_are_refused():
    class Hiding(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = None

    net = nn.Linear(2, 2)
    before, optimizer = _weights(net), Hiding(net.parameters(), lr=0.1)
    BalancedEMA().watch(net, optimizer)
    net(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="`Hiding` made a step although none of its 2 averaged parameters"):
        optimizer.step()
    assert _equal(before, _weights(net))


@pytest.mark.parametrize(
    ("strategy", "text"),
    [
        ("ddp_spawn", "must not spawn processes"),
        ("fsdp", "must leave whole gradients on each process, got FSDPStrategy"),
    ],
)
def test_strategies_without_whole_gradients_are_refused(strategy, text):
    if strategy == "fsdp":
        trainer = quiet_trainer()
        trainer.strategy.__class__ = type("FSDPStrategy", (type(trainer.strategy),), {})
    else:
        trainer = quiet_trainer(strategy=strategy, devices=2)
    with pytest.raises(RuntimeError, match=text):
        BalancedEMA().on_fit_start(trainer, Regression())


def test_two_averages_need_tags_and_their_own_parameters():
    with pytest.raises(ValueError, match="`tag` must differ between the averages"):
        quiet_trainer(callbacks=[BalancedEMA(tag="a"), BalancedEMA(tag="a")]).fit(Regression(), _data())
    with pytest.raises(RuntimeError, match="must belong to one average, got two"):
        quiet_trainer(callbacks=[BalancedEMA(), BalancedEMA(tag="b")]).fit(Regression(), _data())
    module = Regression()
    pair = [BalancedEMA(include="net.0"), BalancedEMA("fixed", include="net.2", tag="b")]
    quiet_trainer(callbacks=pair).fit(module, _data())
    assert [c.state_key for c in pair] == ["BalancedEMA", "BalancedEMA[b]"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"rule": "relased"}, "did you mean 'released'"),
        ({"evaluate": "both"}, "`evaluate` must be 'average' or 'weights', got 'both'"),
        ({"active": "never"}, "`active` must be 'always', 'after_first' or a function"),
        ({"rule": make_rule(), "kappa": 1.0}, "holds its constants, got kappa beside it"),
        ({"granularity": "layer"}, "`granularity` must be"),
    ],
)
def test_bad_arguments_are_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        BalancedEMA(**arguments)


# two processes

DDP = """
import sys, torch
import pytorch_lightning as pl
from torch.utils.data import DataLoader, TensorDataset
from cl_plugins.callbacks import BalancedEMA
from tests.test_balanced_ema import Regression, _data

module, ema = Regression(), BalancedEMA(finalize=False)
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False,
                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.callbacks.append(ema)
trainer.fit(module, _data(batch_size=2))
torch.save([ema.average.averager.averages, ema.average.averager.previous], f"{sys.argv[1]}.{trainer.global_rank}")
"""


@pytest.mark.ddp
def test_processes_agree_without_communication(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    (tmp_path / "script.py").write_text(DDP)
    root = Path(__file__).parent.parent
    common = {**os.environ, "PYTHONPATH": str(root), "MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "out")]
    processes = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(r), "LOCAL_RANK": str(r), "NODE_RANK": "0", "OMP_NUM_THREADS": "1"},
            cwd=root,
            stderr=subprocess.PIPE,
        )
        for r in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-2000:]
    first, second = (torch.load(tmp_path / f"out.{r}", weights_only=True) for r in range(2))
    assert _equal(first[0], second[0])
    assert _equal(first[1], second[1])
    single, ema = Regression(), BalancedEMA(finalize=False)
    quiet_trainer(callbacks=[ema]).fit(single, _data(batch_size=4))
    assert len(first[0]) == len(ema.average.averager.averages)
