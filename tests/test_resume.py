"""Runs of ``cl-bench`` that were stopped, by a signal, by the machine or by their own numbers, go on."""

import errno
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from cl_plugins import kill_test
from cl_plugins.benchmark import run_benchmark
from cl_plugins.checkpoint_files import checkpoint_files, publish
from cl_plugins.cli import main
from cl_plugins.failures import RunStopped, explained, what_happened
from cl_plugins.runs import read_run

SMALL = {
    "epochs": 1,
    "device": "cpu",
    "data": {"validation_fraction": 0.9},
    "options": {"batch_size": 8},
    "progress": False,
}


def _run(folder, method="finetune", **options):
    return run_benchmark(method, "split-digits", out=folder, **{**SMALL, **options})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return _run(folder), folder


def _same(folder, whole):
    result, expected = (json.loads((f / "result.json").read_text()) for f in (folder, whole[1]))
    for key in ("correct", "total", "accuracy_matrix", "task_confusion", "trainable_parameters", "recipe", "stream"):
        assert result[key] == expected[key], key
    a, b = read_run(folder), read_run(whole[1])
    assert a.correct.tolist() == b.correct.tolist()
    assert a.ended == "finished"
    weights = [torch.load(checkpoint_files(f / "checkpoints")[-1], weights_only=True) for f in (folder, whole[1])]
    for name, value in weights[0]["state_dict"].items():
        assert torch.equal(value, weights[1]["state_dict"][name]), name


def _fail_at(monkeypatch, step, error):
    """The workload's own training step fails, as a real one would."""
    from cl_plugins.workloads.image import ImageClassifier

    before = ImageClassifier.training_step

    def training_step(self, batch, batch_idx):
        loss = before(self, batch, batch_idx)
        return error(loss) if self.trainer.global_step == step else loss

    monkeypatch.setattr(ImageClassifier, "training_step", training_step)


def _raise(error):
    def failing(loss):
        raise error

    return failing


def _huge(loss):
    return loss + torch.empty(1 << 55).sum()  # no machine has it: torch's own message


FAILURES = {
    "memory": (_huge, "the memory was not enough"),
    "disk": (_raise(OSError(errno.ENOSPC, "No space left on device")), "the disk is full"),
    "worker": (_raise(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")), "that loads data died"),
    "nan": (lambda loss: loss * float("nan"), "the loss is not finite"),
}


@pytest.mark.parametrize("kind", sorted(FAILURES))
def test_a_failure_says_what_is_saved_and_the_next_start_goes_on(tmp_path, whole, monkeypatch, kind):
    error, text = FAILURES[kind]
    _fail_at(monkeypatch, 6, error)
    with pytest.raises(RunStopped) as caught:
        _run(tmp_path / "run", save_every_steps=1)
    said = str(caught.value)
    assert text in said
    assert "saved up to stream-000005-task-1-step-6.ckpt" in said
    assert ("--resume" in said) == (kind != "nan")
    monkeypatch.undo()
    _run(tmp_path / "run", resume=True)
    _same(tmp_path / "run", whole)


def test_resume_starts_what_has_not_begun_and_leaves_what_is_finished(tmp_path, whole, capsys):
    _run(tmp_path / "run", resume=True)
    _same(tmp_path / "run", whole)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    again = _run(tmp_path / "run", resume=True)
    assert "finished already" in capsys.readouterr().err
    assert again.correct.tolist() == whole[0].correct.tolist()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_a_finished_run_keeps_its_last_checkpoint_and_both_when_asked(tmp_path, whole):
    (last,) = checkpoint_files(whole[1] / "checkpoints")
    assert last.name.startswith("stream-000004-task-5-")
    assert sorted(p.name for p in last.parent.iterdir()) == [last.name, f"{last.name}.sha256"]
    _run(tmp_path / "run", "nearest-mean", keep_checkpoints=True, adapters=True)
    assert len(checkpoint_files(tmp_path / "run" / "checkpoints")) == 2
    assert (tmp_path / "run" / "checkpoints" / "adapters.safetensors").is_file()


def test_other_settings_are_refused_by_name(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"method": "finetune", "seed": 3}))
    with pytest.raises(ValueError, match=r"`resume` must go on with the same settings.*seed 3 there, 0 here"):
        _run(tmp_path, resume=True)
    (tmp_path / "config.yaml").write_text("text")
    with pytest.raises(ValueError, match="`resume` must find the settings of a run"):
        _run(tmp_path, resume=True)


def test_without_resume_an_earlier_run_and_its_checkpoints_are_kept_aside(tmp_path, whole):
    publish(tmp_path / "run" / "checkpoints", 0, 1, lambda p: p.write_text("old"))
    _run(tmp_path / "run")
    assert (tmp_path / "run" / "previous-1" / "checkpoints").is_dir()
    _same(tmp_path / "run", whole)


def test_an_output_that_is_a_file_inside_is_named_on_the_command_line(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    words = ["--method", "nearest-mean", "--scenario", "split-digits", "--device", "cpu", "--quiet", "--resume"]
    (tmp_path / "config").write_text("")
    assert main(["run", *words, "--out", str(tmp_path / "run" / "checkpoints" / "x")]) == 1
    error = capsys.readouterr().err
    assert "nothing is saved yet" in error
    assert "run the same command with --resume" in error


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_keeps_the_last_good_checkpoint(small_disk):
    good = publish(small_disk, 0, 1, lambda p: p.write_bytes(bytes(600_000)))
    with pytest.raises(OSError, match="No space left") as caught:
        publish(small_disk, 0, 2, lambda p: p.write_bytes(bytes(3_000_000)))
    assert what_happened(caught.value) == ("the disk is full", "make room")
    assert checkpoint_files(small_disk) == [good]
    assert len(list(small_disk.iterdir())) == 2
    with pytest.raises((OSError, RuntimeError)) as caught:
        publish(small_disk, 0, 2, lambda p: torch.save(torch.zeros(1_000_000), p))
    assert checkpoint_files(small_disk) == [good]


@pytest.mark.filterwarnings("ignore:the report could not be written", "ignore:the run is recorded no further")
def test_a_run_on_a_full_disk_goes_on_when_there_is_room(small_disk, tmp_path, whole):
    with pytest.raises(RunStopped, match=r"could not be written|disk is full"):
        _run(small_disk / "run")
    assert not (small_disk / "run" / "result.json").exists()
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    _run(small_disk / "run", resume=True)
    _same(small_disk / "run", whole)


def _then(action):
    def acting(loss):
        action()
        return loss

    return acting


def test_output_that_becomes_read_only_stops_with_a_reason_and_goes_on_when_it_can_be_written(
    tmp_path, whole, monkeypatch
):
    folder = tmp_path / "run" / "checkpoints"

    def lock():
        for options in (["--bind", folder, folder], ["-o", "remount,bind,ro", folder]):
            if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
                pytest.skip("mounting needs root")

    _fail_at(monkeypatch, 6, _then(lock))
    try:
        with pytest.raises(RunStopped) as caught:
            _run(tmp_path / "run", save_every_steps=1)
    finally:
        subprocess.run(["umount", "-l", folder], capture_output=True, check=False)
    said = str(caught.value)
    assert said.startswith("the folder cannot be written (")
    assert "Read-only file system" in said
    assert "to go on: allow writing there, then" in said
    assert "saved up to stream-000005-task-1-step-6.ckpt" in said
    assert "run the same command with --resume" in said
    monkeypatch.undo()
    _run(tmp_path / "run", resume=True)
    _same(tmp_path / "run", whole)


def _kill_a_worker():
    workers = multiprocessing.active_children()
    assert workers
    os.kill(workers[0].pid, signal.SIGKILL)
    workers[0].join()


@pytest.mark.parametrize("step", [0, 4])
def test_a_data_worker_that_is_killed_ends_the_run_with_a_reason_and_the_next_start_goes_on(
    tmp_path, whole, monkeypatch, step
):
    options = {"data": {**SMALL["data"], "num_workers": 1}}  # prepares two batches ahead, of four
    _fail_at(monkeypatch, step, _then(_kill_a_worker))
    with pytest.raises(RunStopped) as caught:
        _run(tmp_path / "run", save_every_steps=1, **options)
    said = str(caught.value)
    assert "a process that loads data died, often for want of memory" in said
    assert ("; saved up to stream-00000" if step else "; ") in said
    assert "free some or use fewer workers, then run the same command with --resume" in said
    monkeypatch.undo()
    _run(tmp_path / "run", resume=True, **options)
    _same(tmp_path / "run", whole)
    assert not multiprocessing.active_children()


def test_read_only_output_is_named(tmp_path):
    error = explained(PermissionError(errno.EROFS, "Read-only file system", "runs/x"), tmp_path)
    assert str(error).startswith("the folder cannot be written ([Errno 30] Read-only file system: 'runs/x'); nothing")


def test_errors_in_the_users_code_stay_what_they_are():
    assert what_happened(RuntimeError("shapes cannot be multiplied")) is None
    assert explained(ValueError("x"), Path("none")) is None


@pytest.mark.slow
@pytest.mark.parametrize("method", ["masked-finetune", "nearest-mean", "ovor", "mora"])
def test_kill_9_anywhere_changes_nothing(tmp_path, method):
    command = [sys.executable, "-m", "cl_plugins.kill_test", "--methods", method, "--kills", "6"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "kills.json")], capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (outcome,) = json.loads((tmp_path / "kills.json").read_text())["outcomes"]
    assert sum(outcome["kills"].values()) >= 6
    assert outcome["differences"] == []


def test_memory_that_the_system_refuses_is_said_in_words():
    code = (
        "import resource, torch\n"
        "from cl_plugins.failures import what_happened\n"
        "room = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + (1 << 30)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (room, room))\n"
        "try:\n    torch.ones(1 << 30)\n"
        "except Exception as error:\n    print(what_happened(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "('the memory was not enough', 'free some')" in done.stdout, done.stderr


def test_pieces_of_a_kill_test_add_up():
    first = kill_test.Outcome("ovor", {"while saving": 2, "at random": 1}, 5, 1.0, ["x differs"])
    second = kill_test.Outcome("ovor", {"at random": 3, kill_test.CACHING: 1}, 4, 2.0)
    both = kill_test._sum(first, second)
    assert both.kills == {"while saving": 2, "at random": 4, kill_test.CACHING: 1}
    assert (both.starts, both.differences) == (9, ["x differs"])


def test_a_moment_that_a_method_does_not_have_is_refused(tmp_path, capsys):
    with pytest.raises(
        ValueError, match=r"`aims` must be moments of mora: inside a .*; got \['while filling a cache'\]"
    ):
        kill_test.kill_method("mora", 1, tmp_path, aims=[kill_test.CACHING])
    with pytest.raises(SystemExit):
        kill_test.main(["--methods", "mora", "--aim", kill_test.CACHING])
    assert "got ['while filling a cache']" in capsys.readouterr().err


@pytest.mark.slow
def test_a_process_that_is_told_to_end_saves_ends_with_143_and_goes_on(tmp_path, whole):
    words = ["run", "--method", "finetune", "--scenario", "split-digits", "--epochs", "1", "--device", "cpu", "--quiet"]
    words += ["--data", "validation_fraction=0.9", "--set", "batch_size=8", "--out", str(tmp_path / "run"), "--resume"]
    command = [
        sys.executable,
        "-c",
        "import sys; from cl_plugins.cli import main; sys.exit(main(sys.argv[1:]))",
        *words,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not checkpoint_files(tmp_path / "run" / "checkpoints") and process.poll() is None:
        time.sleep(0.01)  # the first task is over
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 143, errors
    assert "told to end by SIGTERM" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "run" / "result.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert again.returncode == 0, again.stderr
    _same(tmp_path / "run", whole)


def test_the_kill_test_covers_every_method_with_evaluations_inside_tasks():
    from cl_plugins.recipes import recipe_names

    for method in recipe_names():
        settings = kill_test._settings(method)
        assert settings["eval_every"] % settings["save_every_steps"], "a save would hide each row from the kills"
        assert settings["drift"]
        module = importlib.import_module("cl_plugins.recipes").load_recipe(method, settings["scenario"])
        classes = [getattr(importlib.import_module("cl_plugins.callbacks"), c["class"]) for c in module.callbacks]
        modality = "image" if settings["scenario"] == "split-digits" else "image-text"
        assert all(modality in c.modalities for c in classes), f"{method} cannot run on {settings['scenario']}"


def _change(folder, name, before, after):
    path = next(folder.glob(name))
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def test_the_kill_test_sees_each_difference(tmp_path):
    options = {"eval_every": 3, "drift": True, "data": {"validation_fraction": 0.9}}
    _run(tmp_path / "a", **options)
    assert kill_test.differences(tmp_path / "a", tmp_path / "a") == []
    changes = {
        "inside": ("result.json", '"inside_tasks": {', '"inside_tasks": {"extra": 1,', ".inside_tasks.extra"),
        "drift": ("result.json", '"drift": [', '"drift": [{"after": 9},', ".drift.0.after"),
        "store": ("events.0.*.jsonl", '"kind":"mid"', '"kind":"lost"', "inside.0"),
        "figures": ("events.0.*.jsonl", '"kind":"plug"', '"kind":"lost"', "of the run store differs"),
        "clock": ("result.json", '"wall_seconds": ', '"wall_seconds": 1', None),
    }
    for name, (file, before, after, text) in changes.items():
        shutil.copytree(tmp_path / "a", tmp_path / name)
        _change(tmp_path / name, file, before, after)
        found = kill_test.differences(tmp_path / name, tmp_path / "a")
        assert bool(found) == (text is not None), (name, found)
        assert text is None or any(text.lstrip(".") in f for f in found), (name, found)


def _in_a_process(folder, *lines):
    """Run lines that find the kill test as ``k``, the folder as ``root``; it forks, and so wants no threads."""
    start = "import sys; from pathlib import Path; from cl_plugins import kill_test as k; root = Path(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([start, *lines]), str(folder)], capture_output=True, text=True, timeout=600,
        check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_fills_a_cache_goes_on(tmp_path):
    _in_a_process(
        tmp_path,
        "assert k._wait(k._start('lst', root / 'a')) == 0",
        "for count in (1, 3, 8): assert k._wait(k._start('lst', root / 'b', k.CACHING, count)) == -9",
        "assert any((root / 'b' / 'cache').iterdir())",
        "assert k._wait(k._start('lst', root / 'b')) == 0",
        "found = k.differences(root / 'b', root / 'a'); assert not found, found",
    )


@pytest.mark.slow
def test_a_kill_test_without_a_kill_proves_nothing(tmp_path):
    _in_a_process(
        tmp_path,
        "found = k.kill_method('nearest-mean', 1, root, per_run=0).differences",
        "assert found == ['no process was killed: none of the moments came'], found",
    )


@pytest.mark.slow
def test_a_head_epoch_goes_on_after_a_second_stop(tmp_path):
    _in_a_process(
        tmp_path,
        "from cl_plugins.callbacks import ForgettingTracker as T",
        "k.aim = lambda name, count: k._kill_at(count, (T, name))",
        "assert k._wait(k._start('ovor', root / 'a')) == 0",
        "assert k._wait(k._start('ovor', root / 'b', 'on_train_epoch_end', 2)) == -9",  # behind task 0's last step
        "assert k._wait(k._start('ovor', root / 'b', 'on_before_backward', 7)) == -9",  # in task 1's head epoch
        "assert k._wait(k._start('ovor', root / 'b')) == 0",
        "found = k.differences(root / 'b', root / 'a'); assert not found, found",
    )
