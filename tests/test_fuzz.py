"""Random and broken input, a short form of ``benchmarks/fuzz.py``, and what it found."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import EVENTS, RESULT, TARGETS, attempt, clear
from cl_plugins import cli
from cl_plugins._reading import load_tensors, read_json
from cl_plugins.check import read_matrix
from cl_plugins.compare import collect_results
from cl_plugins.runs import read_run
from cl_plugins.stream_state import KEY, StreamState
from tests._helpers import tiny_stream

_QUICK = [n for n in TARGETS if n not in ("command line", "config")]


@pytest.mark.parametrize("name", _QUICK)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_input_of_any_kind(name, rng):
    attempt(name, rng)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_more_input_of_any_kind(name, rng):
    attempt(name, rng)


def test_only_errors_in_our_words_are_clear():
    def caught(action):
        try:
            action()
        except Exception as error:
            return error
        raise AssertionError("nothing was raised")

    assert clear(caught(lambda: read_matrix("nowhere.csv")))
    assert clear(caught(lambda: read_run("tests")))
    assert not clear(caught(lambda: json.loads("{")))
    assert not clear(caught(lambda: {}["a"]))
    assert not clear(caught(lambda: (_ for _ in ()).throw(ValueError("raised elsewhere"))))


def test_a_run_cut_anywhere_is_never_taken_for_whole(tmp_path):
    lines = [json.dumps(e).encode() + b"\n" for e in EVENTS]
    data = b"".join(lines)
    path = tmp_path / "events.0.0.jsonl"
    for cut in range(0, len(data), 7):
        path.write_bytes(data[:cut])
        run = read_run(tmp_path)
        whole = data[:cut].count(b"\n")
        assert run.ended is None
        assert len(run.correct) == sum(e["kind"] == "row" for e in EVENTS[:whole])
    path.write_bytes(data)
    assert read_run(tmp_path).ended == "finished"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xff{}", "must be UTF-8 text, got byte 0"),
        (b'{"a": 1', "must be JSON, got Expecting"),
        (b"[" * 100_000, "must be JSON, got"),
        (b"1" * 5000, "must be JSON, got"),
    ],
)
def test_json_that_is_none(tmp_path, content, text):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=text):
        read_json(path)


@pytest.mark.parametrize("matrix", [[[0.5], []], [[1.5]], [["a"]], [None], [[True]], [[-0.1]], [[float("inf")]]])
def test_matrices_that_are_none(tmp_path, matrix):
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**RESULT, "accuracy_matrix": matrix}))
    with pytest.raises(ValueError, match=r"`accuracy_matrix` in .* must be rows of numbers from 0 to 1"):
        read_matrix(path)


@pytest.mark.parametrize("number", ["0.5", [1], math.inf, True])
def test_results_with_faulty_numbers(tmp_path, number):
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**RESULT, "forgetting": number}))
    with pytest.raises(ValueError, match=r"`forgetting` in .* must be a finite number or null"):
        collect_results([tmp_path])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", pickle.dumps({"a": 1}), pickle.dumps(pytest.raises)])
def test_checkpoints_that_are_none(tmp_path, content):
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="must be a whole checkpoint of tensors and plain values"):
        load_tensors(path)
    torch.save({"w": torch.ones(2)}, path)
    whole = path.read_bytes()
    assert torch.equal(load_tensors(path)["w"], torch.ones(2))
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged or holds other objects"):
        load_tensors(path)


def test_a_configuration_file_that_is_no_text(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"method: \xff\n")
    assert cli.main(["run", "--config", str(path)]) == 2
    assert "must be UTF-8 text" in capsys.readouterr().err


def test_options_in_a_configuration_file_are_checked(tmp_path, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("method: ovor\nscenario: split-digits\nset: 3\n")
    assert cli.main(["run", "--config", str(path)]) == 1
    assert "`--set` must be a list of KEY=VALUE, got 3" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["after", "seconds", "counts", "confusion", "labels"])
@pytest.mark.parametrize("wrong", [torch.tensor(1), None, "x", {"rows": [0], "counts": torch.zeros(2, 1, 1)}], ids=str)
def test_rows_of_a_checkpoint_that_are_none_are_named(tmp_path, part, wrong):
    state = StreamState.for_stream(tiny_stream())
    content = state.state_dict()
    content["rows"] = {
        **content["rows"],
        "after": [0],
        "seconds": [0.1],
        "counts": torch.ones(1, 3, 3, dtype=torch.int64),
    }
    torch.save({"callbacks": {KEY: content}, "state_dict": {}}, tmp_path / "a.ckpt")
    assert len(state.read(tmp_path / "a.ckpt")[0]["rows"]["after"]) == 1
    content["rows"][part] = [wrong]
    torch.save({"callbacks": {KEY: content}, "state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="must hold the whole state of a stream, got one with a damaged `rows`"):
        state.read(tmp_path / "a.ckpt")
