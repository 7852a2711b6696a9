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
from cl_plugins.run_differences import differences

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
    """Whether a method writes features into files; those of OVOR's head epochs stay in memory."""
    classes = {entry["class"] for entry in load_recipe(method, _settings(method)["scenario"]).callbacks}
    return "CacheFeatures" in classes and "OVOR" not in classes


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


def _moments(method: str, aims: Sequence[str]) -> Sequence[str]:
    """What aimed kills of a method hit: ``aims``, or all that it has when these are empty."""
    own = (*AIMS, *([CACHING] if _caches(method) else []))
    if foreign := [a for a in aims if a not in own]:
        raise ValueError(f"`aims` must be moments of {method}: {', '.join(own)}; got {foreign!r}")
    return aims or own


def kill_method(
    method: str,
    kills: int,
    root: Path,
    seed: int = 0,
    per_run: int = 10,
    seconds: float = math.inf,
    aims: Sequence[str] = (),
) -> Outcome:
    """Kill runs of a method ``kills`` times in all and compare each finished one with the uninterrupted run.

    Args:
        method: a recipe.
        kills: how many processes to kill.
        root: where runs are written; removed when all is equal.
        seed: of the moments.
        per_run: most kills of one run.
        seconds: after so much time no further process is killed; the run under way is finished and compared.
        aims: all kills come at these moments; when empty, every second one at any of those the method has.

    Raises:
        ValueError: when ``aims`` names a moment that the method does not have.
    """
    moments = _moments(method, aims)
    outcome, chance = Outcome(method), random.Random(f"{method} {seed}")
    expected = root / f"{method}-whole"
    started = time.monotonic()
    status = _wait(_start(method, expected))
    outcome.seconds, outcome.starts = time.monotonic() - started, 1
    if status != 0:
        outcome.differences.append(f"the uninterrupted run ended with {status}")
        return outcome
    done, number = 0, 0
    while done < kills and number < 3 * kills and not outcome.differences:
        folder, number = root / f"{method}-{number}", number + 1
        finished, here = False, 0
        while not finished:
            if time.monotonic() - started >= seconds:
                kills = done
            last = here >= per_run or done >= kills
            aimed = not last and (bool(aims) or done % 2 == 0)
            moment = chance.choice(moments) if aimed else None
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
    if kills and not done:
        outcome.differences.append("no process was killed: none of the moments came")
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
    parser.add_argument("--aim", nargs="+", default=[], choices=[*AIMS, CACHING], help="kill at these moments alone")
    parser.add_argument("--out", type=Path, default=Path("kills.json"), help="JSON; a table goes beside it as .md")
    parser.add_argument("--scenario", default=_SETTINGS["scenario"], help="a scenario of `cl-bench list`")
    parser.add_argument("--add", action="store_true", help="add to what --out holds, up to --kills for each method")
    parser.add_argument("--seconds", type=float, default=math.inf, help="kill nothing after so much time")
    arguments = parser.parse_args(argv)
    _SETTINGS["scenario"] = arguments.scenario
    try:
        for method in arguments.methods:
            _moments(method, arguments.aim)
    except ValueError as error:
        parser.error(str(error))
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
        seed = arguments.seed + before.starts
        known[method] = _sum(before, kill_method(method, missing, root, seed, seconds=rest, aims=arguments.aim))
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
