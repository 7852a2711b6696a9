"""ForgettingDashboard: what it records is what the runner measured, through resumes, failures and full disks."""

import os

import numpy as np
import pytest
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy

from cl_plugins import ContinualCallback, fit_stream
from cl_plugins.callbacks.dashboard import ForgettingDashboard, parameter_counts
from cl_plugins.runs import RunWriter, read_run
from tests._helpers import PlainModule, StopAtTask, quiet_trainer, tiny_stream


class Reporter(ContinualCallback):
    """Tells its whole history after each task, as methods do."""

    def __init__(self):
        super().__init__()
        self.history = []

    def end_task(self, module, task):
        self.history.append({"name": "reporter/value", "task": task.index, "value": torch.tensor([0.5, torch.nan])})

    def report_events(self, module):
        return self.history


def test_the_run_is_recorded_as_the_runner_measured_it(tmp_path, capsys):
    dashboard = ForgettingDashboard(tmp_path, "demo", meta={"seed": 4, "path": tmp_path})
    trainer = quiet_trainer(callbacks=[dashboard, Reporter()], max_epochs=1)
    result = fit_stream(trainer, PlainModule(), tiny_stream(), evaluate_initial=True, evaluate_future=True)
    run = read_run(tmp_path / "demo")
    assert np.array_equal(run.correct, result.correct.numpy())
    assert np.array_equal(run.total, result.total.numpy())
    assert run.initial[0].tolist() == list(result.initial.correct)
    assert run.ended == "finished"
    assert run.problems == []
    assert run.meta["method"] == "Reporter"
    assert run.meta["seed"] == 4
    assert run.meta["stream"]["class_order"] == [0, 1, 2, 3, 4, 5]
    assert [t.classes for t in run.tasks] == [(0, 1), (2, 3), (4, 5)]
    assert {k: c["trainable"] for k, c in run.cost.items()} == dict.fromkeys(range(3), result.trainable_parameters)
    assert all(c["train_seconds"] > 0 and c["eval_seconds"] > 0 and c["peak_bytes"] > 1e6 for c in run.cost.values())
    assert [(e["task"], e["value"]) for e in run.plug] == [(k, [0.5, None]) for k in range(3)]
    assert (tmp_path / "demo" / "events.0.0.jsonl").read_text().count('"kind":"plug"') == 3  # each told once
    assert run.confusion[2].sum() == result.total[2].sum()
    assert dashboard.report.stat().st_size > 1e6
    assert capsys.readouterr().out.splitlines().count(f"report: {tmp_path / 'demo' / 'report.html'}") == 1


def test_the_report_is_there_after_every_task(tmp_path):
    class Look(ContinualCallback):
        """Stands after the dashboard, so it sees what that has rendered."""

        training, records = "neutral", True
        seen = ()

        def on_row(self, trainer, pl_module, row):
            page = (tmp_path / "demo" / "report.html").read_text()
            self.seen = (*self.seen, f'"rows":{row.after + 1},' in page)

    look = Look()
    trainer = quiet_trainer(callbacks=[ForgettingDashboard(tmp_path, "demo"), look], max_epochs=1)
    fit_stream(trainer, PlainModule(), tiny_stream())
    assert look.seen == (True, True, True)


def test_without_a_report_or_a_name(tmp_path, capsys):
    dashboard = ForgettingDashboard(tmp_path, report=None)
    fit_stream(quiet_trainer(callbacks=[dashboard], max_epochs=1), PlainModule(), tiny_stream())
    (folder,) = tmp_path.iterdir()
    assert [p.name for p in folder.iterdir()] == ["events.0.0.jsonl"]
    assert dashboard.run_id == folder.name
    assert "report:" not in capsys.readouterr().out
    assert read_run(folder).meta["method"] == "finetune"


def test_a_failure_is_recorded_with_its_reason(tmp_path):
    class Failing(PlainModule):
        def training_step(self, batch, batch_idx):
            if self.trainer.datamodule.task == 1:
                raise ZeroDivisionError("<b>no luck</b>")
            return super().training_step(batch, batch_idx)

    trainer = quiet_trainer(callbacks=[ForgettingDashboard(tmp_path, "demo")], max_epochs=1)
    with pytest.raises(ZeroDivisionError):
        fit_stream(trainer, Failing(), tiny_stream())
    run = read_run(tmp_path / "demo")
    assert (run.ended, run.error) == ("failed", "ZeroDivisionError: <b>no luck</b>")
    assert run.correct.shape == (1, 3)
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "ZeroDivisionError: &lt;b&gt;no luck&lt;/b&gt;" in page


def test_a_resumed_run_goes_on_in_its_folder(tmp_path):
    from pytorch_lightning.callbacks import ModelCheckpoint

    def trainer(*more):
        saver = ModelCheckpoint(tmp_path / "ckpt", save_last=True, filename="{epoch}", save_on_train_epoch_end=True)
        callbacks = [ForgettingDashboard(tmp_path / "runs", "demo"), saver, *more]
        return quiet_trainer(callbacks=callbacks, max_epochs=1, enable_checkpointing=True)

    with pytest.raises(KeyboardInterrupt):
        fit_stream(trainer(StopAtTask(2)), PlainModule(), tiny_stream())
    before = read_run(tmp_path / "runs" / "demo")
    assert before.ended == "failed"
    assert "KeyboardInterrupt" in before.error
    (tmp_path / "runs" / "demo" / "events.0.0.jsonl").rename(tmp_path / "runs" / "demo" / "events.0.0.jsonl.lost")
    result = fit_stream(trainer(), PlainModule(), tiny_stream(), ckpt_path="last")
    run = read_run(tmp_path / "runs" / "demo")  # complete even without the first file: the checkpoint knew the rows
    assert np.array_equal(run.correct, result.correct.numpy())
    assert run.ended == "finished"


def test_only_the_first_process_writes(tmp_path):
    class Second(SingleDeviceStrategy):
        global_rank = property(lambda self: 1, lambda self, value: None)  # its __init__ sets 0

    trainer = quiet_trainer(callbacks=[ForgettingDashboard(tmp_path, "demo")], strategy=Second("cpu"))
    fit_stream(trainer, PlainModule(), tiny_stream())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_does_not_stop_training(tmp_path):
    class Full(ContinualCallback):
        """Puts a device that is always full in place of the dashboard's file."""

        training = "neutral"

        def start_task(self, module, task):
            if task.index == 1:
                full = os.open("/dev/full", os.O_WRONLY)
                os.dup2(full, dashboard._writer._file)
                os.close(full)

    dashboard = ForgettingDashboard(tmp_path, "demo", report=None)
    trainer = quiet_trainer(callbacks=[dashboard, Full()], max_epochs=1)
    with pytest.warns(UserWarning, match="the run is recorded no further, training goes on"):
        result = fit_stream(trainer, PlainModule(), tiny_stream())
    assert len(result.rows) == 3
    assert read_run(tmp_path / "demo").correct.shape[0] == 1


def test_wrong_arguments_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="`run_id` must be a name"):
        ForgettingDashboard(tmp_path, "../other")
    with pytest.raises(TypeError, match="`meta` must be a mapping of plain values, got 3"):
        ForgettingDashboard(tmp_path, meta=3)
    with RunWriter(tmp_path, "busy"):
        dashboard = ForgettingDashboard(tmp_path, "busy")
        with pytest.raises(RuntimeError, match="being written by another process"):
            fit_stream(quiet_trainer(callbacks=[dashboard]), PlainModule(), tiny_stream())


def test_parameters_by_kind():
    module = PlainModule()
    total = sum(p.numel() for p in module.parameters())
    module.plugins = torch.nn.ModuleDict({"x": torch.nn.Linear(2, 3)})
    assert parameter_counts(module) == {"model": total, "plugins": 9}


def test_a_callback_that_cannot_close_does_not_hide_what_failed_nor_keep_others_open(tmp_path):
    class Broken(ContinualCallback):
        training = "neutral"

        def on_row(self, trainer, pl_module, row):
            raise OSError("the first trouble")

        def on_exception(self, trainer, pl_module, exception):
            raise RuntimeError("the second")

    dashboard = ForgettingDashboard(tmp_path, "demo", report=None)
    trainer = quiet_trainer(callbacks=[Broken(), dashboard], max_epochs=1)
    with (
        pytest.warns(UserWarning, match=r"Broken could not close what it opened: RuntimeError\('the second'\)"),
        pytest.raises(OSError, match="the first trouble"),
    ):
        fit_stream(trainer, PlainModule(), tiny_stream())
    assert read_run(tmp_path / "demo").ended == "failed"
