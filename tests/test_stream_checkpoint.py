"""A stream that is stopped anywhere goes on as if it had not been."""

import importlib
import os
import random
import signal

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from cl_plugins import fit_stream
from cl_plugins.callbacks import BalancedEMA, ForgettingDashboard, ForgettingTracker, MaskedHead, StreamCheckpoint
from cl_plugins.checkpoint_files import checkpoint_files, damage, newest_intact, publish
from cl_plugins.plugin import ContinualCallback
from cl_plugins.runs import read_run
from cl_plugins.scenarios import ClassIncremental
from cl_plugins.stream_checkpoint import StreamStopped
from tests._helpers import PlainModule, quiet_trainer, tiny_stream


class Scheduled(PlainModule):
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)]

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step((x + 0.1 * torch.randn_like(x), y), batch_idx)  # draws from the global generator


class Fail(ContinualCallback):
    """Ends the work at a moment, as a crash would."""

    training = "neutral"

    def __init__(self, step=None, hook=None, task=None, action=None):
        super().__init__()
        self.at, self.hook, self.task = step, hook, task
        self.action = action or (lambda: (_ for _ in ()).throw(RuntimeError("power failure")))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.at:
            self.action()

    def on_task_start(self, trainer, pl_module, task):
        super().on_task_start(trainer, pl_module, task)
        if (self.hook, self.task) == ("start", task.index):
            self.action()

    def on_task_end(self, trainer, pl_module, task):
        if (self.hook, self.task) == ("end", task.index):
            self.action()

    def on_row(self, trainer, pl_module, row):
        if (self.hook, self.task) == ("row", row.after):
            self.action()


def _run(folder, *callbacks, resume=False, trainer_options=None, **options):
    pl.seed_everything(5, verbose=False)
    module = Scheduled()
    saver = StreamCheckpoint(folder / "checkpoints", **options)
    tracker = ForgettingTracker()
    dashboard = ForgettingDashboard(folder, run_id="run", report=None)
    trainer = quiet_trainer(
        callbacks=[MaskedHead(), *callbacks, tracker, dashboard, saver],
        enable_checkpointing=True,
        default_root_dir=folder,
        **(trainer_options or {}),
    )
    result = fit_stream(trainer, module, tiny_stream(), "last" if resume else None)
    return module, result, trainer, tracker


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return _run(tmp_path_factory.mktemp("whole"))


def _same(first, second, folder):
    for name, value in first[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[name]), name
    assert [r.correct for r in first[1].rows] == [r.correct for r in second[1].rows]
    assert [r.after for r in second[1].rows] == [0, 1, 2]
    assert len(second[1].train_seconds) == 3
    assert first[1].trainable_parameters == second[1].trainable_parameters
    assert first[2].global_step == second[2].global_step
    assert torch.equal(first[3].matrix.compute().nan_to_num(-1), second[3].matrix.compute().nan_to_num(-1))
    recorded = read_run(folder / "run")
    assert recorded.correct.tolist() == first[1].correct.tolist()
    assert not recorded.problems


MOMENTS = [{"step": s} for s in (1, 8, 12, 16, 23)]
MOMENTS += [{"hook": h, "task": t} for h in ("start", "end", "row") for t in (1, 2)]


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
@pytest.mark.parametrize("every", [None, 1])
def test_a_stream_stopped_anywhere_goes_on_bit_for_bit(tmp_path, whole, moment, every):
    with pytest.raises(RuntimeError, match="power failure"):
        _run(tmp_path, Fail(**moment), every_n_steps=every)
    if not checkpoint_files(tmp_path / "checkpoints"):
        assert moment.get("step", 0) < 8
        return
    _same(whole, _run(tmp_path, resume=True, every_n_steps=every), tmp_path)
    assert len(checkpoint_files(tmp_path / "checkpoints")) == 2


class Noisy:
    """A random transform that draws from torch's, NumPy's and Python's generators."""

    def __call__(self, x):
        return x + 0.1 * torch.randn_like(x) + float(np.random.rand()) + random.random()


def test_data_workers_draw_the_same_after_a_resume(tmp_path):
    def run(name, *callbacks, workers, resume=False):
        pl.seed_everything(5, verbose=False)
        module, folder = Scheduled(), tmp_path / name
        stream = tiny_stream(num_workers=workers, train_transform=Noisy(), n_tasks=2, pin_memory=False)
        trainer = quiet_trainer(
            callbacks=[MaskedHead(), *callbacks, StreamCheckpoint(folder, every_n_steps=1)],
            enable_checkpointing=True,
            default_root_dir=folder,
        )
        fit_stream(trainer, module, stream, "last" if resume else None)
        return module.state_dict()

    whole = run("whole", workers=0)
    step = 3 * len(tiny_stream(n_tasks=2).train_dataloader()) - 2  # inside the first epoch of the second task
    with pytest.raises(RuntimeError, match="power failure"):
        run("stopped", Fail(step), workers=1)
    resumed = run("stopped", workers=1, resume=True)
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.parametrize("first", [3, 4, 5])
def test_a_stream_stopped_twice_in_one_task_trains_no_epoch_twice(tmp_path, whole, first):
    for resume, moment in ((False, {"step": first}), (True, {"hook": "end", "task": 0})):
        with pytest.raises(RuntimeError, match="power failure"):
            _run(tmp_path, Fail(**moment), resume=resume, every_n_steps=2)
    _same(whole, _run(tmp_path, resume=True, every_n_steps=2), tmp_path)


def test_what_is_finished_is_neither_trained_nor_evaluated_again(tmp_path, whole):
    with pytest.raises(RuntimeError, match="power failure"):
        _run(tmp_path, Fail(hook="start", task=2))
    rows = []

    class Rows(ContinualCallback):
        training = "neutral"

        def on_row(self, trainer, pl_module, row):
            rows.append(row.after)

    _run(tmp_path, Rows(), resume=True)
    assert rows == [2]
    again = _run(tmp_path, Rows(), resume=True)
    assert rows == [2]  # a finished stream gives its result and does nothing
    _same(whole, again, tmp_path)


@pytest.mark.parametrize("moment", [{"step": 11}, {"hook": "end", "task": 1}], ids=str)
def test_sigterm_saves_once_and_ends_cleanly(tmp_path, whole, moment):
    before = signal.getsignal(signal.SIGTERM)
    terminate = Fail(**moment, action=lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StreamStopped, match=r"told to end by SIGTERM in task [12]; everything is saved in ") as caught:
        _run(tmp_path, terminate)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before
    step = 12 if "step" in moment else 16
    assert checkpoint_files(tmp_path / "checkpoints")[-1].name.endswith(f"-step-{step}.ckpt")
    _same(whole, _run(tmp_path, resume=True), tmp_path)


@pytest.mark.parametrize("fault", ["flip", "cut", "empty", "no sum"])
def test_a_damaged_file_is_refused_and_the_one_before_taken(tmp_path, whole, fault):
    with pytest.raises(RuntimeError, match="power failure"):
        _run(tmp_path, Fail(step=13), every_n_steps=2)
    newest, good = checkpoint_files(tmp_path / "checkpoints")[::-1]
    content = bytearray(newest.read_bytes())
    if fault == "flip":
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    elif fault == "no sum":
        newest.with_name(newest.name + ".sha256").unlink()
    else:
        newest.write_bytes(content[: len(content) // 2 if fault == "cut" else 0])
    with pytest.raises(ValueError, match="`ckpt_path` must be a whole checkpoint"):
        fit_stream(quiet_trainer(), PlainModule(), tiny_stream(), newest)
    with pytest.warns(UserWarning, match=f"{newest.name} is damaged.*the one before it is taken"):
        resumed = _run(tmp_path, resume=True)
    assert good != newest
    _same(whole, resumed, tmp_path)


def test_checkpoints_of_both_kinds_are_data_only(tmp_path, caplog):
    with pytest.raises(RuntimeError, match="power failure"):
        _run(tmp_path, Fail(step=10), every_n_steps=9)
    assert "`weights_only` was not set" not in caplog.text  # nothing of Lightning's is said about what was not asked
    between, inside = checkpoint_files(tmp_path / "checkpoints")
    for path in (between, inside):
        assert "callbacks" in torch.load(path, weights_only=True)
    assert not torch.load(between, weights_only=True)["optimizer_states"]
    assert torch.load(inside, weights_only=True)["optimizer_states"]


class Nan(Scheduled):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (float("nan") if self.trainer.global_step == 10 else 1.0)


def test_weights_that_became_nan_do_not_replace_a_good_checkpoint(tmp_path, whole, monkeypatch):
    monkeypatch.setitem(_run.__globals__, "Scheduled", Nan)
    with pytest.raises(FloatingPointError, match="finished tasks are recorded, and no checkpoint"):
        _run(tmp_path, every_n_steps=1)
    monkeypatch.undo()
    assert checkpoint_files(tmp_path / "checkpoints")[-1].name.endswith("step-10.ckpt")
    _same(whole, _run(tmp_path, resume=True), tmp_path)


@given(st.integers(0, 5), st.sampled_from(["write", "rename", "none"]))
def test_a_crash_while_writing_leaves_the_files_from_before(tmp_path_factory, count, fault):
    folder = tmp_path_factory.mktemp("c")
    for n in range(count):
        publish(folder, 0, n, lambda p, n=n: p.write_text(str(n)))
    before = checkpoint_files(folder)

    def broken(path):
        path.write_text("half")
        if fault == "write":
            raise OSError("No space left on device")
        if fault == "rename":
            path.unlink()

    if fault == "none":
        publish(folder, 1, 9, broken)
        assert newest_intact(folder).read_text() == "half"
        return
    with pytest.raises(OSError, match=r"No space|No such file"):
        publish(folder, 1, 9, broken)
    assert checkpoint_files(folder) == before
    assert all(damage(p) is None for p in before)
    assert len(list(folder.iterdir())) == 2 * len(before)  # each with its checksum, nothing else


def test_left_overs_of_a_killed_process_are_removed_and_checksums_are_sha256sum_s(tmp_path):
    (tmp_path / ".stream-000000-task-0-step-1.ckpt.77.tmp").write_text("half")
    (tmp_path / "stream-000000-task-0-step-1.ckpt.sha256").write_text("half")
    path = publish(tmp_path, 0, 1, lambda p: p.write_text("abc"))
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, f"{path.name}.sha256"]
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert path.with_name(path.name + ".sha256").read_text() == f"{expected}  {path.name}\n"


def test_only_damaged_files_are_no_start(tmp_path):
    path = publish(tmp_path, 0, 1, lambda p: p.write_text("abc"))
    path.write_text("abd")
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(ValueError, match="every checkpoint in"):
        newest_intact(tmp_path)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be above 0"),
        ({"every_n_minutes": -1.0}, "`every_n_minutes` must be above 0"),
        ({"keep": 1}, "`keep` must be 2 or more"),
    ],
)
def test_settings_are_checked(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        StreamCheckpoint(tmp_path, **options)


def test_minutes_count_from_the_last_save(tmp_path):
    _run(tmp_path, every_n_minutes=1e-9)
    last = checkpoint_files(tmp_path / "checkpoints")[-1]
    assert last.name.startswith("stream-000023")  # 21 steps and 3 tasks: a task's last step is saved with the task


def test_collected_gradients_wait_for_the_optimizer_step(tmp_path):
    options = {"trainer_options": {"accumulate_grad_batches": 2}}
    expected = _run(tmp_path / "a", **options)
    with pytest.raises(RuntimeError, match="power failure"):
        _run(tmp_path / "b", Fail(step=7), every_n_steps=1, **options)
    _same(expected, _run(tmp_path / "b", resume=True, **options), tmp_path / "b")


@pytest.mark.parametrize("step", [10, 13])
def test_an_average_that_counts_its_steps_goes_on_inside_a_task(tmp_path, step):
    def average():  # counting the steps must not build the loaders before the position in them is known
        return BalancedEMA("horizon", keep=0.5, active="after_first")

    whole = _run(tmp_path / "whole", average())
    with pytest.raises(RuntimeError, match="power failure"):
        _run(tmp_path / "cut", average(), Fail(step=step), every_n_steps=1)
    _same(whole, _run(tmp_path / "cut", average(), resume=True, every_n_steps=1), tmp_path / "cut")


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("step", [2, 5, 10])
def test_a_schedule_over_the_estimated_steps_goes_on_with_the_same_samples(tmp_path, package, step):
    """Asking how many steps there are builds the loaders before the position in them is known."""
    lightning = importlib.import_module(package)
    ids: list[list[float]] = []

    class OneCycle(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(1, 4)

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            ids.append(batch[0].flatten().tolist())
            return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
            steps = self.trainer.estimated_stepping_batches
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def run(folder, *callbacks, resume=None):
        pl.seed_everything(5, verbose=False)
        data = TensorDataset(torch.arange(32.0)[:, None], torch.arange(32) % 4)
        stream = ClassIncremental(data, test=data, n_tasks=2, batch_size=4)
        saver = StreamCheckpoint(folder, every_n_steps=1)
        module = OneCycle()
        trainer = quiet_trainer(lightning.Trainer, callbacks=[*callbacks, saver], enable_checkpointing=True)
        fit_stream(trainer, module, stream, resume)
        return module, trainer.lr_scheduler_configs[0].scheduler.last_epoch

    whole, expected = run(tmp_path / "whole"), list(ids)
    ids.clear()
    with pytest.raises(RuntimeError, match="power failure"):
        run(tmp_path / "cut", Fail(step))
    assert len(ids) == step
    resumed = run(tmp_path / "cut", resume="last")
    assert ids == expected
    assert resumed[1] == whole[1]
    assert all(torch.equal(v, resumed[0].state_dict()[k]) for k, v in whole[0].state_dict().items())
