"""Your own data set as a class-incremental stream, in one line.

    python examples/own_dataset.py --tasks 3

Any map dataset works whose labels can be found without loading its samples: an attribute (`targets`, `labels`, `y`), a
column, an array, or a function. Here: a TensorDataset.
"""

import argparse

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from cl_plugins import fit_stream
from cl_plugins.callbacks import MaskedHead
from cl_plugins.scenarios import ClassIncremental


class Perceptron(pl.LightningModule):
    def __init__(self, n_classes):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.LazyLinear(64), nn.ReLU())
        self.head = nn.Linear(64, n_classes)

    def forward(self, x):
        return self.head(self.body(x))

    def training_step(self, batch, _):
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def blobs(n, seed):
    """Six overlapping clouds of points."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 6
    angle = y * torch.pi / 3
    x = torch.stack([angle.cos(), angle.sin()], 1) + 0.2 * torch.randn(n, 2, generator=generator)
    return TensorDataset(x, y)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="per task")
    args = parser.parse_args()

    stream = ClassIncremental(blobs(600, 0), test=blobs(300, 1), n_tasks=args.tasks, order_seed=0)  # this one

    pl.seed_everything(0, verbose=False)
    module = Perceptron(stream.n_classes)
    module(torch.zeros(1, 2))  # gives the lazy layer its size
    trainer = pl.Trainer(
        max_epochs=args.epochs, callbacks=[MaskedHead(head="head")], logger=False, enable_checkpointing=False
    )
    result = fit_stream(trainer, module, stream)
    print(result.to_frame().round(3).to_string(na_rep="."))
    print(f"average accuracy {result.average_accuracy:.3f}, forgetting {result.forgetting:.3f}")
