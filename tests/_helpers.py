"""Small real things that tests train: a stream, a backbone, a module."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from cl_plugins import ContinualCallback
from cl_plugins.scenarios import ClassIncremental


def tiny_vit(num_classes: int = 6, depth: int = 2, seed: int = 0) -> VisionTransformer:
    """A timm ViT of width 16 for 8 x 8 images, seeded without touching the global generator."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VisionTransformer(
            img_size=8, patch_size=4, embed_dim=16, depth=depth, num_heads=2, num_classes=num_classes
        )


def image_data(n_per_class: int | Sequence[int], n_classes: int = 6, seed: int = 0) -> TensorDataset:
    """Images that differ by class: a class pattern plus noise, ``(samples, 3, 8, 8)``."""
    patterns = torch.randn(n_classes, 3, 8, 8, generator=torch.Generator().manual_seed(99))
    counts = [n_per_class] * n_classes if isinstance(n_per_class, int) else list(n_per_class)
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(counts)])
    noise = torch.randn(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(patterns[labels] + 0.5 * noise, labels)


def tiny_stream(n_tasks: int = 3, n_per_class: int = 16, **options) -> ClassIncremental:
    """Six classes over ``n_tasks`` tasks, 16 training and 5 test samples a class, batches of 8."""
    defaults = {"batch_size": 8, "eval_batch_size": 7}
    return ClassIncremental(
        image_data(n_per_class), test=image_data(5, seed=1), n_tasks=n_tasks, **{**defaults, **options}
    )


class PlainModule(pl.LightningModule):
    """What any user has: a model, a loss, an optimizer."""

    def __init__(self, model: nn.Module | None = None, lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.model = tiny_vit() if model is None else model
        self.lr = lr
        self.weight_decay = weight_decay

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)


def quiet_trainer(trainer_class: type = pl.Trainer, **options):
    """A Trainer on the CPU that writes and prints nothing unless asked."""
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return trainer_class(**{**defaults, **options})


class StopAt(pl.Callback):
    """Ends the process's work at a step, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise RuntimeError("power failure")


class StopAtTask(ContinualCallback):
    """Ends a stream as it comes to a task, as someone at the keyboard would."""

    training = "neutral"

    def __init__(self, task: int) -> None:
        super().__init__()
        self.stop = task

    def start_task(self, module, task):
        if task.index == self.stop:
            raise KeyboardInterrupt


def leave_processes() -> None:
    """End this process's group, as gloo of torch 2.5 lets one.

    It hangs when another process leaves while this one still reads, and when its thread asks for Python's lock, to free
    the last tensors, while the group is destroyed under that lock.
    """
    dist.barrier()
    time.sleep(0.5)
    dist.destroy_process_group()


def run_script(text: str, folder: Path, *arguments: object) -> None:
    """Run a program that writes its findings into ``folder``; it may start more processes of itself."""
    script = folder / "train.py"
    script.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
