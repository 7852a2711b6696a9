"""What the callbacks cost per step: OVOR with ForgettingTracker against the same adapter without any callback.

Both train the same module with the same prompts in turns, in one process; CPU time of whole
epochs, least of the rounds.

    python benchmarks/step_overhead.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from cl_plugins import Task
from cl_plugins.backbones import create_backbone
from cl_plugins.benchmark import quiet_lightning
from cl_plugins.callbacks import OVOR, ForgettingTracker
from cl_plugins.recipes import load_recipe
from cl_plugins.workloads import ImageClassifier


def fit_seconds(with_callbacks: bool, backbone: str, size: int, batch: int, steps: int) -> float:
    torch.manual_seed(0)
    module = ImageClassifier(create_backbone(backbone, 10, pretrained=False), load_recipe("ovor"))
    method, task = OVOR(head_epochs=1), Task(0, tuple(range(10)))
    callbacks = [method, ForgettingTracker()] if with_callbacks else []
    trainer = pl.Trainer(
        max_epochs=2, limit_train_batches=steps, callbacks=callbacks, accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    if with_callbacks:
        method.on_task_start(trainer, module, task)
    else:
        method.install(module)
        method.start_task(module, task)
    data = TensorDataset(torch.randn(batch, 3, size, size), torch.arange(batch) % 10)
    loader = DataLoader(torch.utils.data.ConcatDataset([data] * steps), batch_size=batch)
    marks = []

    class Clock(pl.Callback):  # times the prompt epoch alone: the head epoch does other work in the two runs
        def on_train_epoch_start(self, trainer, pl_module):
            marks.append(time.process_time())

    trainer.callbacks.append(Clock())
    trainer.fit(module, loader)
    return (marks[1] - marks[0]) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    quiet_lightning()
    torch.set_num_threads(1)
    rows = []
    for backbone, size, batch, steps in (("vit_glyph", 32, 64, 60), ("vit_tiny_patch16_224", 224, 8, 4)):
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for number in range(args.rounds):
            for with_callbacks in (
                (False, True) if number % 2 else (True, False)
            ):  # neither always runs on a warm machine
                seconds[with_callbacks].append(fit_seconds(with_callbacks, backbone, size, batch, steps))
        base = seconds[False]
        ratios = [a / b for a, b in zip(seconds[True], base, strict=True)]
        row = {
            "backbone": backbone,
            "batch": batch,
            "ms_per_step": 1e3 * statistics.median(base),
            "ratio_of_minima": min(seconds[True]) / min(base),
            "ratio_median": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
        rows.append(row)
        cost = f"with callbacks x{row['ratio_of_minima']:.3f} ({row['ratio_min']:.3f} to {row['ratio_max']:.3f})"
        print(f"{backbone:<22} batch {batch:<3} {row['ms_per_step']:8.1f} ms  {cost}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
