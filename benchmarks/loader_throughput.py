"""Images a second: the glyph loader alone against training steps of vit_glyph, on one CPU thread.

python benchmarks/loader_throughput.py
"""

from __future__ import annotations

import time

import torch
from torch.nn.functional import cross_entropy

from cl_plugins.backbones import create_backbone
from cl_plugins.scenarios import build_scenario

BATCH = 64


def images_per_second(batches, step) -> float:
    started, n = time.perf_counter(), 0
    for images, labels in batches:
        step(images, labels)
        n += len(labels)
    return n / (time.perf_counter() - started)


torch.set_num_threads(1)
stream = build_scenario("split-glyphs-100", batch_size=BATCH)
model = create_backbone("vit_glyph", num_classes=stream.n_classes, pretrained=False)
optimizer = torch.optim.AdamW(model.parameters())


def train(images, labels) -> None:
    optimizer.zero_grad()
    cross_entropy(model(images), labels).backward()
    optimizer.step()


list(stream.train_dataloader())  # draws the characters
loaded = max(images_per_second(stream.train_dataloader(), lambda images, labels: None) for _ in range(5))
fixed = next(iter(stream.train_dataloader()))
trained = max(images_per_second([fixed] * 8, train) for _ in range(3))
both = max(images_per_second(stream.train_dataloader(), train) for _ in range(3))
print(f"loader {loaded:8.0f} images/s\nsteps  {trained:8.0f} images/s\nboth   {both:8.0f} images/s")
print(f"loading takes {100 * trained / loaded:.0f} % of the time of a step, without worker processes")
