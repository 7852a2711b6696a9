"""Many benchmark runs: methods x scenarios x seeds, each in a process of its own, resumable after any stop.

The job list is a file, ``sweep.json``; a job is done when its folder holds a ``result.json`` of exactly this job. A
process that crashes, or is killed for its memory, costs its own job alone; a job that was stopped goes on where it was,
and one that still runs, since the sweep alone was killed, is waited for.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cl_plugins._reading import read_json
from cl_plugins._text import did_you_mean
from cl_plugins.run_writer import is_being_written
from cl_plugins.sweep_jobs import Job, plan

__all__ = ["Failure", "Job", "SweepResult", "is_done", "plan", "run_job", "run_sweep"]

_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Failure:
    """A job that did not finish.

    Attributes:
        job: which one.
        status: exit status of its process; negative for a signal.
        message: last line that it printed.
        log: all that it printed.
    """

    job: Job
    status: int
    message: str
    log: Path


@dataclass(frozen=True)
class SweepResult:
    """What became of the jobs.

    Attributes:
        folder: where everything is.
        finished: jobs with a result, those of earlier starts included.
        failed: the others.
        skipped: how many of ``finished`` were there before.
    """

    folder: Path
    finished: tuple[Job, ...]
    failed: tuple[Failure, ...]
    skipped: int


def is_done(job: Job, folder: Path) -> bool:
    """Whether the job's folder holds the result of exactly this job.

    Raises:
        ValueError: when it holds the result of another one, as after a change of the settings.
    """
    path = folder / job.name / "result.json"
    if not path.is_file():
        return False
    result = read_json(path)
    theirs = (
        {k: result.get(k) for k in ("method", "scenario", "seed", "order_seed")} if isinstance(result, dict) else {}
    )
    ours = {k: getattr(job, k) for k in theirs}
    if theirs != ours or not theirs:
        raise ValueError(f"{str(path)!r} must be the result of {job.name!r}, got one of {theirs!r}; use another folder")
    return True


def _remember(jobs: Sequence[Job], folder: Path) -> None:
    """Write the job list; a job of an earlier start must not come back with other settings."""
    from cl_plugins.result import write_json

    path = folder / "sweep.json"
    listed = {job.name: asdict(job) for job in jobs}
    if path.is_file():
        before = read_json(path)
        earlier = {j["name"]: j["job"] for j in before["jobs"]}
        defaults = json.loads(json.dumps(asdict(Job("", ""))))
        for name, job in listed.items():
            plain = json.loads(json.dumps(job))
            theirs = {**defaults, **earlier.get(name, plain)}  # of a list from before there was such a setting
            if theirs != plain:
                changed = next(k for k in dict.fromkeys([*plain, *theirs]) if plain.get(k) != theirs.get(k))
                raise ValueError(
                    f"`{changed}` must stay as it was for {name!r} in {str(folder)!r}, {theirs.get(changed)!r},"
                    f" got {plain.get(changed)!r}; use another folder"
                )
        listed = {**earlier, **listed}
    write_json(path, {"schema": 1, "jobs": [{"name": n, "job": j} for n, j in listed.items()]})


def _last_line(log: Path) -> str:
    lines = [x for x in log.read_text(encoding="utf-8", errors="replace").splitlines() if x.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def run_job(job: Job, folder: Path, threads: int | None) -> subprocess.Popen[bytes]:
    """Start a job's process; what it prints goes to ``<name>.log``."""
    environment = dict(os.environ)
    if threads is not None:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with (folder / f"{job.name}.log").open("ab") as log:
        return subprocess.Popen(
            job.command(folder / job.name), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=environment, start_new_session=True,
        )  # fmt: skip


def _local(jobs: Sequence[Job], folder: Path, n_jobs: int, threads: int | None) -> Iterator[tuple[str, Job, int]]:
    """Events ``(kind, job, status)`` of a pool of processes on this machine."""
    waiting, running = list(jobs), dict[str, tuple[Job, subprocess.Popen[bytes]]]()
    elsewhere = list[Job]()  # under way in the process of a sweep that was killed, or of another one
    try:
        while waiting or running or elsewhere:
            for job in [j for j in elsewhere if not is_being_written(folder / j.name)]:
                elsewhere.remove(job)
                waiting.insert(0, job)
            while waiting and len(running) < n_jobs:
                job = waiting.pop(0)
                if is_being_written(folder / job.name):
                    elsewhere.append(job)
                    continue
                yield "started", job, 0
                if is_done(job, folder):
                    yield "ended", job, 0
                else:
                    running[job.name] = (job, run_job(job, folder, threads))
            for name, (job, process) in list(running.items()):
                status = process.poll()
                if status is not None:
                    del running[name]
                    if status and is_being_written(folder / name):  # the other process took the run meanwhile
                        elsewhere.append(job)
                        yield "given up", job, status
                    else:
                        yield "ended", job, status
            time.sleep(_POLL_SECONDS)
    finally:
        for _, process in running.values():  # they save what they have
            process.terminate()
        for _, process in running.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _ray(jobs: Sequence[Job], folder: Path, threads: int | None, address: str | None) -> Iterator[tuple[str, Job, int]]:
    """The same on a Ray cluster whose machines share ``folder``."""
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("`engine` 'ray' needs the package ray; pip install 'cl-plugins[ray]'") from error
    mine = not ray.is_initialized()
    if mine:
        ray.init(address=address, log_to_driver=False)

    def execute(job: Job) -> int:
        while True:
            while is_being_written(folder / job.name):  # by a sweep that was killed, or another one
                time.sleep(_POLL_SECONDS)
            if is_done(job, folder):
                return 0
            status = run_job(job, folder, threads).wait()
            if status == 0 or not is_being_written(folder / job.name):
                return status

    # a failed process is a status here, so Ray must not try again on its own
    remote = ray.remote(num_cpus=threads or 1, max_retries=0)(execute)
    waiting = {remote.remote(job): job for job in jobs}
    try:
        for job in waiting.values():
            yield "started", job, 0
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(done)
            try:
                status = int(ray.get(done))
            except ray.exceptions.RayError as error:
                with (folder / f"{job.name}.log").open("a", encoding="utf-8") as log:
                    log.write(f"{type(error).__name__}: {error}\n")
                status = -1
            yield "ended", job, status
    finally:
        for reference in waiting:
            ray.cancel(reference)
        if mine:
            ray.shutdown()


def run_sweep(
    jobs: Sequence[Job],
    out: str | Path,
    *,
    n_jobs: int = 1,
    threads: int | None = 1,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    tell: Callable[[str], None] | None = None,
) -> SweepResult:
    """Run the jobs that have no result yet.

    Args:
        jobs: see :func:`plan`.
        out: folder of the sweep, with one folder a run, shared by all machines.
        n_jobs: processes at a time, with the local engine; Ray takes as many as it has processors for.
        threads: of each process; None leaves it to torch.
        engine: "local", or "ray" for a cluster.
        address: of the Ray cluster; None starts one here.
        tell: is given a line whenever something changes.

    Returns:
        What became of the jobs; a failed one does not stop the others.

    Raises:
        ValueError: for settings out of range, or a folder with other settings.
        KeyboardInterrupt: on Ctrl-C, after the running jobs were asked to save and end.
    """
    if isinstance(n_jobs, bool) or not isinstance(n_jobs, int) or n_jobs < 1:
        raise ValueError(f"`n_jobs` must be an integer of 1 or more, got {n_jobs!r}")
    if threads is not None and threads < 1:
        raise ValueError(f"`threads` must be 1 or more, got {threads!r}")
    if engine not in ("local", "ray"):
        raise ValueError(
            f"`engine` must be 'local' or 'ray', got {engine!r}{did_you_mean(str(engine), ('local', 'ray'))}"
        )
    folder = Path(out).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    open_jobs = [job for job in jobs if not is_done(job, folder)]
    _remember(jobs, folder)
    skipped, failed, began = len(jobs) - len(open_jobs), list[Failure](), time.monotonic()
    ended = running = 0
    if engine == "ray":
        events = _ray(open_jobs, folder, threads, address)
    else:
        events = _local(open_jobs, folder, n_jobs, threads)
    for kind, job, status in events:
        if kind != "ended":
            running += 1 if kind == "started" else -1
            continue
        running, ended = running - 1, ended + 1
        ok = status == 0 and is_done(job, folder)
        if not ok:
            log = folder / f"{job.name}.log"
            failed.append(Failure(job, status, _last_line(log), log))
        if tell is not None:
            left = len(open_jobs) - ended
            eta = (time.monotonic() - began) / ended * left
            state = f"[{skipped + ended}/{len(jobs)}] {job.name} {'done' if ok else 'FAILED'}"
            tell(f"{state}; {len(failed)} failed, {left} left, about {eta / 60:.0f} min")
    lost = {f.job.name for f in failed}
    return SweepResult(folder, tuple(j for j in jobs if j.name not in lost), tuple(failed), skipped)
