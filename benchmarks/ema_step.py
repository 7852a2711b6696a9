"""Cost of one step of balanced averaging, beside torch's own multi-tensor moving average on the same tensors.

    python benchmarks/ema_step.py                   # a few seconds on a CPU
    python benchmarks/ema_step.py --device cuda --scale 16

Columns: `one weight` and `a weight each` are the averaging itself (E <- E + alpha (theta - E) over all tensors), as the
default rule and as the balanced rule need it, to be compared with torch, which has one weight for all; `torch each` is
torch's multi-tensor call with a list of weights. `whole step` adds what the balanced rule needs beyond it: three L1
sums, two differences, one copy.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cl_plugins.ema import BalancedAverager
from cl_plugins.tensor_lists import interpolate_

LORA = "24 layers x 7 projections, rank 16, width 512"
SMALL = "160 tensors of 4,096 elements"


def shapes(kind: str, scale: int) -> list[tuple[int, ...]]:
    if kind == SMALL:
        return [(64, 64 * scale)] * 160
    return [s for _ in range(24 * 7) for s in ((16, 512 * scale), (512 * scale, 16))]


def milliseconds(steps: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """Median of each step over repeats, in turns, so that a busy machine slows all alike, each from an idle device."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats + 3):
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - started)
    return {name: 1e3 * sorted(found[3:])[repeats // 2] for name, found in times.items()}


def measure(kind: str, device: str, scale: int, repeats: int) -> dict[str, float]:
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(s, generator=g).to(device) for s in shapes(kind, scale)]
    grads = [0.01 * torch.randn(s, generator=g).to(device) for s in shapes(kind, scale)]
    other = [0.01 * torch.randn(s, generator=g).to(device) for s in shapes(kind, scale)]
    averages: list[Tensor] = [w + 0.1 for w in weights]
    theirs = get_ema_multi_avg_fn(0.99)
    alpha = torch.full((len(weights),), 0.01, device=device)
    each = alpha.tolist() if device == "cpu" else list(alpha.unbind())
    averager = BalancedAverager("released")
    averager.join([str(i) for i in range(len(weights))], [w + 0.1 for w in weights])
    turn = [grads, other]

    def whole() -> None:
        turn.reverse()
        averager.update(weights, turn[0])

    def loop() -> None:
        """The arithmetic of the rule tensor by tensor, with a host synchronization each."""
        for e, w, q, d in zip(averages, weights, grads, other, strict=True):
            a, b, c = (w - e).abs().sum(), d.abs().sum(), (d - q).abs().sum()
            weight = float(2 * (1 + b) / (a * c))
            e.mul_(1 - weight).add_(w, alpha=weight) if 0 < weight < 1 else e.mul_(0.99).add_(w, alpha=0.01)

    with torch.no_grad():
        steps: dict[str, Callable[[], object]] = {
            "torch": lambda: theirs(averages, weights, 1),
            "one weight": lambda: interpolate_(averages, weights, 0.01),
            "torch each": lambda: torch._foreach_lerp_(averages, weights, each),
            "a weight each": lambda: interpolate_(averages, weights, alpha),
        }
        numbers = milliseconds(steps, device, 5 * repeats)
        numbers |= milliseconds({"whole": whole, "loop": loop}, device, repeats)
    numbers["elements"] = sum(w.numel() for w in weights)
    numbers["bytes per element"] = averager.state_bytes() / numbers["elements"]
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--scale", type=int, default=1, help="widens every tensor")
    parser.add_argument("--repeats", type=int, default=31)
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, {arguments.device}, {torch.get_num_threads()} threads, milliseconds (median)")
    heads = ["elements", "torch", "one weight", "ratio", "torch each", "a weight each", "ratio"]
    heads += ["whole step", "loop", "B/elem"]
    print(f"{'tensors':<48}" + "".join(f"{h:>14}" for h in heads))
    for kind in (SMALL, LORA):
        m = measure(kind, arguments.device, arguments.scale, arguments.repeats)
        one, each = (m[name] / m["torch"] for name in ("one weight", "a weight each"))
        cells = (m["torch"], m["one weight"], one, m["torch each"], m["a weight each"], each)
        cells = (*cells, m["whole"], m["loop"], m["bytes per element"])
        print(f"{kind:<48}{int(m['elements']):>14,}" + "".join(f"{c:>14.2f}" for c in cells))


if __name__ == "__main__":
    main()
