"""Which callbacks work beside each other: trains every pair in both orders and writes the table of docs/composition.md.

python benchmarks/composition.py                     # the table on the terminal
python benchmarks/composition.py docs/composition.md # and into the page, between its two markers
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks._common import QUIET, tell
from cl_plugins import callbacks as library
from cl_plugins import fit_stream
from cl_plugins.benchmark import quiet_lightning
from cl_plugins.plugin import ContinualCallback
from cl_plugins.scenarios import ClassIncremental

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
PYRAMID = {"widths": (8, 8, 8, 16), "heads": (1, 2, 2, 2)}
OPTIONS: dict[str, dict[str, Any]] = {
    "OVOR": {
        "outliers": {"neighbors": 3, "n_boundary": 4, "draws": 10, "per_class": 4, "batch_size": 8},
        "lengths": {0: 4, 1: 2},
        "head_epochs": 1,
    },
    "OnePrompt": {"lengths": {0: 4, 1: 2}},
    "LoRA": {"rank": 2},
    "MoRA": {"rank": 2},
    "HierarchicalSideTuning": PYRAMID,
    "LeanHierarchicalSideTuning": PYRAMID,
    "LadderSideTuning": {"reduction": 2},
    "Sherl": {"reduction": 4},
    "SideTuning": {"width": 4},
    "RanPAC": {"projection": 32},
    "BalancedEMA": {"rule": "fixed", "decay": 0.5},
    "TaskGroups": {"texts": lambda task: [f"group {task.index % 2}"]},
    "CacheFeatures": {"progress": False},
    "ContinualEvaluation": {"every_n_steps": 3},
}
"""Settings that make a callback small enough for the tiny model; the rest takes its defaults."""


def names() -> list[str]:
    """Every callback of the library, by name."""
    found = {n: getattr(library, n) for n in library.__all__}
    return [n for n, c in found.items() if isinstance(c, type) and issubclass(c, ContinualCallback)]


def make(name: str, folder: Path) -> ContinualCallback:
    """A callback with the settings of :data:`OPTIONS`."""
    options = {"path": folder} if name == "ForgettingDashboard" else OPTIONS.get(name, {})
    callback: ContinualCallback = getattr(library, name)(**options)
    return callback


class Module(pl.LightningModule):
    """A ViT of width 16 for 8 x 8 images."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = VisionTransformer(
                img_size=8, patch_size=4, embed_dim=16, depth=4, num_heads=2, num_classes=4, mlp_ratio=2
            )

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.model(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, whose weight decay shows a parameter that should not have been touched."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2, weight_decay=0.1)


def images(per_class: int, seed: int, classes: int = 4) -> TensorDataset:
    """A pattern per class and noise, ``(samples, 3, 8, 8)``."""
    patterns = torch.randn(classes, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(classes).repeat_interleave(per_class)
    noise = torch.randn(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(patterns[labels] + 0.5 * noise, labels)


def stream(**options: Any) -> ClassIncremental:
    """Two tasks of two classes, 8 training samples a class."""
    sizes = {"batch_size": 8, "eval_batch_size": 7, **options}
    return ClassIncremental(images(8, 0), test=images(5, 1), n_tasks=2, **sizes)


@dataclass(frozen=True)
class Outcome:
    """What came of a run: a reason when it was refused, else the weights and the counts."""

    refused: str | None
    weights: dict[str, Tensor]
    correct: list[tuple[int | None, ...]]
    steps: int


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def run(chosen: Sequence[str], **trainer_options: Any) -> Outcome:
    """Train callbacks, in this order, over the stream.

    Raises:
        Exception: what a run raised after its first training step, where nothing may be refused any more.
    """
    quiet_lightning()
    with tempfile.TemporaryDirectory() as folder, _quiet():
        torch.manual_seed(0)
        module = Module()
        before = {k: v.clone() for k, v in module.state_dict().items()}
        trainer = None
        try:
            trainer = pl.Trainer(
                **{"accelerator": "cpu", "max_epochs": 2, **QUIET, **trainer_options},
                callbacks=[make(n, Path(folder)) for n in chosen],
            )
            result = fit_stream(trainer, module, stream())
        except (ValueError, RuntimeError) as error:
            changed = any(not torch.equal(v, module.state_dict()[k]) for k, v in before.items())
            if changed or (trainer is not None and trainer.global_step):
                raise  # too late for a refusal
            return Outcome(str(error), {}, [], 0)
        weights = {k: v.clone() for k, v in module.state_dict().items()}
        return Outcome(None, weights, [r.correct for r in result.rows], trainer.global_step)


def same(a: Outcome, b: Outcome) -> bool:
    """Whether two runs ended alike bit by bit, in all that both of them have."""
    shared = a.weights.keys() & b.weights.keys()
    return a.correct == b.correct and all(torch.equal(a.weights[k], b.weights[k]) for k in shared)


def check(first: str, second: str) -> Outcome:
    """Train a pair in both orders.

    Raises:
        AssertionError: when the orders differ, or one was refused too late.
    """
    a, b = run([first, second]), run([second, first])
    assert a.refused == b.refused, f"{first}, {second}: {a.refused!r} in this order, else {b.refused!r}"
    assert a.weights.keys() == b.weights.keys(), f"{first}, {second}: other weights in the other order"
    assert same(a, b), f"{first}, {second}: another result in the other order"
    return a


def pairs() -> list[tuple[str, str]]:
    """Every pair, of two of one kind as well."""
    return list(itertools.combinations_with_replacement(names(), 2))


def _general(reason: str, first: str, second: str) -> str:
    """A reason without the names of its pair."""
    reason = reason.removeprefix(f"`callbacks` must not hold {first} beside {second}: ")
    reason = reason.removeprefix(f"`callbacks` must not hold {second} beside {first}: ")
    for name in sorted({first, second}, key=len, reverse=True):
        reason = re.sub(rf"\b{name}\b", "A" if name == first else "B", reason)
    return " ".join(reason.split())


def table() -> str:
    """The table and its legend in Markdown, from running everything."""
    alone = {n: run([n]) for n in names()}
    cells: dict[tuple[str, str], str] = {}
    reasons: dict[str, tuple[int, str]] = {}
    for first, second in pairs():
        outcome = check(first, second)
        if outcome.refused is None:
            lone = [n for n in (first, second) if alone[n].refused is None and same(outcome, alone[n])]
            cells[first, second] = "same" if lone else "yes"
            continue
        ordered = sorted((first, second))
        general = _general(outcome.refused, *ordered)
        number, _ = reasons.setdefault(general, (len(reasons) + 1, f"{ordered[0]}, {ordered[1]}"))
        cells[first, second] = f"r{number}"
    lines = ["| | " + " | ".join(names()) + " |", "|" + "---|" * (len(names()) + 1)]
    for row in names():
        entries = [cells.get((row, column)) or cells[column, row] for column in names()]
        lines.append(f"| **{row}** | " + " | ".join(entries) + " |")
    lines += ["", "Refused, with the words of the error (A and B are the pair's names in alphabetical order):", ""]
    lines += [f"* r{number} ({example}): {text}" for text, (number, example) in reasons.items()]
    counted = list(cells.values())
    refused = sum(c.startswith("r") for c in counted)
    lines += ["", f"{len(counted)} pairs, {len(counted) - refused} work, {refused} are refused."]
    return "\n".join(lines)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", type=Path, help="a page with the two markers; the terminal when left out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tell(table(), arguments.page, BEGIN, END)


if __name__ == "__main__":
    main()
