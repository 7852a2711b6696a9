"""What side networks save: bytes that autograd keeps and time per step, against full fine-tuning in the same run.

    python benchmarks/side_memory.py                        # bytes for ViT-Ti, -S, -B; step times for ViT-Ti and -S
    python benchmarks/side_memory.py --sizes Ti --no-bytes  # times alone
    python benchmarks/side_memory.py --no-bytes --timed     # reading of cached taps alone
    python benchmarks/side_memory.py --device cuda          # peak memory of the device as well
    python benchmarks/side_memory.py --recipes              # recipes of cl-bench on the bundled backbone, bytes alone
    python benchmarks/side_memory.py --text                 # beside the text tower of open_clip's ViT-B-32, bytes alone

Bytes: distinct storages that a forward pass with loss saves for backward, without parameters, buffers and images.
Times: forward, backward and fused AdamW, the methods one after the other in each round, best of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from cl_plugins import ContinualCallback, Task
from cl_plugins.cache_entry import CacheEntry
from cl_plugins.callbacks import (
    CacheFeatures,
    FrozenBackbone,
    HierarchicalSideTuning,
    LadderSideTuning,
    LeanHierarchicalSideTuning,
    LoRA,
    Sherl,
)
from cl_plugins.feature_cache import CacheKey, FeatureCache

MODELS = {"Ti": "vit_tiny_patch16_224", "S": "vit_small_patch16_224", "B": "vit_base_patch16_224"}
METHODS: dict[str, Callable[[], ContinualCallback | None]] = {
    "full fine-tuning": lambda: None,
    "LoRA qkv r8": lambda: LoRA(8, ["qkv"], qkv_mode="fused"),
    "LST r8": lambda: LadderSideTuning(8, "none", init="random"),
    "LST r8, quarter dropped": lambda: LadderSideTuning(8, "quarter", init="random"),
    "LST r16": lambda: LadderSideTuning(16, "none", init="random"),
    "SHERL r8": lambda: Sherl(8),
    "HST lean": lambda: LeanHierarchicalSideTuning(),
    "HST as published": lambda: HierarchicalSideTuning(),
    "linear": lambda: FrozenBackbone(),
}
TIMED = ("full fine-tuning", "LoRA qkv r8", "LST r8", "LST r8, quarter dropped", "SHERL r8")
CACHED = ("LST r8", "LST r8, quarter dropped", "SHERL r8")
TASK = Task(0, tuple(range(100)))


def build(size: str, method: str, device: str) -> tuple[nn.Module, ContinualCallback | None]:
    """A model with a method at work."""
    torch.manual_seed(0)
    model = timm.create_model(MODELS[size], num_classes=100).to(device)
    plugin = METHODS[method]()
    if plugin is not None:
        plugin.install(model)
        plugin.start_task(model, TASK)
    return model.to(device).train(), plugin


def saved_bytes(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Bytes that autograd keeps in a forward pass with loss."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = cross_entropy(model(x), y)
    for tensor in (*model.parameters(), *model.buffers(), x):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del loss
    return sum(kept.values())


class _Stream:
    """One task of random images: what the cache asks a stream for."""

    name, n_classes, task, tasks = "random", 100, 0, (TASK,)

    def __init__(self, n: int, batch_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(n, 3, 224, 224, generator=generator)
        self.data = TensorDataset(images, torch.randint(0, 100, (n,), generator=generator))
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, self.batch_size, shuffle=True, generator=torch.Generator().manual_seed(0))

    def test_loader(self, index: int) -> DataLoader:
        return DataLoader(self.data, self.batch_size)

    train_loader_for_features = test_loader


def recipes(batch: int = 32, classes: int = 10) -> dict[str, tuple[int, float]]:
    """Trained parameters and saved bytes per image in a recipe's first task on the bundled backbone."""
    from cl_plugins.backbones import vit_glyph
    from cl_plugins.benchmark import build_callbacks
    from cl_plugins.recipes import load_recipe

    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = {}
    for name in ("joint", "lora", "frozen-linear", "lst", "sherl", "side-tuning", "hst-lean", "hst"):
        model = vit_glyph(pretrained=True, num_classes=100)
        for plugin in build_callbacks(load_recipe(name, "split-glyphs-100"), 0):
            plugin.install(model)
            plugin.start_task(model, Task(0, tuple(range(classes))))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found[name] = (trained, saved_bytes(model.train(), x, torch.arange(batch) % classes) / batch)
    return found


class _Texts(nn.Module):
    """A classifier on a text tower."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        from open_clip.transformer import TextTransformer

        self.tower = TextTransformer(**sizes)
        self.classifier = nn.Linear(512, 100)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.tower(ids))
        return logits


def texts(batch: int = 4, **sizes: int) -> dict[str, float]:
    """Saved bytes per text of 77 tokens beside a text tower, by default that of open_clip's ViT-B-32."""
    ids = torch.randint(1, 1000, (batch, 77), generator=torch.Generator().manual_seed(0))
    ids[:, 40] = 1001
    found = {}
    for name in ("full fine-tuning", "LST r8", "LST r8, quarter dropped", "LST r16", "SHERL r8"):
        torch.manual_seed(0)
        model = _Texts(**{"width": 512, "heads": 8, "layers": 12, "vocab_size": 49408, **sizes})
        plugin = METHODS[name]()
        if plugin is not None:
            plugin.install(model)
            plugin.start_task(model, TASK)
        found[name] = saved_bytes(model.train(), ids, torch.arange(batch)) / batch
    return found


def steps(size: str, batch: int, rounds: int, device: str) -> dict[str, float]:
    """Seconds per step of each method, interleaved, on the processor's clock where there is no other device."""
    runs: dict[str, Callable[[], None]] = {}
    for method in TIMED:
        for cached in (False, True) if method in CACHED else (False,):
            model, _ = build(size, method, device)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
            stream = _Stream(2 * batch, batch)
            loader = stream.train_dataloader()
            if cached:
                source = CacheFeatures(progress=False).open(model, stream)
                loader = source.train_dataloader()
                model.train()

            def run(model=model, optimizer=optimizer, loader=loader) -> None:
                x, y = next(iter(loader))
                optimizer.zero_grad(set_to_none=True)
                cross_entropy(model(x.to(device)), y.to(device)).backward()
                optimizer.step()

            runs[method + (", cached" if cached else "")] = run
    best = dict.fromkeys(runs, float("inf"))
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            clock = time.process_time if device == "cpu" else time.perf_counter
            if device != "cpu":
                torch.cuda.synchronize()
            started = clock()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            if round_:  # the first one warms up
                best[name] = min(best[name], clock() - started)
    return best


def reading(n: int = 192, batch: int = 16, dim: int = 192, rounds: int = 15) -> dict[str, tuple[float, float]]:
    """GB/s of an epoch over the taps of ViT-Ti in random order, and its share of a copy's speed.

    The copy moves as many bytes, row after row, into memory that is held. Each epoch is timed beside a copy of its own,
    both behind a pass over other memory, so that neither finds its data in the processor's cache; the share is the
    median over the rounds, the speed the best one. Bytes are those of the taps as they are handed out.
    """
    taps = {f"tap.{i}": torch.randn(n, 197, dim) for i in range(13)}
    labels, key = torch.zeros(n, dtype=torch.int64), CacheKey("read")
    caches = {
        "taps in memory": FeatureCache(byte_budget=4 << 30, progress=False),
        "taps in a mapped file": FeatureCache(byte_budget=0, progress=False),
        "taps in memory, float16": FeatureCache(byte_budget=4 << 30, dtype=torch.float16, progress=False),
    }
    entries = {
        name: cache.fill(replace(key, dtype=cache.dtype_name), [(taps, labels)], n) for name, cache in caches.items()
    }
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    source = torch.cat([tap.flatten(1) for tap in taps.values()], 1)
    target, others, nbytes = torch.empty(batch, source.shape[1]), torch.ones(source.numel()), source.nbytes
    del taps

    def copy() -> None:
        for i in range(0, n, batch):
            target.copy_(source[i : i + batch])

    def read(entry: CacheEntry) -> None:
        for i in range(0, n, batch):
            entry.read(order[i : i + batch])

    def seconds(run: Callable[[], None]) -> float:
        others.sum()
        started = time.thread_time()
        run()
        return time.thread_time() - started

    runs = {"a copy": copy, **{name: partial(read, entry) for name, entry in entries.items()}}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            pair = seconds(copy), seconds(run)
            if round_:  # the first one warms up
                spent[name].append(pair)
    for cache in caches.values():
        cache.close()
    return {
        name: (nbytes / min(b for _, b in pairs) / 1e9, statistics.median(a / b for a, b in pairs))
        for name, pairs in spent.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--timed", nargs="*", default=["Ti", "S"], choices=list(MODELS))
    parser.add_argument("--batch", type=int, default=0, help="images per step; 2 (B: 1) for bytes, 8, 4, 1 for times")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-bytes", action="store_true")
    parser.add_argument("--json", help="write the numbers into this file")
    parser.add_argument("--recipes", action="store_true", help="bytes of the recipes on the bundled backbone alone")
    parser.add_argument("--text", action="store_true", help="bytes beside a text tower alone")
    options = parser.parse_args()
    if options.recipes:
        for name, (trained, size_) in recipes().items():
            print(f"  {name:16s} {trained:>9,} trained parameters {size_ / 2**10:8.0f} KiB per image")
    if options.text:
        row = texts()
        for name, value in row.items():
            print(f"  {name:26s} {value / 2**20:8.2f} MiB per text  {value / row['full fine-tuning']:.3f}")
    if options.recipes or options.text:
        return
    numbers: dict[str, dict[str, Any]] = {"bytes": {}, "seconds": {}, "peak": {}, "reading": {}}
    for size in [] if options.no_bytes else options.sizes:
        batch = options.batch or (1 if size == "B" else 2)
        g = torch.Generator().manual_seed(0)
        x = torch.randn(batch, 3, 224, 224, generator=g).to(options.device)
        y = torch.randint(0, 100, (batch,), generator=g).to(options.device)
        row, peak = {}, {}
        for method in METHODS:
            model, _ = build(size, method, options.device)
            row[method] = saved_bytes(model, x, y) / batch
            if options.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
                cross_entropy(model(x), y).backward()
                peak[method] = torch.cuda.max_memory_allocated()
        numbers["bytes"][size], numbers["peak"][size] = row, peak
        print(f"\nViT-{size}, MiB per image saved for backward (ratio to full fine-tuning)")
        for method, value in row.items():
            extra = f"   peak {peak[method] / 2**20:8.0f} MiB" if peak else ""
            print(f"  {method:26s} {value / 2**20:8.2f}  {value / row['full fine-tuning']:.3f}{extra}", flush=True)
    for size in options.timed:
        batch = options.batch or {"Ti": 8, "S": 4, "B": 1}[size]
        row = steps(size, batch, options.rounds, options.device)
        numbers["seconds"][size] = row
        print(f"\nViT-{size}, batch {batch}, seconds per step (ratio to full fine-tuning)")
        for method, value in row.items():
            print(f"  {method:32s} {value:8.3f}  {value / row['full fine-tuning']:.3f}", flush=True)
        for method in CACHED:
            cached = row[f"{method}, cached"]
            full = row["full fine-tuning"]
            print(f"  cache: {method} {row[method] / cached:.1f}x faster, full / cached {full / cached:.1f}")
    numbers["reading"]["Ti"] = reading()
    print("\nReading taps of ViT-Ti in random order, GB/s and share of a copy (the mapped file is in the page cache)")
    for what, (rate, share) in numbers["reading"]["Ti"].items():
        print(f"  {what:32s} {rate:6.2f}  {share:.3f}")
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(numbers, file, indent=1)


if __name__ == "__main__":
    main()
