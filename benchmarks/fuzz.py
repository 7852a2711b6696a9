"""Random and broken input for everything that reads: only clear errors, no hang, nothing partial taken for whole.

    python benchmarks/fuzz.py --seconds 60             # counts the inputs; ends with 1 when one was handled badly
    python benchmarks/fuzz.py --only checkpoint --seed 7 --inputs 1   # one input again

A clear error is one that this library raises itself, in words, or says that a file cannot be read. What comes out of
the depths of a library or of Python is none, even when the command line would print it nicely.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import linecache
import math
import os
import random
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))
from cl_plugins import cli
from cl_plugins.adapters.adapter_set import read_adapters
from cl_plugins.callbacks import LoRA
from cl_plugins.check import check_report, read_matrix
from cl_plugins.compare import collect_results, comparison_text
from cl_plugins.comparison import compare_methods
from cl_plugins.inside_tasks import InsideRow
from cl_plugins.plugin import Row
from cl_plugins.report import render_report
from cl_plugins.report.comparison import render_comparison
from cl_plugins.runs import read_run
from cl_plugins.scenarios.text_data import read_coin, read_jsonl, read_trace
from cl_plugins.stream_state import KEY, StreamState, random_states, rows_to_state

ROOT = Path(__file__).parent.parent
HANG_SECONDS = 20
_OURS = tuple(str(ROOT / part) + os.sep for part in ("cl_plugins", "callbacks", "scenarios"))
_WORDS = [
    "",
    "-",
    "--",
    "a",
    "0",
    "-1",
    "1e400",
    "nan",
    "ä",
    "\x00",
    "../..",
    "/",
    "a=b",
    "=",
    "lr=",
    "lr=x",
    "{",
    "[1",
    "null",
    "true",
    "~",
    "&a *a",
    "!!python/object:os.system x",
    "9" * 400,
    "\u202e",
    "%s",
    "{}",
    "\ud800",
]


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The bytes with a few faults: flipped, cut, doubled, dropped or replaced parts."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(out))
        width = rng.choice((1, 1, 2, 8, 64))
        kind = rng.randint(0, 5)
        if kind == 0 and out:
            out[min(at, len(out) - 1)] ^= 1 << rng.randint(0, 7)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            out[at:at] = out[at : at + width]
        elif kind == 3:
            del out[at : at + width]
        elif kind == 4:
            out[at : at + width] = bytes(rng.randint(0, 255) for _ in range(width))
        else:
            out[at : at + width] = rng.choice(_WORDS).encode("utf-8", "surrogatepass")
    return bytes(out)


def value(rng: random.Random, depth: int = 2) -> Any:
    """Any JSON value."""
    kind = rng.randint(0, 11 if depth else 8)
    if kind < 9:
        return [None, True, rng.randint(-3, 9), 1e308, -0.5, 10**30, math.nan, math.inf, rng.choice(_WORDS[:-1])][kind]
    if kind == 9:
        return {rng.choice(("name", "task", "", "kind")): value(rng, depth - 1) for _ in range(rng.randint(0, 3))}
    return [value(rng, depth - 1) for _ in range(rng.randint(0, 3))]


def spoil(record: Any, rng: random.Random) -> Any:
    """A JSON structure with one value replaced, left out or nested."""
    if isinstance(record, dict) and record and rng.random() < 0.8:
        key = rng.choice(sorted(record))
        if rng.random() < 0.2:
            return {k: v for k, v in record.items() if k != key}
        return {**record, key: spoil(record[key], rng)}
    if isinstance(record, list) and record and rng.random() < 0.8:
        at = rng.randrange(len(record))
        return [*record[:at], spoil(record[at], rng), *record[at + 1 :]]
    return value(rng)


INSIDE = InsideRow(5, 1, 1, 2, (0, 1), (1, 2), (4, 4), (2, 3), 5, False, False)
EVENTS: list[dict[str, Any]] = [
    {"schema": 1, "kind": "run", "time": 1.0, "method": "lora", "scenario": "digits", "seed": 0, "from_task": 0},
    *[{"schema": 1, "kind": "task", "index": i, "name": f"t{i}", "classes": [i], "class_names": ["c"]} for i in (0, 1)],
    {
        "schema": 1,
        "kind": "row",
        "time": 2.0,
        "after": 0,
        "correct": [3],
        "total": [4],
        "correct_in_task": [4],
        "seconds": 1,
    },
    {"schema": 1, "kind": "cost", "task": 0, "train_seconds": 1.5, "parameters": {"model": 3}, "peak_bytes": 9},
    {"schema": 1, "kind": "conf", "after": 1, "counts": [[3, 1], [0, 4]]},
    {"schema": 1, "kind": "plug", "name": "ovor/loss", "task": 0, "x": [0, 1], "value": [0.5, 0.25]},
    {
        "schema": 1,
        "kind": "row",
        "time": 3.0,
        "after": 1,
        "correct": [2, 4],
        "total": [4, 4],
        "correct_in_task": [4, 4],
        "labels": {
            "classes": [0, 1],
            "average_precision": [0.5, None],
            "true_positives": [1, 0],
            "predicted": [2, 0],
            "present": [1, 0],
        },
    },
    {"schema": 1, "kind": "mid", **INSIDE.to_dict()},
    {"schema": 1, "kind": "plug", "name": "drift/effective rank", "task": 1, "value": 2.5},
    {
        "schema": 1,
        "kind": "plug",
        "name": "drift/calibration drift per task",
        "task": 1,
        "x": [0],
        "values": [0.25],
    },
    {"schema": 1, "kind": "alert", "task": 0, "after": 1, "text": "fell"},
    {"schema": 1, "kind": "end", "time": 4.0, "status": "finished"},
]
RESULT = {
    "method": "lora",
    "scenario": "digits",
    "seed": 0,
    "average_accuracy": 0.75,
    "average_incremental_accuracy": 0.75,
    "forgetting": 0.25,
    "map": 0.5,
    "train_seconds": 1.0,
    "accuracy_matrix": [[0.75, None], [0.5, 1.0]],
    "learned_at": [0, 1],
    "correct": [[3, None], [2, 4]],
    "total": [[4, None], [4, 4]],
    "tasks": [{"index": 0, "name": "a", "classes": [0]}],
}


def _json_bytes(record: Any, rng: random.Random) -> bytes:
    data = json.dumps(spoil(record, rng) if rng.random() < 0.7 else record).encode()
    return mutate(data, rng) if rng.random() < 0.6 else data


def fuzz_run_store(rng: random.Random, folder: Path) -> None:
    """Event files; a run is finished only when its last event is whole, and damage is told."""
    lines = [json.dumps(spoil(e, rng) if rng.random() < 0.3 else e).encode() for e in EVENTS]
    data = b"\n".join(lines) + b"\n"
    whole = not (cut := rng.random() < 0.3)
    data = data[: rng.randint(0, len(data))] if cut else mutate(data, rng) if rng.random() < 0.6 else data
    (folder / "events.0.0.jsonl").write_bytes(data)
    run = read_run(folder)
    assert run.correct.shape == run.total.shape
    assert (run.correct <= run.total).all(), "more correct than there are"
    if not whole and not data.endswith(b"\n"):
        kinds = [json.loads(line).get("kind") for line in data.split(b"\n")[:-1] if line.startswith(b'{"')]
        assert run.ended is None or "end" in kinds, "a torn run passes for a finished one"
    broken = sum(not _loads(line) for line in data.split(b"\n")[:-1] if line.strip())
    assert not broken or run.problems, "damaged lines were left out without a word"
    if rng.random() < 0.2:  # most of the time goes here
        assert render_report([run], None).rstrip().endswith("</html>"), "the page has no end"


def _loads(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def fuzz_result(rng: random.Random, folder: Path) -> None:
    """``result.json`` for the tables and for ``cl-bench check``."""
    path = folder / "result.json"
    path.write_bytes(_json_bytes(RESULT, rng))
    if rng.random() < 0.5:
        results = collect_results([folder, folder])
        comparison = compare_methods(results)
        comparison_text(results, comparison, rng.choice(("text", "csv", "json", "latex", "markdown")))
        assert render_comparison(results, comparison).rstrip().endswith("</html>"), "the page has no end"
    else:
        check_report(read_matrix(path), {"forgetting": 0.25})


def fuzz_csv(rng: random.Random, folder: Path) -> None:
    """Matrices for ``cl-bench check``."""
    path = folder / "m.csv"
    cells = ["0.5", "", "nan", "97.1%", "a", "1e999", "-", *_WORDS[:6]]
    rows = [",".join(rng.choices(cells, k=rng.randint(1, 4))) for _ in range(rng.randint(0, 4))]
    data = "\n".join(rows).encode() if rng.random() < 0.5 else b"task,a,b\nafter a,0.9,\nafter b,0.5,0.8\n"
    path.write_bytes(mutate(data, rng) if rng.random() < 0.7 else data)
    check_report(read_matrix(path), {"forgetting": 0.4, "average_accuracy": 0.65})


def fuzz_texts(rng: random.Random, folder: Path) -> None:
    """Text tasks: our lines, TRACE and CoIN."""
    records: list[Any] = [
        {"instruction": "Add", "input": "1 2", "output": "3"},
        {"prompt": "Add\n1 2", "answer": "3"},
        {"text": "What?\nAnswer.", "answer": "a", "image": "x.png"},
        {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]},
    ]
    reader = rng.choice((read_jsonl, read_trace, read_coin))
    chosen = [spoil(r, rng) if rng.random() < 0.4 else r for r in rng.choices(records, k=rng.randint(0, 3))]
    lines = "\n".join(map(json.dumps, chosen)) if reader is read_jsonl else json.dumps(chosen)
    path = folder / "train.json"
    path.write_bytes(mutate(lines.encode(), rng) if rng.random() < 0.5 else lines.encode())
    examples = reader(path)
    assert examples
    assert all(e.instruction.strip() and e.output.strip() for e in examples)


class _Stream:
    """What a checkpoint is compared with."""

    name, tasks, n_classes = "digits", (), 2


def _rows(rng: random.Random) -> dict[str, Any]:
    """Rows of a stream as checkpoints hold them; in every second one a part is something else."""
    counts, confusion = (3, None), ((2, 1), (0, 0)) if rng.random() < 0.5 else ()
    rows = rows_to_state([Row(n, counts, (4, None), counts, confusion, 0.5) for n in range(rng.randint(0, 2))])
    if rng.random() < 0.5:
        part = rng.choice((rows, rows["confusion"]))
        part[rng.choice(sorted(part))] = rng.choice((value(rng), torch.zeros(rng.randint(0, 3)), torch.tensor(1)))
    return rows


def _checkpoint(rng: random.Random) -> bytes:
    state: dict[str, Any] = {
        "task": 0,
        "stream": {"name": "digits", "tasks": []},
        "rows": _rows(rng),
        "initial": _rows(rng),
        "train_seconds": [],
        "random": random_states(),
    }
    record: Any = {"state_dict": {"w": torch.zeros(2)}, "callbacks": {KEY: state}, "epoch": 1}
    if rng.random() < 0.5:
        state[rng.choice(sorted(state))] = value(rng)
    if rng.random() < 0.2:
        record = rng.choice((value(rng), [record], {"callbacks": value(rng)}, {"callbacks": {KEY: value(rng)}}))
    file = io.BytesIO()
    torch.save(record, file)
    return file.getvalue()


def fuzz_checkpoint(rng: random.Random, folder: Path) -> None:
    """Checkpoints that a stream is to go on from."""
    path = folder / "last.ckpt"
    data = _checkpoint(rng)
    path.write_bytes(mutate(data, rng) if rng.random() < 0.7 else data)
    state = StreamState()
    from cl_plugins.result import StreamResult

    state.begin(_Stream(), StreamResult([]))
    saved, _ = state.read(path)
    assert isinstance(saved["task"], int)
    assert isinstance(saved["rows"], dict)


_ADAPTERS: list[bytes] = []


def fuzz_adapters(rng: random.Random, folder: Path) -> None:
    """Adapter files."""
    path = folder / "a.safetensors"
    if not _ADAPTERS:
        from cl_plugins.backbones import vit_glyph

        net, method = vit_glyph(num_classes=2), LoRA(1, targets=["fc1"])
        method.install(net)
        method.export_adapters(net, path)
        _ADAPTERS.append(path.read_bytes())
    path.write_bytes(mutate(_ADAPTERS[0], rng) if rng.random() < 0.5 else _mutated_header(_ADAPTERS[0], rng))
    read_adapters(path, "lora")


def _mutated_header(data: bytes, rng: random.Random) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["__metadata__"]["cl_plugins"] = json.dumps(spoil(json.loads(header["__metadata__"]["cl_plugins"]), rng))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


_FLAGS = [
    "--method",
    "--scenario",
    "--seed",
    "--order-seed",
    "--epochs",
    "--device",
    "--out",
    "--set",
    "--data",
    "--quiet",
    "--config",
    "--value",
    "--tolerance",
    "--format",
    "--out",
    "-o",
    "--port",
    "--help",
    "--nonsense",
]
_VALUES = [
    "ovor",
    "lora",
    "finetune",
    "split-digits",
    "split-glyphs",
    "lr=1",
    "epochs=x",
    "lr=[1",
    "OVOR.head_epochs=2",
    "outliers.noise_scale=",
    "batch_size=-1",
    "forgetting=0.1",
    "text",
    "csv",
    *_WORDS,
]


def fuzz_command_line(rng: random.Random, folder: Path) -> None:
    """Words and flags; ``run`` always ends at its device, so that nothing is trained, and ``serve`` has no folder."""
    (folder / "run").mkdir()
    (folder / "run" / "events.0.0.jsonl").write_bytes(b"\n".join(json.dumps(e).encode() for e in EVENTS) + b"\n")
    (folder / "run" / "result.json").write_bytes(
        _json_bytes(RESULT, rng) if rng.random() < 0.3 else json.dumps(RESULT).encode()
    )
    command = rng.choice(("run", "run", "list", "report", "compare", "check", "serve", *_WORDS))
    places = [str(folder / "run"), str(folder / "run" / "result.json"), str(folder / "none")]
    words = [command]
    if command == "run" and rng.random() < 0.7:
        words += ["--method", rng.choice(("ovor", "lora")), "--scenario", "split-digits"]
    if command in ("report", "compare", "check") and rng.random() < 0.8:
        words.append(rng.choice(places))
    for _ in range(rng.randint(0, 4)):
        words += [rng.choice(_FLAGS), rng.choice(_VALUES)][: rng.randint(1, 2)]
    words += {"run": ["--device", "nonsense"], "serve": [str(folder / "none")]}.get(command, [])
    _command(words, folder)


def fuzz_config(rng: random.Random, folder: Path) -> None:
    """Configuration files of ``cl-bench run``."""
    config = {
        "method": "ovor",
        "scenario": "split-digits",
        "seed": 0,
        "epochs": 2,
        "set": ["lr=0.1"],
        "out": str(folder / "x"),
    }
    data = yaml.safe_dump(spoil(config, rng) if rng.random() < 0.7 else config).encode()
    path = folder / "config.yaml"
    path.write_bytes(mutate(data, rng) if rng.random() < 0.6 else data)
    _command(["run", "--config", str(path), "--device", "nonsense"], folder)
    assert not (folder / "x").exists(), "a refused run left a folder"


def _command(words: list[str], folder: Path) -> None:
    """``cl-bench`` inside the folder; its output goes nowhere and errors come out."""
    before = Path.cwd()
    os.chdir(folder)
    os.environ["CL_BENCH_TRACEBACK"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            status = cli.main(words)
        assert isinstance(status, int)
    except SystemExit as end:
        if end.code not in (0, 1, 2, None):
            raise AssertionError(f"exit status {end.code!r}") from end
    finally:
        os.chdir(before)
        del os.environ["CL_BENCH_TRACEBACK"]


TARGETS: dict[str, Callable[[random.Random, Path], None]] = {
    "run store": fuzz_run_store,
    "result": fuzz_result,
    "csv": fuzz_csv,
    "texts": fuzz_texts,
    "checkpoint": fuzz_checkpoint,
    "adapters": fuzz_adapters,
    "command line": fuzz_command_line,
    "config": fuzz_config,
}


def clear(error: BaseException) -> bool:
    """Whether an error was raised in words by this library, or says that the system could not open a file."""
    if isinstance(error, OSError) and error.filename is not None:
        return True
    if not isinstance(error, ValueError | TypeError | RuntimeError | OSError):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    source = linecache.getline(last.filename, last.lineno or 0).strip()
    return last.filename.startswith(_OURS) and source.startswith("raise ")


@contextlib.contextmanager
def _no_hang() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise AssertionError(f"no answer within {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANG_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attempt(name: str, rng: random.Random) -> bool:
    """Try one input; True when it was taken, False when it was refused clearly.

    Raises:
        Exception: what is neither.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), _no_hang():
        warnings.simplefilter("ignore")
        try:
            TARGETS[name](rng, Path(folder))
        except Exception as error:  # judged next
            if not clear(error):
                raise
            return False
        return True


def main() -> int:
    """Try inputs until the time is over and print the counts; the exit status says whether all went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--inputs", type=int, default=None, help="stop after so many of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts = {name: [0, 0, 0] for name in arguments.only}
    seen: set[tuple[str, str]] = set()
    spent = dict.fromkeys(arguments.only, 0.0)
    end, seed = time.monotonic() + arguments.seconds, arguments.seed
    while time.monotonic() < end:
        name = min(arguments.only, key=spent.__getitem__)  # equal time for each kind
        if arguments.inputs is not None and min(sum(c) for c in counts.values()) >= arguments.inputs:
            break
        number = arguments.seed + sum(counts[name])
        started = time.monotonic()
        try:
            counts[name][0 if attempt(name, random.Random(number)) else 1] += 1
        except Exception as error:  # counted and told; the exit status is 1
            counts[name][2] += 1
            last = traceback.extract_tb(error.__traceback__)
            ours = [f for f in last if f.filename.startswith(_OURS)]
            where = f"{Path((ours or last)[-1].filename).name}:{(ours or last)[-1].lineno}"
            if (name, f"{where} {type(error).__name__}") not in seen:
                seen.add((name, f"{where} {type(error).__name__}"))
                print(f"{name}, seed {number}: {where} {type(error).__name__}: {str(error)[:160]}", flush=True)
        spent[name] += time.monotonic() - started
    for name, (taken, refused, bad) in counts.items():
        print(f"{name:14}{taken + refused + bad:8} inputs, {taken:7} taken, {refused:7} refused, {bad:5} handled badly")
    print(f"{'all':14}{sum(map(sum, counts.values())):8} inputs from seed {seed}")
    return int(any(c[2] for c in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
