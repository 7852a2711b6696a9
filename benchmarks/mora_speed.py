"""Cost of MoRA's experts against LoRA and against masking, forward plus backward, side by side in one run.

    python benchmarks/mora_speed.py --out mora_speed.json

Three adapters of the same total rank R on one layer: LoRA (all R trainable), MoRA after R / 16 tasks (16 trainable),
and the same experts as full masks and full products with autograd. Measured are the adapters alone, without the layer
that they add to. Rounds of the three are interleaved and ratios taken within a round, so a loaded machine disturbs them
little; on a CPU the process's CPU time counts, on a GPU the time on the device.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from cl_plugins.adapters.lora import LowRank
from cl_plugins.adapters.rank_experts import ExpertOptions, RankExperts


class Masked(nn.Module):
    """The experts in the plain form: one weight of all experts, all scores masked, all products, autograd."""

    def __init__(self, bank: RankExperts) -> None:
        super().__init__()
        self.bank = bank

    def forward(self, x: Tensor) -> Tensor:
        """The same sum as the bank's."""
        bank = self.bank
        keys = torch.cat([bank.old_keys[0], bank.new_keys[0]])
        values = torch.cat([bank.old_values[0], bank.new_values[0]])
        z = x @ keys.T
        s = nn.functional.normalize(z, dim=-1)
        index = s.topk(bank.top_k, dim=-1).indices
        hidden = torch.ones_like(s, dtype=torch.bool).scatter_(-1, index, False)
        w = (s / bank.options.temperature).masked_fill(hidden, -math.inf).softmax(-1)
        return bank.options.scaling * (w * z) @ values


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of all distinct tensors that wait for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = module(x)  # until the hooks have seen everything, so that no address is used twice
    del kept
    return sum(seen.values())


def step(module: nn.Module, x: Tensor, grad: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    if x.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        module(x).backward(grad)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.process_time()
    module(x).backward(grad)
    return time.process_time() - started


def measure(total: int, dim: int, out: int, tokens: int, rounds: int, device: str, evaluation: str, dtype: str) -> dict:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, dim, generator=generator).to(device).requires_grad_()
    kind = getattr(torch, dtype)
    bank = RankExperts(dim, out, ExpertOptions(evaluation=evaluation), device=torch.device(device))
    for task in range(total // 16):
        bank.grow(task)
    for values in (bank.old_values, bank.new_values):
        values.data.normal_()
    lora = LowRank(dim, out, total, device=torch.device(device))
    modules = {"lora": lora, "mora": bank, "masked": Masked(bank)}
    seconds: dict[str, list[float]] = {name: [] for name in modules}
    with torch.autocast(device, dtype=kind, enabled=kind != torch.float32):
        grad = torch.randn(tokens, out, generator=generator).to(device, kind)
        for i in range(rounds + 3):
            for name, module in modules.items():
                taken = step(module, x, grad)
                if i >= 3:  # the first rounds fill caches
                    seconds[name].append(taken)
                x.grad = None
                module.zero_grad()
        size = {name: saved_bytes(module, x) for name, module in modules.items()}

    def ratio(a, b):
        return statistics.median(p / q for p, q in zip(seconds[a], seconds[b], strict=True))

    return {
        "rank": total,
        "dim": dim,
        "out": out,
        "tokens": tokens,
        "evaluation": evaluation,
        "dtype": dtype,
        "device": device,
        "milliseconds": {name: 1e3 * statistics.median(s) for name, s in seconds.items()},
        "mora_over_lora": ratio("mora", "lora"),
        "masked_over_mora": ratio("masked", "mora"),
        "saved_bytes": size,
        "saved_mora_over_lora": size["mora"] / size["lora"],
        "saved_masked_over_lora": size["masked"] / size["lora"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 160, 256])
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--out-features", type=int, nargs="+", default=[768])
    parser.add_argument("--tokens", type=int, default=1576, help="8 images of 197 tokens")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--evaluation", nargs="+", default=["dense", "auto"], choices=["dense", "bag", "auto"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    for out in options.out_features:
        for total in options.ranks:
            for evaluation in options.evaluation:
                row = measure(
                    total, options.dim, out, options.tokens, options.rounds, options.device, evaluation, options.dtype
                )  # fmt: skip
                rows.append(row)
                times = "  ".join(f"{name} {ms:7.2f} ms" for name, ms in row["milliseconds"].items())
                saved = {n: row["saved_bytes"][n] / row["saved_bytes"]["lora"] for n in ("mora", "masked")}
                print(
                    f"R={total:<4} out={out:<5} {evaluation:<6} {times}   MoRA/LoRA {row['mora_over_lora']:.2f}"
                    f"  masked/MoRA {row['masked_over_mora']:.2f}"
                    f"  saved bytes: MoRA/LoRA {saved['mora']:.2f}, masked/LoRA {saved['masked']:.2f}",
                    flush=True,
                )
    if options.out is not None:
        name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        record = {"processor": name, "threads": options.threads, "versions": versions, "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
