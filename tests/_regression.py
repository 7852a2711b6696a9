"""A tiny regression that records the weights it was evaluated with, for tests of averaging."""

from __future__ import annotations

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset


def regression_data(n: int = 32, seed: int = 0, batch_size: int = 4, equal_batches: bool = False) -> DataLoader:
    """Batches of a smooth target; equal ones do not depend on where a plain loader starts again after a resume."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=g)
    if equal_batches:
        x = x[:batch_size].repeat(n // batch_size, 1)
    return DataLoader(TensorDataset(x, x[:, :2].sin()), batch_size=batch_size)


class Regression(pl.LightningModule):
    def __init__(self, lr: float = 0.05, late_layer: bool = False, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        self.lr, self.late_layer = lr, late_layer
        self.seen: dict[str, list[torch.Tensor]] = {"validation": [], "test": [], "steps": []}

    def setup(self, stage):
        if self.late_layer and not hasattr(self, "late"):
            self.late = nn.Linear(2, 2)

    def forward(self, x):
        y = self.net(x)
        return self.late(y) if self.late_layer else y

    def training_step(self, batch, batch_idx):
        return mse_loss(self(batch[0]).float(), batch[1].float())  # torch 2.5 has none for bfloat16

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.seen["validation"].append(self.net[0].weight.detach().clone())

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(self.net[0].weight.detach().clone())

    def on_train_batch_end(self, *args):
        self.seen["steps"].append(self.net[0].weight.detach().clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def weights_of(module: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def all_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(x, y) for x, y in zip(left, right, strict=True))
