"""Pretrain `vit_glyph`, the small backbone in the package: a timm VisionTransformer that tells 400 glyphs apart.

No stream of this library contains any of these 400 characters. Every step draws new images; nothing is stored.

    python examples/pretrain_vit_glyph.py --out vit_glyph.safetensors
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from timm.models.vision_transformer import VisionTransformer
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from cl_plugins.backbones import VIT_GLYPH
from cl_plugins.scenarios.digits import load_digit_images
from cl_plugins.scenarios.glyphs import FACES, Stencils, pretraining_classes, render

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=4500)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--lr", type=float, default=1.5e-3)
parser.add_argument("--weight-decay", type=float, default=0.05)
parser.add_argument("--label-smoothing", type=float, default=0.1)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--out", type=Path, default=Path("vit_glyph.safetensors"))
args = parser.parse_args()

torch.manual_seed(args.seed)
rng = np.random.default_rng(args.seed)
classes = pretraining_classes()
stencils = Stencils(classes, FACES)
model = VisionTransformer(**VIT_GLYPH, num_classes=len(classes)).to(args.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)

started = time.perf_counter()
progress = tqdm(range(args.steps), unit="step", mininterval=2)
running = 0.0
for step in progress:
    labels = rng.integers(0, len(classes), args.batch_size)
    seeds = rng.integers(0, 2**63, args.batch_size).astype(np.uint64)
    images = render(stencils, labels, seeds).to(args.device)
    targets = torch.from_numpy(labels).to(args.device)
    logits = model(images)
    loss = cross_entropy(logits, targets, label_smoothing=args.label_smoothing)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    if step % 50 == 0:
        accuracy = (logits.argmax(1) == targets).float().mean().item()
        running = accuracy if step == 0 else 0.8 * running + 0.2 * accuracy
        progress.set_postfix(loss=f"{loss.item():.2f}", accuracy=f"{running:.3f}")
seconds = time.perf_counter() - started

model.reset_classifier(0)
model.eval()
save_file({k: v.detach().cpu().half().contiguous() for k, v in model.state_dict().items()}, str(args.out))


@torch.no_grad()
def features(images: torch.Tensor) -> np.ndarray:
    return torch.cat([model(part.to(args.device)).cpu() for part in images.split(256)]).numpy()


train_x, train_y, test_x, test_y = load_digit_images()
train_f, test_f = features(train_x), features(test_x)
probe = LogisticRegression(max_iter=5000).fit(train_f, train_y).score(test_f, test_y)
means = torch.nn.functional.normalize(
    torch.stack([torch.from_numpy(train_f[train_y.numpy() == c]).mean(0) for c in range(10)]), dim=1
)
nearest = (torch.nn.functional.normalize(torch.from_numpy(test_f), dim=1) @ means.T).argmax(1)
card = {
    "steps": args.steps,
    "batch_size": args.batch_size,
    "seconds": round(seconds),
    "device": args.device,
    "train_accuracy_last": round(running, 4),
    "digits_linear_probe": round(float(probe), 4),
    "digits_nearest_mean": round(float((nearest == test_y).float().mean()), 4),
}
args.out.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
print(json.dumps(card, indent=1))
