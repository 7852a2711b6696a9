"""What ten tasks of MoRA add to a ViT-B/16: trainable parameters, checkpoint and time of a step, task by task.

    python benchmarks/mora_growth.py --out mora_growth.json

The model is random and the images are noise: neither changes sizes or times. On a CPU the process's CPU time counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import timm
import torch
from torch.nn.functional import cross_entropy

from cl_plugins import Task
from cl_plugins.callbacks import MoRA


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=options.tasks).to(options.device)
    base = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    method = MoRA(rank=options.rank, seed=0)
    method.install(model)
    images = torch.randn(options.batch_size, 3, 224, 224, device=options.device)
    rows = []
    print("task  trainable  checkpoint MB  added MB  step ms")
    for task in range(options.tasks):
        method.start_task(model, Task(task, (task,)))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
        labels = torch.full((options.batch_size,), task, device=options.device)
        clock = time.perf_counter if options.device == "cuda" else time.process_time
        times = []
        for _ in range(options.steps + 1):
            started = clock()
            loss = cross_entropy(model.train()(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if options.device == "cuda":
                torch.cuda.synchronize()
            times.append(clock() - started)
        method.end_task(model, Task(task, (task,)))
        size = sum(v.numel() * v.element_size() for v in model.state_dict().values())
        row = {
            "task": task,
            "trainable_parameters": sum(p.numel() for p in trained),
            "checkpoint_bytes": size,
            "added_bytes": size - base,
            "step_seconds": statistics.median(times[1:]),
        }
        rows.append(row)
        print(
            f"{task:4}  {row['trainable_parameters']:9,}  {size / 1e6:13.1f}  {row['added_bytes'] / 1e6:8.1f}"
            f"  {1e3 * row['step_seconds']:7.0f}",
            flush=True,
        )
    if options.out is not None:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        options.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
