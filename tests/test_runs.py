"""The run store: nothing complete is lost, nothing torn is read, names stay names."""

import json
import mmap
import os
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_plugins.run_writer import SCHEMA, encode_event
from cl_plugins.runs import RunWriter, read_run, read_runs


def lines(writer):
    return [json.loads(line) for line in writer.path.read_text().splitlines()]


def write_rows(writer, n, start=0):
    for i in range(start, n):
        writer.write("row", after=i, correct=[8] * (i + 1), total=[10] * (i + 1))


def test_a_run_comes_back_as_it_was_written(tmp_path):
    with RunWriter(tmp_path, "a") as writer:
        writer.write("run", method="ovor", scenario="split-digits", seed=3, order_seed=None)
        for j in range(3):
            writer.write("task", index=j, name=f"digits {j}", classes=(2 * j, 2 * j + 1))
        writer.write("row", after=-1, correct=[1, 2, None], total=[10, 10, None])
        writer.write("row", after=0, correct=[9], total=[10])
        writer.write("row", after=1, correct=[7, 8, None], total=torch.tensor([10, 10, 10]))
        writer.write("plug", name="mora/routing", value=np.eye(2), task=1)
        writer.write("cost", task=1, train_seconds=2.5)
        writer.write("cost", task=1, trainable=7)
        writer.write("conf", after=1, counts=[[1, 2], [3, 4]])
        writer.write("alert", text="old task fell", task=0)
        writer.write("weather", sky="blue")
        writer.write("end", status="finished")
    run = read_run(tmp_path / "a")
    assert (run.id, run.meta["method"], run.meta["seed"], run.ended) == ("a", "ovor", 3, "finished")
    assert [t.name for t in run.tasks] == ["digits 0", "digits 1", "digits 2"]
    assert run.tasks[1].classes == (2, 3)
    assert run.correct.tolist() == [[9, -1, -1], [7, 8, -1]]
    assert run.total.tolist() == [[10, -1, -1], [10, 10, -1]]
    assert run.correct.dtype == np.int64
    assert run.initial.tolist() == [[1, 2, -1], [10, 10, -1]]
    assert run.learned_at == [0, 1, 2]
    assert run.accuracy_matrix[1, :2].tolist() == [0.7, 0.8]
    assert run.accuracy_matrix[0, 1].isnan()
    assert run.plug[0]["value"] == [[1, 0], [0, 1]]
    assert run.cost == {1: {"task": 1, "train_seconds": 2.5, "trainable": 7}}
    assert run.confusion[1].tolist() == [[1, 2], [3, 4]]
    assert run.alerts[0]["text"] == "old task fell"
    assert run.other[0]["sky"] == "blue"
    assert run.problems == []


def test_an_event_is_one_line_of_valid_json_without_nan(tmp_path):
    with RunWriter(tmp_path) as writer:
        writer.write(
            "mid", loss=float("nan"), top=[1.0, float("-inf")], text="line\nbreak \u2028 \ud800", nested={1: np.nan}
        )
        content = writer.path.read_bytes()
    assert content.count(b"\n") == 2
    event = json.loads(content.splitlines()[1], parse_constant=pytest.fail)
    assert event["kind"] == "mid"
    assert event["loss"] is None
    assert event["top"] == [1.0, None]
    assert event["nested"] == {"1": None}
    assert event["text"] == "line\nbreak \u2028 \ud800"
    assert event["schema"] == SCHEMA


def test_arrays_and_unusual_values_become_plain():
    event = {
        "a": torch.tensor([1.0, torch.nan]),
        "b": {3, 1},
        "c": np.float32(0.5),
        "d": (1, (2,)),
        "e": 2 + 1j,
        (1, 2): 1,
    }
    assert json.loads(encode_event(event)) == {
        "a": [1.0, None],
        "b": [1, 3],
        "c": 0.5,
        "d": [1, [2]],
        "e": "(2+1j)",
        "(1, 2)": 1,
    }


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "", " ", ".hidden", "..", "a\0b", "a\nb", "x" * 201])
def test_a_name_is_never_a_path(tmp_path, name):
    with pytest.raises(ValueError, match=r"`run_id` must be a name .* use '"):
        RunWriter(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


def test_names_of_any_script_are_fine(tmp_path):
    with RunWriter(tmp_path, "ΟVOR, 種 0 <b>") as writer:
        writer.write("run", method="x")
    assert read_runs(tmp_path)[0].id == "ΟVOR, 種 0 <b>"


def test_wrong_arguments_say_what_is_expected(tmp_path):
    with pytest.raises(TypeError, match="`run_id` must be text, got 3"):
        RunWriter(tmp_path, 3)
    with pytest.raises(ValueError, match="`rank` must be an integer of 0 or more, got -1"):
        RunWriter(tmp_path, "a", rank=-1)
    writer = RunWriter(tmp_path, "a")
    writer.close()
    writer.close()
    with pytest.raises(RuntimeError, match="run 'a' is closed; open a new RunWriter"):
        writer.write("row")


def test_kill_9_loses_no_event_that_was_written(tmp_path):
    """The child counts in shared memory what `write` has accepted; all of it must be there, in order, nothing torn."""
    accepted = mmap.mmap(-1, 8)
    for attempt in range(20):
        accepted[:8] = bytes(8)
        child = os.fork()
        if child == 0:
            try:
                writer = RunWriter(tmp_path, f"run{attempt}")
                for i in range(10**6):
                    writer.write("count", step=i, text="x" * (37 * i % 2000))
                    accepted[:8] = (i + 1).to_bytes(8, "little")
            finally:
                os._exit(0)
        while int.from_bytes(accepted[:8], "little") < 5:
            time.sleep(0.001)
        time.sleep(0.0007 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        run = read_run(tmp_path / f"run{attempt}")
        steps = [e["step"] for e in run.other]
        assert len(steps) >= int.from_bytes(accepted[:8], "little") >= 5
        assert steps == list(range(len(steps)))
        assert run.problems == []
        with RunWriter(tmp_path, f"run{attempt}") as resumed:  # the killed process holds nothing
            assert resumed.segment == 1


def test_a_torn_last_line_is_dropped_and_other_damage_is_reported(tmp_path):
    with RunWriter(tmp_path, "a") as writer:
        write_rows(writer, 3)
        path = writer.path
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    run = read_run(tmp_path / "a")
    assert run.correct.shape[0] == 2
    assert run.problems == []
    path.write_bytes(whole.replace(b'"after":1', b'"after":1"\xff'))
    run = read_run(tmp_path / "a")
    assert run.total[1].tolist() == [-1, -1, -1]
    assert run.total[2].tolist() == [10, 10, 10]
    assert run.problems == ["events.0.0.jsonl: 1 damaged line left out"]


def test_a_resumed_run_goes_on_in_a_new_file_and_later_rows_win(tmp_path):
    with RunWriter(tmp_path, "a") as writer:
        writer.write("run", method="m", from_task=0)
        write_rows(writer, 4)
        writer.write("plug", name="x", task=0, value=1)
        writer.write("plug", name="x", task=3, value=3)
    before = writer.path.read_bytes()
    with RunWriter(tmp_path, "a") as writer:
        assert writer.path.name == "events.0.1.jsonl"
        writer.write("run", from_task=2)
        writer.write("row", after=2, correct=[1, 1, 1], total=[10, 10, 10])
    assert (tmp_path / "a" / "events.0.0.jsonl").read_bytes() == before
    run = read_run(tmp_path / "a")
    assert run.meta["method"] == "m"
    assert run.correct[:, 0].tolist() == [8, 8, 1]  # what the first start knew of tasks 2 and 3 no longer counts
    assert [e["task"] for e in run.plug] == [0]


def test_a_fresh_start_under_an_old_name_shows_nothing_old(tmp_path):
    with RunWriter(tmp_path, "a") as writer:
        writer.write("run", method="old", lr=1, from_task=0)
        writer.write("row", after=-1, correct=[1], total=[10])
        write_rows(writer, 4)
        writer.write("end", status="finished")
    with RunWriter(tmp_path, "a") as writer:
        writer.write("run", method="new", from_task=0)
        write_rows(writer, 1)
    run = read_run(tmp_path / "a")
    assert run.meta == {"method": "new"}
    assert run.correct.shape == (1, 1)
    assert run.initial is None
    assert run.ended is None


def test_two_writers_of_one_run_are_refused_with_the_way_out(tmp_path):
    with RunWriter(tmp_path, "a") as writer:
        with pytest.raises(
            RuntimeError, match=rf"written by another process \(process {os.getpid()} on .*own `run_id`"
        ):
            RunWriter(tmp_path, "a")
        writer.write("row", after=0, correct=[1], total=[2])
        with RunWriter(tmp_path, "a", rank=1) as other:
            other.write("row", after=0, correct=[2], total=[3])
    run = read_run(tmp_path / "a")
    assert (run.correct.tolist(), run.total.tolist()) == ([[3]], [[5]])  # ranks hold shares, which are added


def test_processes_that_start_at_once_get_one_file_each(tmp_path):
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                with RunWriter(tmp_path, "a") as writer:
                    for i in range(200):
                        writer.write("count", step=i, pid=os.getpid())
                    time.sleep(0.05)
                code = 0
            except RuntimeError:
                code = 7
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, 7}
    events = read_run(tmp_path / "a").other
    assert len(events) == 200 * codes.count(0) > 0
    for pid in {e["pid"] for e in events}:
        assert [e["step"] for e in events if e["pid"] == pid] == list(range(200))


def test_a_newer_format_is_named_and_shown_as_far_as_it_goes(tmp_path):
    with RunWriter(tmp_path, "a") as writer:
        write_rows(writer, 2)
    with writer.path.open("a") as file:
        file.write(json.dumps({"schema": SCHEMA + 1, "kind": "hologram", "x": 1}) + "\n")
    run = read_run(tmp_path / "a")
    assert run.correct.shape == (2, 2)
    assert run.other[0]["kind"] == "hologram"
    assert f"format {SCHEMA + 1}, this version of cl-plugins reads format {SCHEMA}" in run.problems[0]
    assert "update cl-plugins" in run.problems[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"correct": [9], "total": [8]},
        {"correct": [-1], "total": [8]},
        {"correct": ["1"], "total": [8]},
        {"correct": [0.5], "total": [8]},
        {"correct": None, "total": [8]},
        {"correct": {"0": 1}, "total": [8]},
    ],
)
def test_a_malformed_row_is_left_out_and_named(tmp_path, fields):
    with RunWriter(tmp_path, "a") as writer:
        writer.write("row", after=0, correct=[1], total=[8])
        writer.write("row", after=1, **fields)
    run = read_run(tmp_path / "a")
    assert run.total.tolist() == [[8], [-1]]
    assert run.problems == ["the row after task 1 is malformed and left out"]


def test_missing_and_empty_folders(tmp_path):
    assert read_runs(tmp_path) == []
    with pytest.raises(FileNotFoundError, match="`root` must be a folder of runs"):
        read_runs(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="found none in"):
        read_run(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "events.0.0.jsonl").touch()
    assert read_runs(tmp_path)[0].correct.shape == (0, 0)


def test_runs_are_found_at_any_depth_but_not_replaced_ones(tmp_path):
    for folder in (tmp_path, tmp_path / "deep" / "er", tmp_path / "deep" / "previous-1"):
        RunWriter(folder, "a").close()
    assert [r.path.parent.name for r in read_runs(tmp_path)] == [tmp_path.name, "er"]
    assert len(read_runs(tmp_path / "a")) == 1  # a run's own folder is a folder of one run


def test_an_event_is_one_line_in_one_write(tmp_path, monkeypatch):
    written, write = [], os.write
    monkeypatch.setattr(os, "write", lambda file, data: written.append(bytes(data)) or write(file, data))
    with RunWriter(tmp_path, "a") as writer:
        before = len(written)
        for i in range(5):
            writer.write("mid", task=3, step=i, correct=[1, 2, 3], loss=0.5)
        assert [line.count(b"\n") for line in written[before:]] == [1] * 5


def test_a_thousand_tasks_are_read_and_stay_small(tmp_path):
    with RunWriter(tmp_path, "a") as writer:
        for i in range(1000):
            writer.write("row", after=i, correct=[90] * (i + 1), total=[100] * (i + 1))
    assert writer.path.stat().st_size < 5e6
    assert read_run(tmp_path / "a").correct.shape == (1000, 1000)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def without_nan(value):
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, list):
        return [without_nan(v) for v in value]
    return {k: without_nan(v) for k, v in value.items()} if isinstance(value, dict) else value


@settings(max_examples=60, deadline=None)
@given(fields=st.dictionaries(st.text(), PLAIN, max_size=4))
def test_any_plain_value_comes_back(tmp_path_factory, fields):
    fields = {k: v for k, v in fields.items() if k not in ("kind", "schema", "time")}
    with RunWriter(tmp_path_factory.mktemp("r"), "a") as writer:
        writer.write("custom", **fields)
    (event,) = read_run(writer.folder).other
    assert {k: v for k, v in event.items() if k not in ("kind", "schema", "time")} == without_nan(fields)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), tasks=st.integers(1, 5), rows=st.integers(0, 5))
def test_any_matrix_of_counts_comes_back(tmp_path_factory, data, tasks, rows):
    total = data.draw(
        st.lists(st.lists(st.none() | st.integers(0, 9), min_size=tasks, max_size=tasks), min_size=rows, max_size=rows)
    )
    with RunWriter(tmp_path_factory.mktemp("r"), "a") as writer:
        for j in range(tasks):
            writer.write("task", index=j)
        for i, row in enumerate(total):
            writer.write("row", after=i, correct=[None if n is None else n // 2 for n in row], total=row)
    run = read_run(writer.folder)
    expected = np.array([[-1 if n is None else n for n in row] for row in total]).reshape(rows, tasks)
    assert np.array_equal(run.total, expected)
    assert np.array_equal(run.correct, np.where(expected < 0, -1, expected // 2))
