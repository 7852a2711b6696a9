"""Evaluations inside tasks in a run's folder: command line, result file, run store, resume."""

from __future__ import annotations

import json

import pytest

from cl_plugins.benchmark import finished_result, run_benchmark
from cl_plugins.callbacks import ContinualEvaluation, ForgettingDashboard, StreamCheckpoint
from cl_plugins.cli import main
from cl_plugins.inside_tasks import InsideRow, InsideTasks
from cl_plugins.plugin import ContinualCallback
from cl_plugins.runs import RunWriter, read_run
from cl_plugins.scenarios import build_scenario
from cl_plugins.summary import summary_table

from ._helpers import PlainModule, quiet_trainer, tiny_stream

QUICK = {"epochs": 1, "device": "cpu", "progress": False, "data": {"validation_fraction": 0.9}}


def test_the_command_line_evaluates_inside_tasks_and_prints_the_numbers(tmp_path, capsys):
    words = (
        "run --method finetune --scenario split-digits --epochs 1 --device cpu --quiet --data validation_fraction=0.9"
    )
    folder = tmp_path / "run"
    assert main([*words.split(), "--set", "batch_size=8", "--out", str(folder), "--eval-every", "3"]) == 0
    printed = capsys.readouterr().out
    told = json.loads((folder / "result.json").read_text())["inside_tasks"]
    assert told["every_n_steps"] == 3
    assert "inside the tasks, evaluated every 3 steps" in printed
    line = next(x for x in printed.splitlines() if x.startswith("min accuracy"))
    assert line.split()[-1] == format(told["metrics"]["min_accuracy@every=3"], ".4f")
    run = read_run(folder)
    assert [r.to_dict() for r in run.inside] == [{k: r[k] for k in run.inside[0].to_dict()} for r in told["rows"]]
    assert not run.problems
    assert (
        finished_result(folder, build_scenario("split-digits", **QUICK["data"], batch_size=8)).inside_tasks
        == run.inside
    )


def test_options_without_a_period_and_other_settings_on_resume_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`eval_every` must be given beside `eval_tasks`"):
        run_benchmark("finetune", "split-digits", out=tmp_path / "a", eval_tasks=5, **QUICK)
    run_benchmark("finetune", "split-digits", out=tmp_path / "b", **QUICK)
    with pytest.raises(ValueError, match=r"`resume` must go on with the same settings.*inside_tasks None there"):
        run_benchmark("finetune", "split-digits", out=tmp_path / "b", resume=True, eval_every=2, **QUICK)


class _StopAt(ContinualCallback):
    training = "neutral"

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 14:
            raise KeyError("stop")


@pytest.mark.parametrize("new_folder", [False, True])
def test_the_store_of_a_resumed_run_holds_every_row_once(tmp_path, new_folder):
    from cl_plugins import fit_stream

    def train(run_id, *more, ckpt_path=None):
        inside = ContinualEvaluation(2)
        saver = StreamCheckpoint(tmp_path / "checkpoints", every_n_steps=5)
        dashboard = ForgettingDashboard(tmp_path, run_id, report=None)
        trainer = quiet_trainer(callbacks=[dashboard, inside, *more, saver], enable_checkpointing=True)
        fit_stream(trainer, PlainModule(), tiny_stream(), ckpt_path)
        return inside.rows

    with pytest.raises(KeyError):
        train("a", _StopAt())
    assert [r.step for r in read_run(tmp_path / "a").inside] == [2, 4, 6, 8, 8, 10, 12, 14]
    run_id = "b" if new_folder else "a"
    rows = train(run_id, ckpt_path="last")
    assert read_run(tmp_path / run_id).inside == rows
    assert [(r.task, r.step) for r in rows if r.end] == [(0, 8), (1, 16), (2, 24)]


def test_the_last_of_two_rows_at_one_step_counts_and_damage_is_named(tmp_path):
    row = InsideRow(4, 0, 0, 1, (0,), (3,), (5,), (4,), 2)
    with RunWriter(tmp_path, "a") as writer:
        writer.write("mid", **{**row.to_dict(), "correct": [2]})
        writer.write("mid", **row.to_dict())
        writer.write("mid", **{**row.to_dict(), "correct": [6], "step": 6})
        writer.write("mid", **{**row.to_dict(), "total": None, "step": 8})
        writer.write("mid", step=3)
    run = read_run(tmp_path / "a")
    assert run.inside == [row]
    assert run.problems == ["3 evaluations inside tasks are malformed and left out"]


def test_an_undefined_number_is_printed_with_its_reason():
    from cl_plugins import Task
    from cl_plugins.plugin import Row
    from cl_plugins.result import StreamResult

    result = StreamResult([Task(0, (0, 1))], [Row(0, (4,), (5,), (4,), (), 0.1)])
    result.inside_tasks = [InsideRow(2, 0, 0, 1, (0,), (3,), (5,), (4,), 2)]
    assert "undefined" in next(x for x in summary_table(result).splitlines() if x.startswith("min accuracy"))
    assert InsideTasks(result.inside_tasks).undefined()["min_accuracy@every=2"]
