"""A segmenter on the multi-scale maps of a frozen transformer: which pixels belong to the digit?

    python examples/dense_features.py --steps 200

`HierarchicalFeatures` follows timm's `features_only` convention: any decoder that reads a list of maps can stand on it.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cl_plugins.adapters import HierarchicalFeatures
from cl_plugins.backbones import create_backbone
from cl_plugins.scenarios import build_scenario


class Segmenter(nn.Module):
    def __init__(self, encoder: HierarchicalFeatures, width: int = 32) -> None:
        super().__init__()
        self.encoder = encoder
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in encoder.feature_info.channels())
        self.out = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        maps = [layer(m) for layer, m in zip(self.lateral, self.encoder(image), strict=True)]
        total = sum(F.interpolate(m, maps[0].shape[2:], mode="bilinear") for m in maps)
        return F.interpolate(self.out(total), image.shape[2:], mode="bilinear")[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.manual_seed(0)
    stream = build_scenario("split-digits", n_tasks=1, batch_size=64)
    model = Segmenter(HierarchicalFeatures(create_backbone("vit_glyph", num_classes=0)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    print(f"{sum(p.numel() for p in trained):,} parameters train beside a frozen backbone")
    batches = (batch for _ in range(options.steps) for batch in stream.train_dataloader())
    for step, (images, _) in zip(range(options.steps), batches, strict=False):
        target = (images.mean(1) > 0.5).float()
        loss = F.binary_cross_entropy_with_logits(model.train()(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:4d}, loss {loss.item():.3f}")
    with torch.no_grad():
        images, _ = next(iter(stream.test_loader(0)))
        target, predicted = images.mean(1) > 0.5, model.eval()(images) > 0
        overlap = (target & predicted).sum() / (target | predicted).sum()
    print(f"intersection over union {overlap:.3f}")


if __name__ == "__main__":
    main()
