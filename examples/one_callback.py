"""An unchanged LightningModule learns digits two classes at a time; the one line that matters is the callback.

python examples/one_callback.py --epochs 10
"""

import argparse

import pytorch_lightning as pl
import timm
import torch
from torch.nn.functional import cross_entropy

from cl_plugins import fit_stream
from cl_plugins.callbacks import OVOR, ForgettingDashboard, ForgettingTracker
from cl_plugins.scenarios import build_scenario


class Classifier(pl.LightningModule):  # knows nothing of tasks
    def __init__(self):
        super().__init__()
        self.model = timm.create_model("vit_glyph", pretrained=True, num_classes=10)

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, _):
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=5e-3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10, help="per task")
    parser.add_argument("--out", default="runs/one_callback")
    args = parser.parse_args()

    pl.seed_everything(0, verbose=False)
    stream = build_scenario("split-digits")
    callbacks = [OVOR(), ForgettingTracker(), ForgettingDashboard(args.out)]
    trainer = pl.Trainer(max_epochs=args.epochs, callbacks=callbacks, logger=False, enable_checkpointing=False)
    result = fit_stream(trainer, Classifier(), stream)

    print(result.to_frame().round(3).to_string(na_rep="."))
    print(f"average accuracy {result.average_accuracy:.3f}, forgetting {result.forgetting:.3f}")
