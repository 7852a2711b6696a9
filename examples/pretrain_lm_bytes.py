"""Pretrain `lm_bytes`, the small causal language model in the package, on rules that are in no bundled stream.

It learns to follow an instruction on a word and to copy letters, so that a stream's first task starts from something.
The rules of the stream `instructions` are left out: neither their wordings nor their answers are seen.

    python examples/pretrain_lm_bytes.py --out weights
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from cl_plugins.causal_lm import CausalLM, LanguageModule
from cl_plugins.generation import answers
from cl_plugins.lm_bytes import LM_BYTES
from cl_plugins.scenarios import InstructionStream
from cl_plugins.scenarios.instruction_rules import RULES
from cl_plugins.scenarios.instructions import DEFAULT_RULES

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=3000)
parser.add_argument("--batch-size", type=int, default=8, help="per rule, four rules a step")
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--dim", type=int, default=LM_BYTES["dim"])
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--out", type=Path, default=Path("lm_bytes"))
args = parser.parse_args()

names = [n for n in RULES if n not in DEFAULT_RULES]
model = CausalLM(**{**LM_BYTES, "dim": args.dim}).to(args.device)
stream = InstructionStream(names, n_train=2 * args.steps * args.batch_size * 4 // len(names), n_test=50,
                           data_seed=10_000, batch_size=args.batch_size)  # fmt: skip
loaders = []
for k in range(len(names)):
    stream.task = k
    loaders.append(iter(stream.train_dataloader()))
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.05)
started = time.perf_counter()
bar = tqdm(range(args.steps), desc="lm_bytes")
for step in bar:
    total = 0.0
    for k in torch.randperm(len(names), generator=torch.Generator().manual_seed(step))[:4].tolist():
        batch = next(loaders[k], None)
        if batch is None:  # facts have few examples: begin anew
            stream.task = k
            loaders[k] = iter(stream.train_dataloader())
            batch = next(loaders[k])
        ids, mask, labels = (batch[key].to(args.device) for key in ("input_ids", "attention_mask", "labels"))
        loss = model(ids, mask, labels=labels).loss / 4
        loss.backward()
        total += float(loss.detach())
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    if step % 50 == 0:
        bar.set_postfix(loss=f"{total:.3f}")
print(f"{time.perf_counter() - started:.0f} s")

args.out.mkdir(parents=True, exist_ok=True)
save_file({k: v.cpu().contiguous() for k, v in model.state_dict().items()}, args.out / "lm_bytes.safetensors")
module = LanguageModule(model).eval()
for k, name in enumerate(names):
    batch = next(iter(stream.test_loader(k)))
    with torch.no_grad():
        made = answers(module, batch, stream.tokenizer, stream.max_new_tokens)
    hits = sum(m == o.strip() for m, o in zip(made, batch["outputs"], strict=True))
    print(f"{name:<18}{hits / len(made):.2f}")
