"""Memory and time per task over a long stream, for methods that grow and methods that do not.

    python benchmarks/long_stream.py --methods mora one-prompt --tasks 1000 --out long_stream

Each task has two classes of tiny images and one epoch. Tasks are trained and finished, not evaluated, since evaluating
every old task after each is quadratic by its nature. Written are JSON and a PNG. "unexplained" is the growth of the
process's memory between task 100 (or a tenth of the tasks) and the last that is not growth of parameters and buffers
(with their gradients), as a share of the memory at the end: a leak shows there.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from cl_plugins import start_task
from cl_plugins.benchmark import quiet_lightning
from cl_plugins.callbacks import MaskedHead, MoRA, OnePrompt
from cl_plugins.plugin import plugins_of
from cl_plugins.scenarios import ClassIncremental

METHODS = {"mora": lambda: MoRA(rank=2), "one-prompt": OnePrompt, "masked-head": MaskedHead}


class Classifier(pl.LightningModule):
    """Any user's module."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.model = VisionTransformer(
            img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=n_classes
        )

    def forward(self, x):
        """Logits."""
        return self.model(x)

    def training_step(self, batch, batch_idx):
        """Cross-entropy."""
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        """AdamW over all that trains."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


def resident_bytes() -> int:
    """Memory that the process holds now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def held_bytes(module: torch.nn.Module) -> int:
    """Bytes of parameters, their gradients and buffers."""
    sizes = [t.nbytes for t in (*module.parameters(), *module.buffers())]
    return sum(sizes) + sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)


def measure(method: str, tasks: int) -> dict:
    quiet_lightning()
    pl.seed_everything(0, verbose=False)
    labels = torch.arange(2 * tasks).repeat_interleave(4)
    images = torch.randn(len(labels), 3, 8, 8)
    data = TensorDataset(images, labels)
    stream = ClassIncremental(data, test=data, n_tasks=tasks, batch_size=8)
    module = Classifier(2 * tasks)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[METHODS[method]()],
    )  # fmt: skip
    for plugin in plugins_of(trainer):
        plugin.on_stream_start(trainer, module, stream)
    rows = []
    for task in stream.tasks:
        began = time.perf_counter()
        start_task(trainer, module, stream, task.index)
        trainer.fit(module, datamodule=stream)
        for plugin in plugins_of(trainer):
            plugin.on_task_end(trainer, module, task)
        seconds = time.perf_counter() - began
        if task.index % 10 == 9:
            gc.collect()
        rows.append({"seconds": seconds, "resident": resident_bytes(), "held": held_bytes(module)})
    first, last = rows[min(99, tasks // 10)], rows[-1]
    unexplained = (last["resident"] - first["resident"]) - (last["held"] - first["held"])
    return {
        "method": method,
        "tasks": tasks,
        "rows": rows,
        "unexplained_bytes": unexplained,
        "unexplained_share": unexplained / last["resident"],
        "seconds_first_tenth": sum(r["seconds"] for r in rows[1 : tasks // 10 + 1]) / (tasks // 10),
        "seconds_last_tenth": sum(r["seconds"] for r in rows[-(tasks // 10) :]) / (tasks // 10),
    }


def plot(results: list, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.5))
    for result in results:
        axes[0].plot([r["resident"] / 2**20 for r in result["rows"]], label=result["method"])
        axes[1].plot([r["seconds"] for r in result["rows"]], label=result["method"], linewidth=0.6)
    for axis, text in zip(axes, ("memory of the process (MiB)", "time per task (s)"), strict=True):
        axis.set_xlabel("task")
        axis.set_ylabel(text)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=sorted(METHODS), choices=sorted(METHODS))
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("long_stream"), help="stem of the .json and .png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for method in arguments.methods:
        results.append(measure(method, arguments.tasks))
        print({k: v for k, v in results[-1].items() if k != "rows"}, flush=True)
        arguments.out.with_suffix(".json").write_text(json.dumps(results) + "\n")
    plot(results, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
