"""The kill test: ``kill -9`` at many moments of a small stream, resume, and compare with the uninterrupted run.

    python -m cl_plugins.kill_test --methods ovor mora --kills 20 --out kills.json

One process imports everything and forks a child for each start, so a start costs no imports. A child runs what
``cl-bench run --resume`` runs. Every second kill is aimed, at the moments of :data:`AIMS`; the others come at a random
time. Methods that cache features keep them in a folder of the run, so that a start finds what a killed one had written.
Beside each method stand a ``ContinualEvaluation`` and a ``DriftTracker``. Compared are weights and buffers (bit for
bit), the states of all callbacks, all of ``result.json``, the rows of the run store, which must hold each row once, its
evaluations inside tasks and the figures of methods and observers, and the cached features; times of the clock aside.
Needs ``fork``: Linux or macOS.

A long test can be run in pieces: ``--add`` adds to what the file of ``--out`` holds, with other moments, and stops at
``--kills`` for each method; ``--seconds`` begins no new run after so much time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from cl_plugins import _cache_files, checkpoint_files, runner
from cl_plugins.benchmark import run_benchmark
from cl_plugins.recipes import load_recipe, recipe_names
from cl_plugins.result import write_json, write_text
from cl_plugins.run_writer import event_files
from cl_plugins.runs import read_run

AIMS = ("inside a batch", "while saving", "between tasks", "while growing", "while evaluating", "while reporting")
"""What the aimed kills hit."""

CACHING = "while filling a cache"
"""What they hit as well in methods that cache features."""

_SETTINGS: dict[str, Any] = {
    "scenario": "split-digits",
    "epochs": 2,
    "device": "cpu",
    "data": {"validation_fraction": 0.9},  # 28 training samples a task
    "options": {"batch_size": 8},
    "progress": False,
    "save_every_steps": 2,
    "eval_every": 3,  # other steps than the saves, so that a resume meets rows that no checkpoint knows
    "drift": True,
}

_OPTIONS: dict[str, dict[str, Any]] = {"ovor": {"head_epochs": 1}}  # must be fewer than the epochs
_OTHER_DATA: dict[str, dict[str, Any]] = {"zero-shot": {"scenario": "xtail-glyphs", "data": {}}}  # it needs texts


@dataclass
class Outcome:
    """What the kill test found for one method.

    Attributes:
        method: the recipe.
        kills: processes that were killed, by moment; ``"at random"`` for those without an aim.
        starts: processes in all, the uninterrupted one included.
        seconds: of the uninterrupted run.
        differences: what was not as in the uninterrupted run; empty is what it should be.
    """

    method: str
    kills: dict[str, int] = field(default_factory=dict)
    starts: int = 0
    seconds: float = 0.0
    differences: list[str] = field(default_factory=list)


def _kill_at(count: int, *functions: tuple[Any, str]) -> None:
    """Let this process kill itself at the ``count``-th call of the functions, each an owner and a name."""
    calls = [0]

    def arm(owner: Any, name: str) -> None:
        before = getattr(owner, name)

        def killing(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            if calls[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return before(*arguments, **options)

        setattr(owner, name, killing)

    for owner, name in functions:
        arm(owner, name)


def aim(moment: str, count: int) -> None:
    """Arm this process to die at a moment of :data:`AIMS`, or :data:`CACHING`, the ``count``-th time it comes.

    Raises:
        ValueError: for an unknown moment.
    """
    tracker = importlib.import_module("cl_plugins.callbacks").ForgettingTracker
    if moment == "inside a batch":
        _kill_at(count, (tracker, "on_before_backward"))
    elif moment == "while saving":  # three calls a save: file written, checksum written, renamed
        _kill_at(count, (checkpoint_files, "_sync"))
    elif moment == "between tasks":
        _kill_at((count + 1) // 2, (tracker, "on_row"))
    elif moment == "while growing":  # the method has grown, observers have not been told
        _kill_at((count + 2) // 3, (tracker, "on_task_start"))
    elif moment == "while evaluating":
        _kill_at((count + 1) // 2, (runner, "evaluate_tasks"))
    elif moment == CACHING:  # a batch of rows is written, the manifest is, and names are changed
        _kill_at(count, (_cache_files.EntryFile, "write"), (_cache_files, "_write_synced"))
    elif moment == "while reporting":
        write = Path.write_text

        def half(path: Path, text: str, *arguments: Any, **options: Any) -> int:
            if "report" not in path.name:
                return write(path, text, *arguments, **options)
            write(path, text[: len(text) // 2], *arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

        paths: Any = Path
        paths.write_text = half
    else:
        raise ValueError(f"`moment` must be one of {', '.join((*AIMS, CACHING))}, got {moment!r}")


def _settings(method: str) -> dict[str, Any]:
    """What ``run_benchmark`` gets for a method; a ``--scenario`` counts for all of them."""
    other = _OTHER_DATA.get(method, {}) if _SETTINGS["scenario"] == "split-digits" else {}
    return {**_SETTINGS, **other, "options": {**_SETTINGS["options"], **_OPTIONS.get(method, {})}}


def _caches(method: str) -> bool:
    return any(
        entry["class"] == "CacheFeatures" for entry in load_recipe(method, _settings(method)["scenario"]).callbacks
    )


def _start(method: str, folder: Path, moment: str | None = None, count: int = 1) -> int:
    """Fork a process that starts or resumes the run; its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if moment is not None:
            aim(moment, count)
        settings = _settings(method)
        if _caches(method):
            settings["options"]["CacheFeatures.folder"] = str(folder / "cache")
        run_benchmark(method, out=folder, resume=True, **settings)
        status = 0
    except BaseException:  # whatever ends a child is printed into its log, and nothing returns into the parent
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(child: int, seconds: float | None = None) -> int:
    """Wait for a process, or kill it after some seconds; its exit status, negative for a signal."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while deadline is not None:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        else:
            time.sleep(0.005)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for n, item in enumerate(value) for k, v in _flat(item, f"{prefix}.{n}").items()}
    return {prefix: value}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    return bool(a == b) or (a != a and b != b)


_TIMES = ("seconds", "spent", ".time")


def _unlike(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Keys of flat values that are not the same in both; times of the clock aside."""
    keys = (k for k in dict.fromkeys([*ours, *theirs]) if not any(word in k for word in _TIMES))
    return [k for k in keys if k not in ours or k not in theirs or not _equal(ours[k], theirs[k])]


def _by_name(events: list[dict[str, Any]]) -> dict[str, Any]:
    """What methods and observers told, by name and task; the order of resumed segments is another."""
    return {f"{e.get('name')} {e.get('task')}": e for e in events}


def _result(folder: Path) -> dict[str, Any]:
    """The run's result; the folder in it, as of a cache, has the same name for every run."""
    text = (folder / "result.json").read_text(encoding="utf-8").replace(json.dumps(str(folder))[1:-1], "FOLDER")
    result: dict[str, Any] = json.loads(text)
    return result


def _cached(folder: Path) -> dict[str, Any]:
    """The checksums of the cached arrays in a folder, by entry."""
    manifests = {p.name: json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))}
    return {name: [(s["name"], s["crc32"]) for s in m["segments"]] for name, m in manifests.items()}


def differences(folder: Path, expected: Path) -> list[str]:
    """What of a finished run is not as in another; times of the clock aside."""
    found = []
    newest = [checkpoint_files.newest_intact(f / "checkpoints") for f in (folder, expected)]
    if None in newest:
        return ["a run has no checkpoint"]
    loaded = [torch.load(str(p), weights_only=True) for p in newest]
    for part in ("state_dict", "callbacks", "global_step"):
        ours, theirs = (_flat(c[part], part) for c in loaded)
        found += [f"{key} differs" for key in _unlike(ours, theirs)]
    results = [_flat(_result(f)) for f in (folder, expected)]
    found += [f"{key[1:]} of result.json differs" for key in _unlike(*results)]
    runs = [read_run(f) for f in (folder, expected)]
    if runs[0].correct.tolist() != runs[1].correct.tolist() or runs[0].total.tolist() != runs[1].total.tolist():
        found.append("rows of the run store differ")
    told = [{"inside": [row.to_dict() for row in r.inside], "plug": _by_name(r.plug)} for r in runs]
    found += [f"{key[1:]} of the run store differs" for key in _unlike(*map(_flat, told))]
    if runs[0].ended != "finished" or runs[0].problems:
        found.append(f"the run store says {runs[0].ended!r}, {runs[0].problems!r}")
    for _, _, path in event_files(folder):
        rows = [e["after"] for e in map(json.loads, path.read_text().splitlines()) if e["kind"] == "row"]
        if len(rows) != len(set(rows)):
            found.append(f"{path.name} holds a row twice")
    if not (folder / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>"):
        found.append("report.html is not whole")
    theirs, ours = _cached(expected / "cache"), _cached(folder / "cache")
    found += [f"cached features {name} differ" for name in theirs if theirs[name] != ours.get(name)]
    left = [p.name for p in (*folder.rglob("*.tmp"), *folder.glob("previous-*"))]
    return found + ([f"left behind: {', '.join(left)}"] if any("ckpt" in n or ".bin" in n for n in left) else [])


def kill_method(
    method: str, kills: int, root: Path, seed: int = 0, per_run: int = 10, seconds: float = math.inf
) -> Outcome:
    """Kill runs of a method ``kills`` times in all and compare each finished one with the uninterrupted run.

    Args:
        method: a recipe.
        kills: how many processes to kill.
        root: where runs are written; removed when all is equal.
        seed: of the moments.
        per_run: most kills of one run.
        seconds: after so much time no further process is killed; the run under way is finished and compared.
    """
    outcome, chance = Outcome(method), random.Random(f"{method} {seed}")
    expected = root / f"{method}-whole"
    started = time.monotonic()
    status = _wait(_start(method, expected))
    outcome.seconds, outcome.starts = time.monotonic() - started, 1
    if status != 0:
        outcome.differences.append(f"the uninterrupted run ended with {status}")
        return outcome
    done, number, aims = 0, 0, (*AIMS, *([CACHING] if _caches(method) else []))
    while done < kills and number < 3 * kills and not outcome.differences:
        folder, number = root / f"{method}-{number}", number + 1
        finished, here = False, 0
        while not finished:
            if time.monotonic() - started >= seconds:
                kills = done
            last = here >= per_run or done >= kills
            aimed = not last and done % 2 == 0
            moment = chance.choice(aims) if aimed else None
            limit = None if last or aimed else chance.uniform(0.0, outcome.seconds)
            status = _wait(_start(method, folder, moment, chance.randint(1, 6)), limit)
            outcome.starts += 1
            finished = status == 0
            if status == -signal.SIGKILL:
                name = moment or "at random"
                outcome.kills[name] = outcome.kills.get(name, 0) + 1
                done, here = done + 1, here + 1
            elif status != 0:
                tail = folder.with_suffix(".log").read_text(encoding="utf-8", errors="replace").splitlines()[-1:]
                outcome.differences.append(f"a start ended with {status}: {' '.join(tail)}")
                return outcome
        outcome.differences += [f"run {number - 1}: {text}" for text in differences(folder, expected)][:20]
        if not outcome.differences:
            shutil.rmtree(folder)
    if not outcome.differences:
        shutil.rmtree(expected)
    return outcome


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as a table."""
    lines = ["| method | kills | " + " | ".join((*AIMS, CACHING, "at random")) + " | starts | differences |"]
    lines.append("|---" * (len(AIMS) + 6) + "|")
    for o in outcomes:
        cells = [str(o.kills.get(m, 0)) for m in (*AIMS, CACHING, "at random")]
        found = "; ".join(o.differences[:3]) or "none"
        lines.append(f"| {o.method} | {sum(o.kills.values())} | {' | '.join(cells)} | {o.starts} | {found} |")
    return "\n".join(lines) + "\n"


def _sum(first: Outcome, second: Outcome) -> Outcome:
    """The outcomes of two pieces of a test."""
    kills = {m: first.kills.get(m, 0) + second.kills.get(m, 0) for m in (*first.kills, *second.kills)}
    both = [*first.differences, *second.differences]
    return Outcome(first.method, kills, first.starts + second.starts, second.seconds, both)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; status 1 when anything differs."""
    parser = argparse.ArgumentParser(description="Kill runs, resume them, compare with the uninterrupted run.")
    parser.add_argument("--methods", nargs="+", default=recipe_names(), help="recipes; all when left out")
    parser.add_argument("--kills", type=int, default=20, help="per method")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path("kills.json"), help="JSON; a table goes beside it as .md")
    parser.add_argument("--scenario", default=_SETTINGS["scenario"], help="a scenario of `cl-bench list`")
    parser.add_argument("--add", action="store_true", help="add to what --out holds, up to --kills for each method")
    parser.add_argument("--seconds", type=float, default=math.inf, help="kill nothing after so much time")
    arguments = parser.parse_args(argv)
    _SETTINGS["scenario"] = arguments.scenario
    torch.set_num_threads(1)
    importlib.import_module("cl_plugins.callbacks")  # before the first fork
    known: dict[str, Outcome] = {}
    if arguments.add and arguments.out.exists():
        held = json.loads(arguments.out.read_text(encoding="utf-8"))
        known = {o["method"]: Outcome(**o) for o in held["outcomes"]}
    root, began = Path(tempfile.mkdtemp(prefix="kill-test-")), time.monotonic()
    for method in arguments.methods:
        before = known.get(method, Outcome(method))
        missing, rest = arguments.kills - sum(before.kills.values()), arguments.seconds - (time.monotonic() - began)
        if missing <= 0 or rest <= 0:
            continue
        known[method] = _sum(before, kill_method(method, missing, root, arguments.seed + before.starts, seconds=rest))
        outcomes = list(known.values())
        print(markdown([known[method]]).splitlines()[-1], flush=True)
        write_json(arguments.out, {"settings": _SETTINGS, "outcomes": [asdict(o) for o in outcomes]})
        write_text(arguments.out.with_suffix(".md"), markdown(outcomes))
    if any(o.differences for o in known.values()):
        print(f"runs that differ are in {root}")
        return 1
    shutil.rmtree(root)
    return 0


__all__ = ["AIMS", "CACHING", "Outcome", "aim", "differences", "kill_method", "main", "markdown"]

if __name__ == "__main__":
    sys.exit(main())
