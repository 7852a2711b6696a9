"""Pretrain `clip_glyph`, the small vision-language model in the package: images of characters and their Unicode names.

300 characters are held out: their images and names are not used, so they measure zero-shot classification. The image
tower starts from `vit_glyph`. Every step draws new images; nothing is stored.

    python examples/pretrain_clip_glyph.py --out weights
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from tqdm import tqdm

from cl_plugins.backbones import VIT_GLYPH, create_backbone
from cl_plugins.clip_glyph import CONTEXT_LENGTH, HELD_OUT, NameTokenizer
from cl_plugins.scenarios.glyphs import FACES, TEST_FACES, Stencils, glyph_classes, glyph_name, render, stream_classes

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=2400)
parser.add_argument("--batch-size", type=int, default=192)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--weight-decay", type=float, default=0.05)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
parser.add_argument("--out", type=Path, default=Path("clip_glyph"))
args = parser.parse_args()


def copy_image_tower(visual: nn.Module, vit: nn.Module) -> None:
    """Give open_clip's vision transformer the weights of timm's; both then compute the same tokens."""
    source, target = vit.state_dict(), {}
    target["conv1.weight"] = source["patch_embed.proj.weight"]
    target["class_embedding"] = source["cls_token"][0, 0]
    position = source["pos_embed"][0].clone()
    position[1:] += source["patch_embed.proj.bias"]  # open_clip's patch embedding has no bias of its own
    target["positional_embedding"] = position
    names = {
        "norm1": "ln_1", "norm2": "ln_2", "attn.proj": "attn.out_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    for i in range(VIT_GLYPH["depth"]):
        there, here = f"blocks.{i}", f"transformer.resblocks.{i}"
        for part in ("weight", "bias"):
            target[f"{here}.attn.in_proj_{part}"] = source[f"{there}.attn.qkv.{part}"]
            for a, b in names.items():
                target[f"{here}.{b}.{part}"] = source[f"{there}.{a}.{part}"]
    target["ln_post.weight"], target["ln_post.bias"] = source["norm.weight"], source["norm.bias"]
    left = visual.load_state_dict(target, strict=False)
    assert left.missing_keys == ["proj"], left
    assert not left.unexpected_keys, left


torch.manual_seed(args.seed)
rng = np.random.default_rng(args.seed)
args.out.mkdir(parents=True, exist_ok=True)
held_out = stream_classes(HELD_OUT)
everything = glyph_classes()
classes = tuple(c for c in everything if c not in set(held_out))
words = sorted({w for c in everything for w in NameTokenizer.split(glyph_name(c))})
tokenize = NameTokenizer(words)
config = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": VIT_GLYPH["img_size"],
        "patch_size": VIT_GLYPH["patch_size"],
        "width": VIT_GLYPH["embed_dim"],
        "layers": VIT_GLYPH["depth"],
        "head_width": VIT_GLYPH["embed_dim"] // VIT_GLYPH["num_heads"],
        "no_ln_pre": True,
        "norm_kwargs": {"eps": 1e-6},
    },
    "text_cfg": {"context_length": CONTEXT_LENGTH, "vocab_size": 4 + len(words), "width": 128, "heads": 4, "layers": 3},
}
(args.out / "clip_glyph.json").write_text(json.dumps(config, indent=1) + "\n")
(args.out / "clip_glyph_words.json").write_text(json.dumps(words) + "\n")
open_clip.add_model_config(args.out / "clip_glyph.json")
model = open_clip.create_model("clip_glyph")
vit = create_backbone("vit_glyph", 0).eval()
copy_image_tower(model.visual, vit)
with torch.no_grad():
    probe = torch.rand(2, 3, 32, 32)
    projected = vit(probe) @ model.visual.proj
    assert torch.allclose(model.eval().encode_image(probe), projected, atol=1e-4)
model.to(args.device).train()

stencils = Stencils(classes, FACES)
tokens = tokenize([glyph_name(c) for c in classes]).to(args.device)
decayed = [p for p in model.parameters() if p.ndim >= 2]
others = [p for p in model.parameters() if p.ndim < 2]
groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=args.lr)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps, pct_start=0.1)

started = time.perf_counter()
progress = tqdm(range(args.steps), unit="step", mininterval=2)
running = 0.0
for step in progress:
    labels = rng.permutation(len(classes))[: args.batch_size]  # no character twice: each is the only match of its name
    images = render(stencils, labels, rng.integers(0, 2**63, len(labels)).astype(np.uint64)).to(args.device)
    f = normalize(model.encode_image(images), dim=1)
    t = normalize(model.encode_text(tokens[torch.from_numpy(labels).to(args.device)]), dim=1)
    logits = model.logit_scale.exp() * f @ t.T
    targets = torch.arange(len(labels), device=args.device)
    loss = (cross_entropy(logits, targets) + cross_entropy(logits.T, targets)) / 2
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, float(np.log(100)))
    if step % 50 == 0:
        accuracy = (logits.argmax(1) == targets).float().mean().item()
        running = accuracy if step == 0 else 0.8 * running + 0.2 * accuracy
        progress.set_postfix(loss=f"{loss.item():.2f}", accuracy=f"{running:.3f}")
seconds = time.perf_counter() - started

weights = args.out / "clip_glyph.safetensors"
save_file({k: v.detach().cpu().half().contiguous() for k, v in model.state_dict().items()}, str(weights))
model = open_clip.create_model("clip_glyph", pretrained=str(weights)).to(args.device).eval()


@torch.no_grad()
def text_features(code_points: tuple[int, ...]) -> Tensor:
    return normalize(model.encode_text(tokenize([glyph_name(c) for c in code_points]).to(args.device)), dim=1)


@torch.no_grad()
def zero_shot(code_points: tuple[int, ...], among: tuple[int, ...], per_class: int = 8) -> float:
    """Top-1 accuracy on fresh images in the fonts that streams keep for testing."""
    labels = np.repeat(np.arange(len(code_points)), per_class)
    seeds = np.random.default_rng(args.seed + 1).integers(0, 2**63, len(labels)).astype(np.uint64)
    images = render(Stencils(code_points, TEST_FACES), labels, seeds)
    texts = text_features(among)
    position = torch.tensor([among.index(c) for c in code_points])[torch.from_numpy(labels)]
    predicted = torch.cat(
        [(model.encode_image(b.to(args.device)) @ texts.T).argmax(1).cpu() for b in images.split(256)]
    )
    return (predicted == position).float().mean().item()


card = {
    "steps": args.steps,
    "batch_size": args.batch_size,
    "seconds": round(seconds),
    "device": args.device,
    "characters": len(classes),
    "words": len(words),
    "batch_accuracy_last": round(running, 4),
    "held_out_among_held_out": round(zero_shot(held_out, held_out), 4),
    "held_out_among_all": round(zero_shot(held_out, everything, 4), 4),
    "trained_among_all": round(zero_shot(tuple(rng.permutation(classes)[:300].tolist()), everything, 4), 4),
}
(args.out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
print(json.dumps(card, indent=1))
