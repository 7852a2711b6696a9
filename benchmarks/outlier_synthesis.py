"""Virtual outliers: scoring each draw once, or in two small products, against scoring every candidate.

    python benchmarks/outlier_synthesis.py                  # 2400 features of width 768, a task of 20 classes
    python benchmarks/outlier_synthesis.py --samples 5000 --classes 10 --out synthesis.json

Both sides give the same rows (checked). Times are the best of ``--repeats`` runs in CPU seconds on one thread, or in
seconds of wall time on a GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cl_plugins.neighbors import boundary_samples, kth_neighbor_distance, normalize_rows
from cl_plugins.outliers import VirtualOutliers

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--samples", type=int, default=2400)
parser.add_argument("--dim", type=int, default=768)
parser.add_argument("--classes", type=int, default=20)
parser.add_argument("--repeats", type=int, default=5)
parser.add_argument("--device", default="cpu")
parser.add_argument("--out", type=Path, default=None, help="also write the JSON line to this file")
args = parser.parse_args()

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
settings = VirtualOutliers()
centers = torch.randn(args.classes, args.dim, generator=generator)
labels = torch.randint(0, args.classes, (args.samples,), generator=generator)
features = (centers[labels] + torch.randn(args.samples, args.dim, generator=generator)).to(args.device)
noise = settings.noise(args.dim, generator).to(args.device)
n_out = settings.per_class * args.classes


def every_copy() -> Tensor:
    """All candidates of the reference mode, each draw as often as it is repeated."""
    candidates = (settings.noise_scale * noise).repeat(settings.n_boundary, 1)
    scores = kth_neighbor_distance(candidates, normalize_rows(features), settings.neighbors)
    # copies tie but for rounding: the order within a draw is immaterial
    return candidates[scores.topk(n_out).indices]


def every_candidate() -> Tensor:
    """All candidates of the boundary mode, one by one."""
    edge = features[boundary_samples(features, settings.neighbors, settings.n_boundary)]
    candidates = (edge[:, None] + settings.noise_scale * noise).flatten(0, 1)
    unit = normalize_rows(features)
    scores = kth_neighbor_distance(normalize_rows(candidates), unit, settings.neighbors)
    return candidates[scores.topk(n_out).indices]


def ours(mode: str) -> Callable[[], Tensor]:
    chosen = VirtualOutliers(mode=mode)

    def run() -> Tensor:
        out = chosen.synthesize(features, args.classes, noise)
        return out.rows if mode == "boundary" else out.rows.repeat_interleave(out.counts, 0)

    return run


def seconds(run: Callable[[], Tensor]) -> float:
    run()
    best = float("inf")
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    for _ in range(args.repeats):
        if args.device != "cpu":
            torch.cuda.synchronize()
        started = clock()
        run()
        if args.device != "cpu":
            torch.cuda.synchronize()
        best = min(best, clock() - started)
    return best


def share_of_same_rows(first: Tensor, second: Tensor) -> float:
    """Rows of ``first`` that are in ``second``, up to rounding."""
    return float((torch.cdist(first.double(), second.double()).amin(1) < 1e-3).double().mean())


results = []
for mode, direct in (("reference", every_copy), ("boundary", every_candidate)):
    fast = ours(mode)
    slow_s, fast_s, same = seconds(direct), seconds(fast), share_of_same_rows(fast(), direct())
    results.append({"mode": mode, "direct_s": slow_s, "ours_s": fast_s, "speedup": slow_s / fast_s, "same_rows": same})

print(f"{args.samples} features of width {args.dim}, {args.classes} classes, {n_out} outliers, {args.device}")
print(f"{'mode':<12}{'every candidate':>18}{'ours':>12}{'speedup':>10}{'same rows':>12}")
for r in results:
    times = f"{r['direct_s']:>16.3f} s{r['ours_s']:>10.4f} s{r['speedup']:>9.1f}x"
    print(f"{r['mode']:<12}{times}{100 * r['same_rows']:>11.1f}%")
record = {
    "benchmark": "outlier_synthesis",
    "samples": args.samples,
    "dim": args.dim,
    "classes": args.classes,
    "outliers": n_out,
    "device": args.device,
    "torch": torch.__version__,
    "machine": platform.machine(),
    "results": results,
}
print(json.dumps(record))
if args.out is not None:
    args.out.write_text(json.dumps(record) + "\n")
