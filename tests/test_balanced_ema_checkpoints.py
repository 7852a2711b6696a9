"""BalancedEMA beside evaluation and checkpoints, where Lightning's own averaging fails, and in two processes."""

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

from cl_plugins import fit_stream
from cl_plugins.callbacks import BalancedEMA, MaskedHead, TaskGroups
from tests._helpers import PlainModule, quiet_trainer, tiny_stream, tiny_vit
from tests._regression import Regression, all_equal, regression_data, weights_of

# swapping


def test_validation_sees_the_average_and_training_continues_from_theweights_of():
    plain, module = Regression(), Regression()
    quiet_trainer().fit(plain, regression_data())
    ema = BalancedEMA("fixed", decay=0.5, finalize=False)
    quiet_trainer(callbacks=[ema]).fit(module, regression_data(), regression_data(4))
    assert all_equal(plain.seen["steps"], module.seen["steps"])
    assert torch.equal(module.seen["validation"][-1], ema.average.averager.averages[0])
    assert not torch.equal(module.seen["validation"][-1], module.seen["steps"][-1])
    assert torch.equal(module.net[0].weight, module.seen["steps"][-1])


def test_validation_can_see_theweights_of():
    module = Regression()
    quiet_trainer(callbacks=[BalancedEMA(evaluate="weights")]).fit(module, regression_data(), regression_data(4))
    assert torch.equal(module.seen["validation"][-1], module.seen["steps"][-1])


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_validation_leaves_theweights_of(error):
    class Broken(Regression):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            if not self.trainer.sanity_checking:
                raise error("broken")

    module, ema = Broken(), BalancedEMA("released")
    with pytest.raises((error, SystemExit)):
        quiet_trainer(callbacks=[ema]).fit(module, regression_data(), regression_data(4))
    assert torch.equal(module.net[0].weight, module.seen["steps"][-1])
    assert not torch.equal(module.seen["validation"][-1], module.seen["steps"][-1])
    assert not ema.average.attached


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_an_exception_in_an_evaluation_from_a_checkpoint_leaves_its_weights(tmp_path, stage):
    """The checkpoint's average is in place when the step fails; its weights are there afterwards."""
    seen: list[torch.Tensor] = []

    class Broken(Regression):
        def fail(self, batch, batch_idx):
            seen.append(self.net[0].weight.detach().clone())
            raise ZeroDivisionError

        validation_step = test_step = predict_step = fail

    _, _, _, path = _fit_with_checkpoint(tmp_path)
    saved = torch.load(path, weights_only=True)
    module, ema = Broken(), BalancedEMA("released")
    with pytest.raises(ZeroDivisionError):
        getattr(quiet_trainer(callbacks=[ema]), stage)(module, regression_data(4), ckpt_path=path)
    assert torch.equal(seen[0], saved["callbacks"]["BalancedEMA"]["average"]["averages"][0])
    assert all_equal(weights_of(module), list(saved["state_dict"].values()))
    assert not ema.average.attached


def test_an_exception_in_the_evaluation_of_a_task_leaves_the_weights():
    """The evaluation inside a stream puts a group's weights in, and the callback's own after it."""
    module, groups = PlainModule(), TaskGroups(texts=lambda task: [f"Sort pile{task.index}"])

    def fail(module, batch):
        inside.append(weights_of(module))
        raise ZeroDivisionError

    inside: list[list[torch.Tensor]] = []
    predict = groups.routed(fail, allocate=lambda batch: [0] * len(batch))
    with pytest.raises(ZeroDivisionError):
        fit_stream(quiet_trainer(callbacks=[groups, BalancedEMA("released")]), module, tiny_stream(), predict=predict)
    assert len(inside) == 1
    assert all_equal(weights_of(module), list(groups.weights[0].values()))


def test_averaged_context_restores_after_an_exception():
    module, ema = Regression(), BalancedEMA("released", finalize=False)
    quiet_trainer(callbacks=[ema]).fit(module, regression_data())
    raw = weights_of(module)

    def fail_inside() -> None:
        with ema.averaged(module):
            assert all_equal(weights_of(module), ema.average.averager.averages)
            with pytest.raises(RuntimeError, match="in place already"), ema.averaged(module):
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert all_equal(weights_of(module), raw)
    exported = ema.averaged_state_dict(module)
    assert list(exported) == list(module.state_dict())
    assert torch.equal(exported["net.0.weight"], ema.average.averager.averages[0])
    assert all_equal(weights_of(module), raw)


def test_averaged_needs_an_average():
    with (
        pytest.raises(RuntimeError, match="there is no average beside the weights"),
        BalancedEMA("released").averaged(Regression()),
    ):
        pass


def test_export_of_averaged_parameters_alone():
    module, ema = Regression(), BalancedEMA("released")
    module.net[0].requires_grad_(False)
    quiet_trainer(callbacks=[ema]).fit(module, regression_data())
    assert list(ema.averaged_state_dict(module, only_averaged=True)) == ["net.2.weight", "net.2.bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_weights_are_a_complete_state_of_the_modules_dtype(dtype):
    module, ema = Regression().to(dtype), BalancedEMA("fixed", decay=0.5, finalize=False)
    data = regression_data()
    quiet_trainer(callbacks=[ema], precision="bf16-true" if dtype == torch.bfloat16 else "32-true").fit(module, data)
    exported, fresh = ema.averaged_state_dict(module), Regression(seed=1).to(dtype)
    fresh.load_state_dict(exported, strict=True)
    assert {v.dtype for v in exported.values()} == {dtype}
    with ema.averaged(module):
        assert all_equal(weights_of(fresh), weights_of(module))
    exported["net.0.weight"].zero_()  # a copy, not the average itself
    assert bool(ema.average.averager.averages[0].any())


# several Trainers, and evaluation from checkpoints


def test_one_callback_in_three_trainers():
    """Lightning's averaging stops updating in the second Trainer and then throws the second training away."""
    module, ema = Regression(), BalancedEMA("released")
    for seed in range(3):
        before = weights_of(module)
        quiet_trainer(callbacks=[ema], max_epochs=1).fit(module, regression_data(seed=seed))
        assert not all_equal(before, weights_of(module))
    fresh = Regression()
    for seed in range(3):
        quiet_trainer(callbacks=[BalancedEMA("released")], max_epochs=1).fit(fresh, regression_data(seed=seed))
    assert all_equal(weights_of(fresh), weights_of(module))


def _fit_with_checkpoint(folder: Path, **options) -> tuple[Regression, BalancedEMA, pl.Trainer, Path]:
    module, ema = Regression(), BalancedEMA(**{"rule": "released", **options})
    keeper = ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    trainer = quiet_trainer(callbacks=[ema, keeper], enable_checkpointing=True)
    trainer.fit(module, regression_data(equal_batches=True))
    return module, ema, trainer, folder / "step=5.ckpt"


def test_testing_a_checkpoint_gives_the_average_in_every_process(tmp_path):
    """Lightning's averaging tests raw weights after a fit, and averaged ones in a new process."""
    module, _, trainer, path = _fit_with_checkpoint(tmp_path)
    trainer.test(module, regression_data(4), ckpt_path=path, verbose=False)
    fresh = Regression()
    quiet_trainer(callbacks=[BalancedEMA("released")]).test(fresh, regression_data(4), ckpt_path=path, verbose=False)
    saved = torch.load(path, weights_only=True)
    average = saved["callbacks"]["BalancedEMA"]["average"]["averages"][0]
    assert torch.equal(module.seen["test"][-1], average)
    assert torch.equal(fresh.seen["test"][-1], average)
    assert not torch.equal(saved["state_dict"]["net.0.weight"], average)
    assert torch.equal(fresh.net[0].weight, saved["state_dict"]["net.0.weight"])
    assert torch.equal(saved["state_dict"]["net.0.weight"], module.seen["steps"][4])


def test_standalone_validation_uses_the_weights_it_is_given():
    """Lightning's averaging puts a stale average into whatever module is validated."""
    module, ema = Regression(), BalancedEMA("released")
    trainer = quiet_trainer(callbacks=[ema])
    trainer.fit(module, regression_data())
    with torch.no_grad():
        module.net[0].weight.fill_(7.0)
    trainer.validate(module, regression_data(4), verbose=False)
    assert module.seen["validation"][-1].unique().tolist() == [7.0]
    trainer.test(module, regression_data(4), verbose=False)
    assert module.seen["test"][-1].unique().tolist() == [7.0]


def test_a_checkpoint_average_can_be_loaded_without_a_trainer(tmp_path):
    from cl_plugins.callbacks.balanced_ema import load_average

    _, _, _, path = _fit_with_checkpoint(tmp_path)
    saved = torch.load(path, weights_only=True)
    module = Regression()
    module.load_state_dict(saved["state_dict"])
    load_average(saved, module)
    assert all_equal(weights_of(module), saved["callbacks"]["BalancedEMA"]["average"]["averages"])
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
    trainer.fit(resumed, regression_data(equal_batches=True), ckpt_path=tmp_path / f"step={step}.ckpt")
    assert trainer.global_step == 16
    assert all_equal(weights_of(whole), weights_of(resumed))


def test_resume_of_a_stream_inside_a_task_is_bitwise(tmp_path):
    def build(**options):
        keeper = ModelCheckpoint(tmp_path, every_n_train_steps=5, save_top_k=-1, filename="{step}")
        ema = BalancedEMA(rule="dimension_free", rho=0.5)
        return quiet_trainer(callbacks=[MaskedHead(), ema, keeper], enable_checkpointing=True), ema

    trainer, ema = build()
    whole = PlainModule()
    expected = fit_stream(trainer, whole, tiny_stream())
    reports = ema.report_events(whole)
    trainer, ema = build()
    resumed = PlainModule(tiny_vit(seed=5))
    result = fit_stream(trainer, resumed, tiny_stream(), ckpt_path=tmp_path / "step=10.ckpt")
    assert all_equal(weights_of(whole), weights_of(resumed))
    assert torch.equal(result.correct, expected.correct)
    assert ema.report_events(resumed) == reports


def test_resume_of_a_finished_fit_still_ends_in_the_average(tmp_path):
    whole, _, _, _ = _fit_with_checkpoint(tmp_path)
    keeper = ModelCheckpoint(tmp_path / "end", save_last=True)
    module, ema = Regression(), BalancedEMA("released")
    trainer = quiet_trainer(callbacks=[ema, keeper], enable_checkpointing=True)
    trainer.fit(module, regression_data(equal_batches=True))
    raw = module.seen["steps"][-1]
    resumed = Regression(seed=1)
    trainer = quiet_trainer(callbacks=[BalancedEMA("released")])
    trainer.fit(resumed, regression_data(), ckpt_path=tmp_path / "end" / "last.ckpt")
    assert all_equal(weights_of(resumed), weights_of(whole))
    assert not torch.equal(resumed.net[0].weight, raw)


def test_resume_refuses_a_module_without_the_parameters(tmp_path):
    _, _, _, path = _fit_with_checkpoint(tmp_path)
    state = torch.load(path, weights_only=True)["callbacks"]["BalancedEMA"]
    ema, module = BalancedEMA("released"), nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="build the module as it was"):
        ema.average.begin(module, state["average"])


def test_callback_survives_a_deepcopy_during_training():
    class Copies(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            copy.deepcopy(trainer.callbacks[0].state_dict())

    quiet_trainer(callbacks=[BalancedEMA("released"), Copies()], max_epochs=1).fit(Regression(), regression_data())


# two processes

DDP = """
import sys, torch
import pytorch_lightning as pl
from torch.utils.data import DataLoader, TensorDataset
from cl_plugins.callbacks import BalancedEMA
from tests._regression import Regression, regression_data

module, ema = Regression(), BalancedEMA("released", finalize=False)
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False,
                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer.callbacks.append(ema)
trainer.fit(module, regression_data(batch_size=2))
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
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors.decode()[-2000:]
    first, second = (torch.load(tmp_path / f"out.{r}", weights_only=True) for r in range(2))
    assert all_equal(first[0], second[0])
    assert all_equal(first[1], second[1])
