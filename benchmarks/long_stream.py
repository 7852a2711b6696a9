"""Memory and time per task over a long stream, for methods that grow and methods that do not.

    python benchmarks/long_stream.py --methods mora one-prompt --tasks 1000 --out benchmarks/results/long_stream

Each task has two classes of tiny images and one optimizer step; ``fit_stream`` runs with all that ``cl-bench run`` has:
tracker, run store with its report, and a checkpoint after each task. The evaluation has ten columns, each with test
images of a hundred tasks, since evaluating every old task by itself after each is quadratic by its nature.

Written are JSON and an SVG. Memory is what the process holds after a garbage collection, with what the C library keeps
free given back. ``unexplained`` is its growth between a tenth of the tasks and the last one that is not growth of
parameters, their gradients and buffers; a leak shows there.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from cl_plugins import ContinualCallback, Task, fit_stream
from cl_plugins.benchmark import quiet_lightning
from cl_plugins.callbacks import (
    ForgettingDashboard,
    ForgettingTracker,
    LoRA,
    MaskedHead,
    MoRA,
    OnePrompt,
    StreamCheckpoint,
)
from cl_plugins.result import write_json, write_text
from cl_plugins.scenarios import ClassIncremental

METHODS: dict[str, Callable[[], ContinualCallback]] = {
    "mora": lambda: MoRA(rank=4),
    "one-prompt": OnePrompt,
    "lora": lambda: LoRA(rank=4),
    "masked-head": MaskedHead,
}
COLUMNS = 10
EVERY = 10


class Blocks(ClassIncremental):
    """Trains on tasks of two classes and is evaluated on blocks of them."""

    def __init__(self, data: TensorDataset, test: TensorDataset, n_tasks: int) -> None:
        super().__init__(data, test=test, n_tasks=n_tasks, batch_size=8)
        size = n_tasks // COLUMNS
        blocks = [self.tasks[i * size : (i + 1) * size] for i in range(COLUMNS)]
        self.evaluation_tasks = tuple(Task(i, tuple(c for t in b for c in t.classes)) for i, b in enumerate(blocks))
        self._tests = [[TensorDataset(*test[list(t.classes)]) for t in b] for b in blocks]

    def learned_after(self, task: int) -> int:
        """Blocks all of whose tasks are learned after ``task``."""
        return (task + 1) * COLUMNS // len(self.tasks)

    def test_loader(self, index: int) -> Any:
        """The first class of each fifth task of a block."""
        images, labels = zip(*(d[0] for d in self._tests[index][::5]), strict=True)
        return [(torch.stack(images), torch.stack(labels))]


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
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def held_bytes(module: torch.nn.Module) -> int:
    """Bytes of parameters, their gradients and buffers."""
    sizes = [t.nbytes for t in (*module.parameters(), *module.buffers())]
    return sum(sizes) + sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)


class Meter(ContinualCallback):
    """Time of each task, from its start to the next one's, and memory after every tenth."""

    training = "neutral"

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self.memory: list[dict[str, int]] = []
        self._began: float | None = None

    def on_task_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, task: Task) -> None:
        """Read the clock; the gauge's own time is left out."""
        super().on_task_start(trainer, pl_module, task)
        if self._began is not None:
            self.seconds.append(time.perf_counter() - self._began)
        if task.index and task.index % EVERY == 0:
            self.read(task.index, pl_module)
        self._began = time.perf_counter()

    def on_stream_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, result: Any) -> None:
        """The last task."""
        self.seconds.append(time.perf_counter() - (self._began or 0.0))
        self.read(len(self.seconds), pl_module)

    def read(self, tasks: int, module: torch.nn.Module) -> None:
        """Append a measurement."""
        self.memory.append({"tasks": tasks, "resident": resident_bytes(), "held": held_bytes(module)})


def measure(method: str, tasks: int, evaluate_old: int | None = None) -> dict[str, Any]:
    """One stream; ``evaluate_old`` draws so many old columns after each task but the last."""
    quiet_lightning()
    pl.seed_everything(0, verbose=False)
    labels = torch.arange(2 * tasks)
    images = torch.randn(len(labels), 3, 8, 8)
    train = TensorDataset(images.repeat_interleave(4, 0), labels.repeat_interleave(4))
    stream = Blocks(train, TensorDataset(images, labels), tasks)
    module, meter = Classifier(2 * tasks), Meter()
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [
            meter,
            METHODS[method](),
            ForgettingTracker(),
            ForgettingDashboard(folder, run_id="run"),
            StreamCheckpoint(Path(folder) / "checkpoints"),
        ]
        trainer = pl.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=callbacks, default_root_dir=folder,
        )  # fmt: skip
        fit_stream(trainer, module, stream, evaluate_old=evaluate_old)
        sizes = {p.suffix: p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()}
    first = next(m for m in meter.memory if m["tasks"] >= tasks // 10)
    last, tenth = meter.memory[-1], max(1, tasks // 10)
    grown, explained = last["resident"] - first["resident"], last["held"] - first["held"]
    return {
        "method": method,
        "tasks": tasks,
        "evaluate_old": evaluate_old,
        "grown_bytes": grown,
        "explained_bytes": explained,
        "unexplained_share_of_memory": (grown - explained) / last["resident"],
        "seconds_first_tenth": sum(meter.seconds[1 : tenth + 1]) / tenth,
        "seconds_last_tenth": sum(meter.seconds[-tenth:]) / tenth,
        "seconds": sum(meter.seconds),
        "file_bytes": sizes,
        "task_seconds": [round(s, 4) for s in meter.seconds],
        "memory": meter.memory,
    }


_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")


def _panel(left: int, title: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    """One plot of 380 x 220, from zero, with a label at the largest value."""
    width, height, top = max(x for line in lines.values() for x, _ in line), 220, 40
    largest = max(y for line in lines.values() for _, y in line) or 1.0
    parts = [f'<text x="{left}" y="24">{title}</text>', f'<path d="M{left} {top}v{height}h380" class="axis"/>']
    for share in (0.0, 0.5, 1.0):
        y = top + height * (1 - share)
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{largest * share:.3g}</text>')
        parts.append(
            f'<text x="{left + 380 * share}" y="{top + height + 18}" text-anchor="middle">{width * share:.0f}</text>'
        )
    for number, (name, line) in enumerate(lines.items()):
        points = " ".join(f"{left + 380 * x / width:.1f},{top + height * (1 - y / largest):.1f}" for x, y in line)
        parts.append(f'<polyline points="{points}" stroke="{_COLORS[number % 4]}"/>')
        parts.append(f'<text x="{left + 10}" y="{top + 14 + 16 * number}" fill="{_COLORS[number % 4]}">{name}</text>')
    return "\n".join(parts)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Memory that has grown since the first measurement, and time per task as means of ten tasks."""
    memory: dict[str, list[tuple[float, float]]] = {}
    seconds: dict[str, list[tuple[float, float]]] = {}
    for r in results:
        start = r["memory"][0]
        memory[r["method"]] = [(m["tasks"], max(0, m["resident"] - start["resident"]) / 2**20) for m in r["memory"]]
        memory[f"{r['method']}, parameters"] = [(m["tasks"], (m["held"] - start["held"]) / 2**20) for m in r["memory"]]
        chunks = [r["task_seconds"][i : i + EVERY] for i in range(0, r["tasks"], EVERY)]
        seconds[r["method"]] = [(EVERY * (i + 1), sum(c) / len(c)) for i, c in enumerate(chunks)]
    style = "text{font:12px sans-serif}polyline{fill:none;stroke-width:1.5}.axis{fill:none;stroke:#666}"
    body = _panel(50, "memory grown (MiB) by task", memory) + _panel(500, "time per task (s)", seconds)
    head = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 290">'
    write_text(path, f'{head}<style>{style}</style><rect width="900" height="290" fill="#fff"/>{body}</svg>\n')


def main() -> None:
    """The command; results of other methods in the file stay."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=sorted(METHODS), choices=sorted(METHODS))
    parser.add_argument("--tasks", type=int, default=1000, help=f"a multiple of {COLUMNS * EVERY}")
    parser.add_argument("--evaluate-old", type=int, help="draw so many of the learned columns after each task")
    parser.add_argument("--out", type=Path, default=Path("long_stream"), help="stem of the .json and .svg")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    target = arguments.out.with_suffix(".json")
    known = json.loads(target.read_text(encoding="utf-8"))["results"] if target.exists() else []
    for method in arguments.methods:
        result = measure(method, arguments.tasks, arguments.evaluate_old)
        known = [r for r in known if r["method"] != method] + [result]
        print({k: v for k, v in result.items() if k not in ("memory", "task_seconds")}, flush=True)
        write_json(target, {"results": known})
    plot(known, arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
