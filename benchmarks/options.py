"""Training options of Lightning for every callback: precision, accumulation, clipping, checkpointing, compilation.

    python benchmarks/options.py                    # the table on the terminal
    python benchmarks/options.py docs/robustness.md # and into the page, between its two markers

Each cell is a stream of two tasks. What must not change the result is compared with a run without the option, in double
precision; what changes it on purpose must end finite, with every sample evaluated, what is frozen untouched and what
trains moved.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks._common import QUIET, tell
from benchmarks.composition import BEGIN, END, Module, _quiet, images, make
from benchmarks.processes import BATCH_STATISTICS, teams
from cl_plugins import fit_stream
from cl_plugins.benchmark import quiet_lightning
from cl_plugins.scenarios import ClassIncremental

OPTIONS: dict[str, dict[str, Any]] = {
    "bf16-mixed": {"precision": "bf16-mixed"},
    "bf16-true": {"precision": "bf16-true"},
    "accumulation": {"accumulate_grad_batches": 2, "batch_size": 4},
    "clipping": {"gradient_clip_val": 0.05},
    "checkpointing": {"checkpointing": True},
    "compile": {"compiled": True},
}
"""What is tried, by name; the same on a GPU, where "16-mixed" joins them."""
SAME = ("accumulation", "checkpointing", "compile")
"""Options that must not change the result."""


@dataclass(frozen=True)
class Trained:
    """Weights before and after, the trainable ones' names, and the counts."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]
    trained: set[str]
    rows: list[Any]
    steps: int


def train(
    team: Sequence[str],
    batch_size: int = 8,
    checkpointing: bool = False,
    compiled: bool = False,
    precision: str = "64-true",
    accelerator: str = "cpu",
    **options: Any,
) -> Trained:
    """One run; ``options`` go to the Trainer."""
    quiet_lightning()
    with tempfile.TemporaryDirectory() as folder, _quiet():
        torch.manual_seed(0)
        module = Module()
        module.model.set_grad_checkpointing(checkpointing)
        if compiled:
            torch.compiler.reset()
            module.model.compile(backend="aot_eager")
        before = {k: v.clone() for k, v in module.state_dict().items()}
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=precision,
            max_epochs=2,
            callbacks=[make(n, Path(folder)) for n in team],
            **{**QUIET, **options},
        )
        data = ClassIncremental(images(8, 0), test=images(5, 1), n_tasks=2, batch_size=batch_size, eval_batch_size=7)
        result = fit_stream(trainer, module, data)
        after = {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}
        trained = {n for n, p in module.named_parameters() if p.requires_grad}
        rows = [(r.correct, r.total, r.correct_in_task) for r in result.rows]
        return Trained(before, after, trained, rows, trainer.global_step)


def largest_gap(a: Trained, b: Trained) -> float:
    """Largest difference of a weight."""
    assert a.after.keys() == b.after.keys(), "other weights"
    return max(float((v.double() - b.after[k].double()).abs().max()) for k, v in a.after.items() if v.numel())


def check(name: str, option: str, accelerator: str = "cpu") -> str:
    """What came of a method with an option: "yes", or why it was refused.

    Raises:
        AssertionError: when the result is not what the option should give.
    """
    team = teams()[name]
    settings = {"precision": option} if option == "16-mixed" else OPTIONS[option]
    try:
        got = train(team, accelerator=accelerator, **settings)
    except ValueError as error:
        return f"refused: {error}"
    plain = train(team, accelerator=accelerator)
    assert [r[1] for r in got.rows] == [r[1] for r in plain.rows], "not every sample was evaluated"
    assert got.steps == plain.steps, f"{got.steps} steps, without the option {plain.steps}"
    if option == "accumulation" and name in BATCH_STATISTICS:
        return "yes, with batch statistics of 4 samples"
    if option in SAME:
        gap = largest_gap(got, plain)
        assert gap < 1e-9, f"weights differ by {gap:.1e} from a run without {option}"
        assert got.rows == plain.rows, "other counts"
        return "yes"
    assert all(torch.isfinite(v).all() for v in got.after.values() if v.is_floating_point()), "a weight is not finite"
    for key, value in plain.before.items():
        frozen = key in plain.after and torch.equal(plain.after[key].double(), value.double())
        if frozen:
            kept = value.to(got.after[key].dtype)
            assert torch.equal(got.after[key], kept), f"{key!r} is frozen and changed"
    moved = [k for k in plain.trained if k in got.before and not torch.equal(got.before[k], got.after[k].float())]
    assert not plain.steps or moved, "nothing was trained"
    if option == "clipping" and plain.steps:
        assert largest_gap(got, plain) > 0, "clipping changed nothing"
    return "yes"


def table(chosen: Sequence[str]) -> str:
    """The table in Markdown, from running everything."""
    lines = ["| | " + " | ".join(OPTIONS) + " |", "|" + "---|" * (len(OPTIONS) + 1)]
    for name in chosen:
        cells = []
        for option in OPTIONS:
            try:
                cells.append(check(name, option))
            except Exception as error:  # a cell of the table says so
                cells.append(f"FAILED {type(error).__name__}: {str(error)[:200]}")
            print(f"{name:28}{option:16}{cells[-1]}", file=sys.stderr, flush=True)
        lines.append(f"| **{name}** | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", type=Path, help="a page with the two markers; the terminal when left out")
    parser.add_argument("--only", nargs="+", default=list(teams()), help="these callbacks only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tell(table(arguments.only), arguments.page, BEGIN, END)


if __name__ == "__main__":
    main()
