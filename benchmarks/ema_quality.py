"""Balanced averaging beside plain tuning and fixed decays: accuracy and forgetting, mean and deviation over seeds.

Streams: `instructions` (text tasks made from rules, a small causal LM that learned other rules first), `rotations`
(real digits turned further in every task, a small MLP) and `domain-glyphs` (characters in other fonts and states, an
MLP on the frozen features of the bundled backbone). Three sizes of each model tell whether a constant must be tuned
by size. Finished runs are kept in the folder and not repeated.

    python benchmarks/ema_quality.py --stream rotations --seeds 5
    python benchmarks/ema_quality.py --stream domain-glyphs --after-first --first-seed 7 --seeds 1 --images 7
    python benchmarks/ema_quality.py --stream domain-glyphs --after-first --seeds 5
    python benchmarks/ema_quality.py --stream instructions --sizes 96 --seeds 5 --device cuda
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset
from torchvision.transforms.functional import rotate

from cl_plugins import fit_stream
from cl_plugins.backbones import vit_glyph
from cl_plugins.benchmark import quiet_lightning
from cl_plugins.callbacks import BalancedEMA
from cl_plugins.causal_lm import CausalLM, LanguageModule
from cl_plugins.ema_rules import make_rule
from cl_plugins.lm_bytes import LM_BYTES, create_lm_bytes
from cl_plugins.scenarios import DomainIncremental, InstructionStream
from cl_plugins.scenarios.digits import load_digit_images
from cl_plugins.scenarios.glyph_domains import domain_glyphs
from cl_plugins.scenarios.instruction_rules import RULES
from cl_plugins.scenarios.instructions import DEFAULT_RULES

METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    **{f"fixed {d}": {"rule": "fixed", "decay": d} for d in (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)},
    **{f"horizon {k}": {"rule": "horizon", "keep": k} for k in (0.05, 0.1, 0.2, 0.4, 0.5, 0.6, 0.7)},
    "released": {"rule": "released"},
    "toolbox": {"rule": "toolbox"},
    "eq45": {"rule": "eq45"},
    **{f"dimension_free {r}": {"rule": "dimension_free", "rho": r} for r in (0.01, 0.02, 0.03, 0.05, 0.1)},
    "dimension_free 0.05 mu 0": {"rule": make_rule("dimension_free", rho=0.05, mu=0.0)},
    "dimension_free 0.05 global": {"rule": "dimension_free", "rho": 0.05, "granularity": "global"},
}
SIZES = {"instructions": (64, 96, 160), "rotations": (64, 128, 256), "domain-glyphs": (64, 128, 256)}
EPOCHS = {"instructions": 2, "rotations": 2, "domain-glyphs": 10}


class Perceptron(pl.LightningModule):
    """Two hidden layers, on 8 x 8 images or on features."""

    def __init__(self, width: int, inputs: int = 64, classes: int = 10) -> None:
        super().__init__()
        hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.net = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.net(x)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam over everything."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def rotations(step: float, seed: int) -> DomainIncremental:
    """Five tasks with all ten digits, turned by ``step`` degrees more in each."""
    train_x, train_y, test_x, test_y = load_digit_images(8)
    train_x, test_x = train_x[:, :1], test_x[:, :1]
    domains = [
        (TensorDataset(rotate(train_x, step * k), train_y), TensorDataset(rotate(test_x, step * k), test_y))
        for k in range(5)
    ]
    return DomainIncremental(domains, name="rotations", data_seed=seed, batch_size=32)


def glyph_features(images: int, seed: int, folder: Path) -> DomainIncremental:
    """The eight domains of `domain-glyphs` in an order of the seed, as features of the frozen backbone."""
    file = folder / f"glyph_features_{images}.pt"
    if not file.exists():
        stream = domain_glyphs(image_seed=images, batch_size=200)
        backbone = vit_glyph(pretrained=True, num_classes=0).eval()
        parts = []
        for k in range(len(stream.tasks)):
            stream.task = k
            for loader in (stream.train_dataloader(), stream.test_loader(k)):
                with torch.no_grad():
                    pairs = [(backbone(x), y) for x, y in loader]
                parts.append([torch.cat(values) for values in zip(*pairs, strict=True)])
        torch.save(parts, file)
    parts = torch.load(file, weights_only=True)
    domains = [(TensorDataset(*parts[i]), TensorDataset(*parts[i + 1])) for i in range(0, len(parts), 2)]
    return DomainIncremental(domains, name="domain-glyphs", order_seed=seed, data_seed=seed, batch_size=32)


def pretrained(size: int, steps: int, folder: Path, device: str) -> CausalLM:
    """A language model that learned the rules which are in no stream, so that the tasks build on something."""
    file = folder / f"base_{size}_{steps}.pt"
    model = CausalLM(dim=size, depth=4, heads=4)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model
    names = [n for n in RULES if n not in DEFAULT_RULES]
    stream = InstructionStream(names, n_train=64 * steps // len(names), n_test=4, data_seed=10_000, batch_size=8)
    loaders = []
    for k in range(len(names)):
        stream.task = k
        loaders.append(iter(stream.train_dataloader()))
    optimizer = torch.optim.AdamW(model.to(device).parameters(), lr=1e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100)
        for k in torch.randperm(len(names), generator=torch.Generator().manual_seed(step))[:4].tolist():
            batch = next(loaders[k])
            ids, mask, labels = (batch[key].to(device) for key in ("input_ids", "attention_mask", "labels"))
            (model(ids, mask, labels=labels).loss / 4).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.to("cpu")
    torch.save(model.state_dict(), file)
    return model


def run(stream_name: str, method: str, size: int, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One stream with one method; plain values."""
    folder: Path = arguments.out
    later = "_later" if arguments.after_first else ""
    file = folder / f"{stream_name}{later}_{method.replace(' ', '-')}_{size}_{seed}.json"
    if file.exists():
        record: dict[str, Any] = json.loads(file.read_text())
        return record
    stream: Any
    module: pl.LightningModule
    epochs = arguments.epochs or EPOCHS[stream_name]
    if stream_name == "rotations":
        stream = rotations(arguments.step, seed)
        pl.seed_everything(seed, verbose=False)
        module = Perceptron(size)
    elif stream_name == "domain-glyphs":
        stream = glyph_features(arguments.images, seed, folder)
        pl.seed_everything(seed, verbose=False)
        module = Perceptron(size, inputs=128, classes=50)
    else:
        bundled = size == LM_BYTES["dim"] and not arguments.pretrain
        base = create_lm_bytes() if bundled else pretrained(size, arguments.pretrain or 3000, folder, arguments.device)
        options = {"n_train": arguments.train, "n_test": arguments.test, "order_seed": seed, "data_seed": seed}
        stream = InstructionStream(list(DEFAULT_RULES), **options)
        module = LanguageModule(base, lr=1e-3)
    settings = METHODS[method]
    active: Any = "after_first" if arguments.after_first else "always"
    ema = None if settings is None else BalancedEMA(**settings, active=active)
    trainer = pl.Trainer(
        accelerator={"cuda": "gpu"}.get(arguments.device, arguments.device),
        devices=1,
        max_epochs=epochs,
        callbacks=[] if ema is None else [ema],
        gradient_clip_val=1.0 if stream_name == "instructions" else None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    result = fit_stream(trainer, module, stream, seed=seed)
    events = [] if ema is None else ema.report_events(module)
    shares = [e["fallback_share"] for e in events if e["fallback_share"] is not None]
    medians = [m for e in events for m in e["median"]]
    record = {
        "accuracy": result.average_accuracy,
        "forgetting": result.forgetting,
        "learning": result.learning_accuracy,
        "fallbacks": statistics.mean(shares) if shares else None,
        "median weight": statistics.median(medians) if medians else None,
        "seconds": time.perf_counter() - started,
    }
    file.write_text(json.dumps(record))
    return record


def table(stream_name: str, size: int, runs: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown, a row a method."""

    def cell(values: list[Any]) -> str:
        found = [100 * v for v in values if v is not None]
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        return f"{statistics.mean(found):.1f}{spread}" if found else ""

    lines = [f"{stream_name}, size {size}, {max(map(len, runs.values()))} seeds", ""]
    lines += [
        "| method | accuracy | forgetting | learning | fallbacks % | median weight % |",
        "|---|---|---|---|---|---|",
    ]
    for method, records in runs.items():
        keys = ("accuracy", "forgetting", "learning", "fallbacks", "median weight")
        lines.append(f"| {method} | " + " | ".join(cell([r[k] for r in records]) for k in keys) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stream", choices=sorted(SIZES), required=True)
    parser.add_argument("--sizes", type=int, nargs="*", help="widths of the model")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=0, help="domain-glyphs: seed of the images")
    parser.add_argument("--after-first", action="store_true", help="no average in the first task, as the paper has it")
    parser.add_argument("--epochs", type=int, default=0, help="per task; 0 for the stream's own number")
    parser.add_argument("--step", type=float, default=12.0, help="rotations: degrees from task to task")
    parser.add_argument("--train", type=int, default=2000, help="instructions: examples per task")
    parser.add_argument("--test", type=int, default=100, help="instructions: test prompts per task")
    parser.add_argument(
        "--pretrain",
        type=int,
        default=0,
        help="instructions: steps of the base model; 0 for the bundled one at its own width, else 3000",
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("runs/ema_quality"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    quiet_lightning()
    for size in arguments.sizes or SIZES[arguments.stream]:
        runs: dict[str, list[dict[str, Any]]] = {}
        for method in arguments.methods:
            seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
            runs[method] = [run(arguments.stream, method, size, seed, arguments) for seed in seeds]
        print(table(arguments.stream, size, runs), flush=True)


if __name__ == "__main__":
    main()
