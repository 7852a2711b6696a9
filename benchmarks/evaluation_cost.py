"""What an evaluation inside tasks costs: the pooled pass against a bare loop over the same samples.

Both evaluate the same module on the same test samples, taken in turns in one process. The bare loop is what one writes
by hand: eval mode, no gradients, one DataLoader over all samples together, argmax, one number at the end. The pooled
pass is all that ``ContinualEvaluation`` does at an evaluation: random states and modes kept, averages of weights asked
for, counts per task. For comparison, ``evaluate_tasks`` starts a loader for each task. The ways take turns in every
round, each first as often as the others; reported are the median CPU time of a pass and, of the ratios to the bare loop
of the same round, the median with quartiles and range. The median should be at most 1.1.

    python benchmarks/evaluation_cost.py                      # a tiny ViT on 10, 100 and 1,000 tasks, two minutes
    python benchmarks/evaluation_cost.py --device cuda --wall # wall-clock time, for a GPU
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import pytorch_lightning as pl
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from cl_plugins.backbones import vit_glyph
from cl_plugins.benchmark import quiet_lightning
from cl_plugins.callbacks import ContinualEvaluation
from cl_plugins.evaluation import evaluate_tasks
from cl_plugins.scenarios import ClassIncremental


class Module(pl.LightningModule):
    """The tiny ViT of the bundled recipes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.model = vit_glyph(num_classes=classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        logits: torch.Tensor = self.model(x)
        return logits

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD that changes nothing."""
        return torch.optim.SGD(self.parameters(), lr=0.0)


def measure(n_tasks: int, samples: int, rounds: int, device: str, wall: bool) -> dict[str, object]:
    """Seconds of a pass over ``samples`` test samples in ``n_tasks`` tasks of two classes each, and ratios by round."""
    per_class = samples // (2 * n_tasks)
    labels = torch.arange(2 * n_tasks).repeat_interleave(per_class)
    images = torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    small = torch.arange(2 * n_tasks)
    train = TensorDataset(images[:1].expand(len(small), -1, -1, -1), small)
    stream = ClassIncremental(train, test=TensorDataset(images, labels), n_tasks=n_tasks)
    stream.task = n_tasks - 1
    evaluation = ContinualEvaluation(10**9)
    trainer = pl.Trainer(
        max_epochs=1, accelerator=device, devices=1, callbacks=[evaluation], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Module(2 * n_tasks)
    trainer.fit(module, datamodule=stream)
    module.to(trainer.strategy.root_device)
    data = TensorDataset(images, labels)

    def bare() -> int:
        was = module.training
        module.eval()
        right = torch.zeros((), dtype=torch.int64, device=module.device)
        with torch.no_grad():
            for x, y in DataLoader(data, batch_size=stream.eval_batch_size):
                right += (module(x.to(module.device)).argmax(1) == y.to(module.device)).sum()
        module.train(was)
        return int(right)

    everything = list(range(n_tasks))

    def pooled() -> int:
        counts = evaluation._evaluate(trainer, module, n_tasks - 1, everything)
        return sum(counts.correct.values())

    def by_task() -> int:
        return sum(c or 0 for c in evaluate_tasks(module, stream, n_tasks - 1, trainer=trainer).correct)

    ways: dict[str, Callable[[], int]] = {"bare": bare, "pooled": pooled, "loader_per_task": by_task}
    found = {name: way() for name, way in ways.items()}  # warms up, and the loader's start is not counted twice
    assert len(set(found.values())) == 1, found
    clock = time.perf_counter if wall else time.process_time
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:  # each comes first as often
            start = clock()
            ways[name]()
            seconds[name].append(clock() - start)
    told: dict[str, object] = {f"{name}_s": round(statistics.median(own), 4) for name, own in seconds.items()}
    for name in names[1:]:
        ratios = sorted(a / b for a, b in zip(seconds[name], seconds["bare"], strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        told[f"{name}_ratio"] = {
            "median": round(statistics.median(ratios), 3),
            "quartiles": [round(low, 3), round(high, 3)],
            "range": [round(ratios[0], 3), round(ratios[-1], 3)],
        }
    return told


def main() -> None:
    """Print a line of JSON per number of tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--samples", type=int, default=2000, help="at least two for each task")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--wall", action="store_true", help="wall-clock instead of CPU time")
    arguments = parser.parse_args()
    quiet_lightning()
    torch.set_num_threads(1)
    for n_tasks in arguments.tasks:
        values = measure(n_tasks, arguments.samples, arguments.rounds, arguments.device, arguments.wall)
        print(
            json.dumps({"tasks": n_tasks, "samples": arguments.samples, "rounds": arguments.rounds, **values}),
            flush=True,
        )


if __name__ == "__main__":
    main()
