"""Two processes against one with the same effective batch, for every method, on the CPU with gloo.

    python benchmarks/processes.py                    # starts two processes and one, prints a line per method
    python benchmarks/processes.py --only LoRA OVOR
    python benchmarks/processes.py --stop 7           # two processes that were stopped against two that were not
    torchrun --nproc-per-node 2 benchmarks/processes.py --worker FOLDER   # one side of it, as a cluster would start it

A process of two takes batches of 4, a single one batches of 8: the sampler deals samples out in turn, so both see the
same samples in each step. In double precision a difference of method does not hide behind rounding. The 11 test
samples of a task divide neither by the processes nor by the batch size.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks._common import QUIET
from benchmarks.composition import Module, images, make, names
from cl_plugins import fit_stream
from cl_plugins.benchmark import quiet_lightning
from cl_plugins.callbacks import StreamCheckpoint
from cl_plugins.scenarios import ClassIncremental

BATCH = 8
TEAMS: dict[str, list[str]] = {
    "BalancedEMA": ["LoRA", "BalancedEMA"],
    "TaskGroups": ["LoRA", "TaskGroups"],
    "CacheFeatures": ["FrozenBackbone", "CacheFeatures"],
    "CacheFeatures and LadderSideTuning": ["LadderSideTuning", "CacheFeatures"],
    "CacheFeatures and OVOR": ["OVOR", "CacheFeatures"],
    "OVOR and NearestMean": ["OVOR", "NearestMean"],
    "MoRA and RanPAC": ["MoRA", "RanPAC"],
    "MaskedHead and BalancedEMA": ["MaskedHead", "BalancedEMA"],
    "no method": [],
}
"""Callbacks that need another one, and combinations beside the single callbacks."""
BATCH_STATISTICS = ("HierarchicalSideTuning", "LeanHierarchicalSideTuning")
"""Methods with batch normalization: each process normalizes by its own half of a batch, as in every DDP training
without ``sync_batchnorm`` (which needs GPUs), so only the ranks among themselves can agree."""


def teams() -> dict[str, list[str]]:
    """What is trained, by name."""
    return {**{n: [n] for n in names()}, **TEAMS}


class _Noise(pl.Callback):
    """Adds what each process draws to its own samples, so that a resume must bring back the draws of all."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, list | tuple) and batch[0].is_floating_point():
            batch[0].add_(torch.randn_like(batch[0]), alpha=1e-3)


class _PowerFailure(pl.Callback):
    """Ends every process before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            raise InterruptedError


def train(
    team: Sequence[str], folder: Path, processes: int, extra: Sequence[pl.Callback] = (), resume: bool = False
) -> dict[str, Any]:
    """Weights, counts and files of one run in this process."""
    torch.manual_seed(0)
    module = Module().double()  # what runs before the first fit, such as a distillation, must not round either
    many: dict[str, Any] = {"devices": processes, "strategy": DDPStrategy(process_group_backend="gloo")}
    trainer = pl.Trainer(
        **{**QUIET, "enable_checkpointing": bool(extra), **(many if processes > 1 else {})},
        accelerator="cpu",
        max_epochs=2,
        num_sanity_val_steps=0,
        precision="64-true",
        callbacks=[*(make(n, folder) for n in team), *extra],
    )
    share = BATCH // trainer.world_size
    data = ClassIncremental(images(8, 0), test=_uneven(), n_tasks=2, batch_size=share, eval_batch_size=3)
    if extra:
        torch.manual_seed(trainer.global_rank)
    result = fit_stream(trainer, module, data, "last" if resume else None)
    counts = [[r.correct, r.total, r.correct_in_task, r.confusion] for r in result.rows]
    weights: dict[str, Tensor] = {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}
    return {"weights": weights, "counts": counts, "steps": trainer.global_step}


def _uneven() -> Any:
    """Test samples: 6 and 5 of a task's two classes."""
    from torch.utils.data import Subset

    whole = images(6, 1)
    return Subset(whole, [i for i in range(24) if i not in (11, 23)])


def stopped(team: Sequence[str], folder: Path, checkpoints: Path, step: int | None, processes: int) -> dict[str, Any]:
    """As :func:`train`, with noise; with a step, all processes end before it, and new Trainers go on."""

    def extra(*more: pl.Callback) -> list[pl.Callback]:
        return [_Noise(), *more, StreamCheckpoint(checkpoints, every_n_steps=1)]

    if step is None:
        return train(team, folder, processes, extra())
    with contextlib.suppress(InterruptedError):
        train(team, folder, processes, extra(_PowerFailure(step)))
    return train(team, folder, processes, extra(), resume=True)


def worker(folder: Path, chosen: Sequence[str], stop: int | None = None) -> None:
    """Train every team and write what came of it to ``folder``, one file per rank."""
    torch.set_num_threads(1)
    quiet_lightning()
    processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    for name in chosen:
        place = folder / f"files-{rank}"
        place.mkdir(exist_ok=True)
        before = set(place.rglob("*"))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                if stop is None:
                    outcome: dict[str, Any] = train(teams()[name], place, processes)
                else:
                    outcome = stopped(teams()[name], place, folder / f"{name}-saved", stop or None, processes)
        except (ValueError, RuntimeError) as error:
            outcome = {"refused": f"{type(error).__name__}: {error}"}
        outcome["files"] = len(set(place.rglob("*")) - before)
        torch.save(outcome, folder / f"{name}.{rank}.pt")


def launch(folder: Path, processes: int, chosen: Sequence[str], stop: int | None = None, timeout: float = 900) -> None:
    """Start processes as torchrun does and wait for them; a ``stop`` of 0 is the whole run of :func:`stopped`.

    Raises:
        RuntimeError: with the end of what a failed process printed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = str(Path(__file__).parent.parent)
    common = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "TORCHELASTIC_RUN_ID": "x"}  # fmt: skip
    if processes == 1:
        common = {k: v for k, v in common.items() if k not in ("WORLD_SIZE", "TORCHELASTIC_RUN_ID")}
    command = [sys.executable, "-W", "ignore", __file__, "--worker", str(folder), "--only", *chosen]
    command += [] if stop is None else ["--stop", str(stop)]
    started = []
    for rank in range(processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"} if processes > 1 else {}
        started.append(subprocess.Popen(command, env={**common, **ranks}, cwd=root, stderr=subprocess.PIPE, text=True))
    try:
        for process in started:
            _, errors = process.communicate(timeout=timeout)
            if process.returncode:
                raise RuntimeError(f"a process of {processes} failed:\n{errors[-3000:]}")
    finally:
        for process in started:
            process.kill()
            process.wait()


def compare(name: str, one: Path, two: Path) -> str | float:
    """Largest difference of a weight between one process and two; a text when both refused for the same reason.

    Raises:
        AssertionError: when counts, shapes or the ranks among themselves differ.
    """
    alone = torch.load(one / f"{name}.0.pt", weights_only=True)
    ranks = [torch.load(two / f"{name}.{r}.pt", weights_only=True) for r in (0, 1)]
    told = [r.get("refused") for r in (alone, *ranks)]
    if any(told):
        assert told[1] == told[2], f"{name}: only one process refused: {told[1:]}"
        return str(told[1])
    unequal = [k for k, v in ranks[0]["weights"].items() if not torch.equal(v, ranks[1]["weights"][k])]
    assert not unequal, f"{name}: the ranks hold different {unequal[:4]}"
    assert ranks[0]["counts"] == ranks[1]["counts"], f"{name}: the ranks count differently"
    assert ranks[1]["files"] == 0, f"{name}: rank 1 wrote {ranks[1]['files']} files"
    totals = [[c[1] for c in r["counts"]] for r in (alone, ranks[0])]
    assert totals[0] == totals[1], f"{name}: evaluated {totals[1]} samples, in one process {totals[0]}"
    if name in BATCH_STATISTICS:
        return "the ranks agree; batch statistics of half batches"
    for rank in ranks:
        assert rank["counts"] == alone["counts"], f"{name}: counts {rank['counts']}, in one process {alone['counts']}"
        assert rank["steps"] == alone["steps"], f"{name}: {rank['steps']} steps, in one process {alone['steps']}"
        assert rank["weights"].keys() == alone["weights"].keys(), f"{name}: other weights"
    gaps = [
        float((v.double() - alone["weights"][k].double()).abs().max())
        for k, v in ranks[0]["weights"].items()
        if v.numel()
    ]
    return max(gaps)


def compare_resumed(name: str, whole: Path, resumed: Path) -> str | int:
    """How many tensors of the resumed processes differ from the whole run's; a text when both refused.

    Raises:
        AssertionError: when a process ends with other counts or steps.
    """
    different = 0
    for rank in (0, 1):
        a, b = (torch.load(f / f"{name}.{rank}.pt", weights_only=True) for f in (whole, resumed))
        if "refused" in a or "refused" in b:
            assert a.get("refused") == b.get("refused"), f"{name}: {a.get('refused')} and {b.get('refused')}"
            return str(a["refused"])
        assert (a["counts"], a["steps"]) == (b["counts"], b["steps"]), f"{name}: other counts or steps"
        assert a["weights"].keys() == b["weights"].keys(), f"{name}: other weights"
        different += sum(not torch.equal(v, b["weights"][k]) for k, v in a["weights"].items())
    return different


def main() -> None:
    """Run both and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", type=Path, help="train in this process and write to this folder")
    parser.add_argument("--only", nargs="+", default=list(teams()), help="these only")
    parser.add_argument(
        "--stop", type=int, help="stop two processes before this step, resume, compare with two that ran on"
    )
    arguments = parser.parse_args()
    if arguments.worker is not None:
        worker(arguments.worker, arguments.only, arguments.stop)
        return
    if arguments.stop is not None:
        with tempfile.TemporaryDirectory() as folder:
            whole, resumed = Path(folder) / "whole", Path(folder) / "resumed"
            launch(whole, 2, arguments.only, 0)
            launch(resumed, 2, arguments.only, arguments.stop)
            for name in arguments.only:
                try:
                    print(f"{name:40}{compare_resumed(name, whole, resumed)}")
                except AssertionError as error:
                    print(f"{name:40}DIFFERS {error}")
        return
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "one", Path(folder) / "two"
        launch(one, 1, arguments.only)
        launch(two, 2, arguments.only)
        for name in arguments.only:
            try:
                outcome = compare(name, one, two)
            except AssertionError as error:
                outcome = f"DIFFERS {error}"
            print(f"{name:28}{outcome if isinstance(outcome, str) else format(outcome, '.1e')}")


if __name__ == "__main__":
    main()
