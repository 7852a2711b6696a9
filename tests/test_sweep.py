"""Sweeps in real processes: what is finished stays, what fails is named and stops nothing else."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cl_plugins.cli import main
from cl_plugins.run_writer import RunWriter
from cl_plugins.sweep import Job, is_done, plan, run_sweep

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_the_plan_is_seed_by_seed():
    jobs = plan(["ovor", "lora"], ["split-digits", "xtail-glyphs"], seeds=2)
    assert len(jobs) == 8
    assert [j.seed for j in jobs] == [0] * 4 + [1] * 4
    assert all(j.order_seed == j.seed for j in jobs)
    assert {j.order_seed for j in plan(["ovor"], ["split-digits"], 2, "own")} == {None}
    crossed = plan(["ovor"], ["split-digits"], [3, 5], [0, 1])
    assert [(j.seed, j.order_seed) for j in crossed] == [(3, 0), (3, 1), (5, 0), (5, 1)]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((["ovro"], ["split-digits"]), r"`method` must be a known method.*did you mean 'ovor'"),
        ((["ovor"], ["split-digit"]), r"`scenarios` must hold known scenarios.*did you mean 'split-digits'"),
        (([], ["split-digits"]), "must hold one each at least"),
        ((["ovor"], ["split-digits"], 0), "must hold one each at least"),
        ((["ovor", "ovor"], ["split-digits"]), "must not repeat themselves"),
    ],
)
def test_plans_with_faults_are_refused_before_anything_runs(arguments, text):
    with pytest.raises(ValueError, match=text):
        plan(*arguments)
    with pytest.raises(ValueError, match="must name an option of 'ovor'"):
        plan(["ovor"], ["split-digits"], options={"depht": 3})


@pytest.mark.parametrize(
    ("options", "text"),
    [({"n_jobs": 0}, "`n_jobs` must be"), ({"threads": 0}, "`threads` must be"), ({"engine": "rya"}, "'ray'")],
)
def test_settings_are_checked(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        run_sweep([Job("nearest-mean", "split-digits")], tmp_path, **options)


def test_options_of_one_method_and_of_all():
    options = {"mora.rank": 8, "rank": 4, "lr": 1e-3, "MoRA.top_k": 2}
    with pytest.raises(ValueError, match=r"--set MoRA\.top_k"):  # a class, which LoRA is not
        plan(["lora", "mora"], ["split-digits"], 1, options=options)
    del options["MoRA.top_k"]
    lora, mora = plan(["lora", "mora"], ["split-digits"], 1, options=options)
    assert lora.options == {"rank": 4, "lr": 1e-3}
    assert mora.options == {"rank": 8, "lr": 1e-3}
    with pytest.raises(ValueError, match=r"`--set ovor.lr` must be for a method of the sweep, got \['lora'\]"):
        plan(["lora"], ["split-digits"], 1, options={"ovor.lr": 1})
    with pytest.raises(ValueError, match=r"--set (mora\.)?rnk"):
        plan(["mora"], ["split-digits"], 1, options={"mora.rnk": 1})


def test_a_failure_is_named_and_stops_nothing_and_a_second_start_repeats_nothing(tmp_path):
    good = Job("nearest-mean", "split-digits", device="cpu")
    bad = Job("nearest-mean", "split-cifar10", device="cpu", data={"root": str(tmp_path / "nowhere")})
    lines = []
    first = run_sweep([bad, good], tmp_path, n_jobs=2, tell=lines.append)
    assert [j.name for j in first.finished] == [good.name]
    assert [f.job.name for f in first.failed] == [bad.name]
    assert "nowhere" in first.failed[0].message
    assert first.failed[0].log.read_text().strip().endswith(first.failed[0].message)
    assert len(lines) == 2
    assert sum("FAILED" in line for line in lines) == 1
    stamp = (tmp_path / good.name / "result.json").stat().st_mtime_ns
    second = run_sweep([good], tmp_path)
    assert second.skipped == 1
    assert (tmp_path / good.name / "result.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match=r"`epochs` must stay as it was for .*use another folder"):
        run_sweep([Job("nearest-mean", "split-digits", device="cpu", epochs=3)], tmp_path)
    listed = json.loads((tmp_path / "sweep.json").read_text())["jobs"]
    assert {j["name"] for j in listed} == {good.name, bad.name}


def test_a_result_of_something_else_is_not_taken(tmp_path):
    job = Job("ovor", "split-digits")
    assert not is_done(job, tmp_path)
    (tmp_path / job.name).mkdir()
    (tmp_path / job.name / "result.json").write_text('{"method": "lora", "scenario": "split-digits", "seed": 0}')
    with pytest.raises(ValueError, match=r"must be the result of .* got one of .*'lora'"):
        is_done(job, tmp_path)
    (tmp_path / job.name / "result.json").write_text('{"method": "lo')
    with pytest.raises(ValueError, match="must be JSON"):
        is_done(job, tmp_path)


def test_options_reach_the_run_as_they_are(tmp_path):
    job = Job("ovor", "split-digits", 4, 5, 1, "cpu", {"lr": 1e-3, "lengths": {0: 4}}, {"batch_size": 8})
    words = job.command(tmp_path / "x")
    assert words[words.index("--order-seed") + 1] == "5"
    assert "lr=0.001" in words
    assert "lengths={0: 4}" in words
    assert "batch_size=8" in words


EXTRA = {"eval_every": 2, "eval_tasks": 2, "eval_samples": 5, "drift": True}


def test_the_evaluation_inside_tasks_and_drift_are_part_of_a_job(tmp_path):
    (job,) = plan(["ovor"], ["split-digits"], 1, **EXTRA)
    words = job.command(tmp_path / "x")
    assert [words[words.index(f"--eval-{k}") + 1] for k in ("every", "tasks", "samples")] == ["2", "2", "5"]
    assert "--drift" in words
    plain = plan(["ovor"], ["split-digits"], 1)[0].command(tmp_path / "x")
    assert not [w for w in plain if w.startswith("--eval") or w == "--drift"]
    with pytest.raises(ValueError, match=r"`eval_every` must be given beside `eval_tasks`"):
        plan(["ovor"], ["split-digits"], 1, eval_tasks=3)
    with pytest.raises(ValueError, match=r"must be .*got 0"):
        plan(["ovor"], ["split-digits"], 1, eval_every=0)


@pytest.mark.parametrize("key", list(EXTRA))
def test_another_evaluation_is_another_job(tmp_path, key):
    job = Job("nearest-mean", "split-digits", device="cpu")
    (tmp_path / job.name).mkdir()
    (tmp_path / job.name / "result.json").write_text(
        '{"method": "nearest-mean", "scenario": "split-digits", "seed": 0, "order_seed": null}'
    )
    assert run_sweep([job], tmp_path).skipped == 1
    listed = json.loads((tmp_path / "sweep.json").read_text())
    for entry in listed["jobs"]:  # as a sweep before these settings wrote it
        for name in EXTRA:
            del entry["job"][name]
    (tmp_path / "sweep.json").write_text(json.dumps(listed))
    assert run_sweep([job], tmp_path).skipped == 1
    with pytest.raises(ValueError, match=rf"`{key}` must stay as it was for .*use another folder"):
        run_sweep([replace(job, **{key: EXTRA[key]})], tmp_path)


@pytest.mark.slow
def test_the_command_passes_the_evaluation_and_drift_on(tmp_path, capsys):
    words = ["sweep", "--methods", "frozen-linear", "--scenarios", "split-digits", "--seeds", "1", "--epochs", "1",
             "--device", "cpu", "--out", str(tmp_path), "--eval-every", "4", "--eval-samples", "8",
             "--drift"]  # fmt: skip
    assert main(words) == 0, capsys.readouterr().err
    result = json.loads(next(tmp_path.glob("*/result.json")).read_text())
    assert {row["step"] % 4 for row in result["inside_tasks"]["rows"] if row["step"]} >= {0}
    assert max(max(row["total"]) for row in result["inside_tasks"]["rows"]) == 8
    assert result["drift"]
    assert main(words) == 0  # nothing is repeated
    assert "[1/1]" not in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.slow
def test_the_command_prints_the_table_and_says_what_failed(tmp_path, capsys):
    arguments = ["sweep", "--methods", "nearest-mean", "--scenarios", "split-digits", "split-cifar10", "--seeds", "1"]
    status = main([*arguments, "--device", "cpu", "--out", str(tmp_path), "--jobs", "2"])
    printed = capsys.readouterr()
    assert status == 1
    assert "nearest-mean" in printed.out
    assert "[2/2]" in printed.out
    assert "failed: split-cifar10_nearest-mean_seed0_order0" in printed.err
    assert ".log" in printed.err


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was(tmp_path):
    words = [sys.executable, "-m", "cl_plugins.cli", "sweep", "--methods", "nearest-mean", "ranpac", "--scenarios",
             "split-digits", "--seeds", "2", "--device", "cpu", "--out", str(tmp_path)]  # fmt: skip
    process = subprocess.Popen(words, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not list(tmp_path.glob("*/result.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/result.json")}
    assert 1 <= len(stamps) < 4
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*/result.json"))) == 4
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())


@pytest.mark.slow
def test_a_job_under_way_elsewhere_is_waited_for(tmp_path):
    job = Job("nearest-mean", "split-digits", device="cpu")
    writer, told = RunWriter(tmp_path, job.name), []
    thread = threading.Thread(target=lambda: told.append(run_sweep([job], tmp_path)))
    thread.start()
    time.sleep(1.5)
    assert thread.is_alive()
    assert not (tmp_path / f"{job.name}.log").exists()  # nothing was started beside it
    writer.close()
    thread.join(120)
    assert [j.name for j in told[0].finished] == [job.name]
    assert told[0].failed == ()


@pytest.mark.slow
def test_ray_runs_the_same_jobs(tmp_path):
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    good = Job("nearest-mean", "split-digits", device="cpu")
    bad = Job("nearest-mean", "split-cifar10", device="cpu")
    result = run_sweep([good, bad], tmp_path, engine="ray")
    assert [j.name for j in result.finished] == [good.name]
    assert [f.job.name for f in result.failed] == [bad.name]
