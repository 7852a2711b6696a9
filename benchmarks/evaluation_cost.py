"""What an evaluation inside tasks costs: the pooled pass against a bare loop over the same samples.

Both evaluate the same module on the same test samples, taken in turns in one process. The bare loop is what one writes
by hand: eval mode, no gradients, one DataLoader over all samples together, argmax, one number at the end. The pooled
pass is all that ``ContinualEvaluation`` does at an evaluation: random states and modes kept, averages of weights asked
for, counts per task. For comparison, ``evaluate_tasks`` starts a loader for each task. Reported is the CPU time of
a pass, the least of the rounds, and its ratio to the bare loop, which should be at most 1.1.

    python benchmarks/evaluation_cost.py                      # a tiny ViT on 10, 100 and 1,000 tasks
    python benchmarks/evaluation_cost.py --device cuda --wall # wall-clock time, for a GPU
"""

from __future__ import annotations

import argparse
import json
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


def measure(n_tasks: int, samples: int, rounds: int, device: str, wall: bool) -> dict[str, float]:
    """Seconds of a pass over ``samples`` test samples in ``n_tasks`` tasks of two classes each."""
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

    ways: dict[str, Callable[[], int]] = {"bare": bare, "pooled": pooled, "a loader per task": by_task}
    found = {name: way() for name, way in ways.items()}  # warms up, and the loader's start is not counted twice
    assert len(set(found.values())) == 1, found
    clock = time.perf_counter if wall else time.process_time
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            start = clock()
            way()
            best[name] = min(best[name], clock() - start)
    return {**best, "ratio": best["pooled"] / best["bare"], "ratio by task": best["a loader per task"] / best["bare"]}


def main() -> None:
    """Print a line of JSON per number of tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--wall", action="store_true", help="wall-clock instead of CPU time")
    arguments = parser.parse_args()
    quiet_lightning()
    torch.set_num_threads(1)
    for n_tasks in arguments.tasks:
        values = measure(n_tasks, arguments.samples, arguments.rounds, arguments.device, arguments.wall)
        print(json.dumps({"tasks": n_tasks, **{k: round(v, 4) for k, v in values.items()}}), flush=True)


if __name__ == "__main__":
    main()
