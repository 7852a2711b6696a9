"""LightningCLI: model, stream and callbacks from one YAML file, trained over all tasks.

python examples/lightning_cli.py --config examples/lightning_cli.yaml
"""

import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.cli import LightningCLI
from torch.nn.functional import cross_entropy

from cl_plugins import fit_stream
from cl_plugins.scenarios import TaskStream


class Classifier(pl.LightningModule):
    def __init__(self, num_classes: int = 10, lr: float = 5e-3):
        super().__init__()
        self.lr = lr
        self.model = timm.create_model("vit_glyph", pretrained=True, num_classes=num_classes)

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, _):
        x, y = batch
        return cross_entropy(self(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


if __name__ == "__main__":
    cli = LightningCLI(
        Classifier, TaskStream, run=False, seed_everything_default=0, subclass_mode_data=True, save_config_callback=None
    )
    result = fit_stream(cli.trainer, cli.model, cli.datamodule)
    print(f"average accuracy {result.average_accuracy:.3f}, forgetting {result.forgetting:.3f}")
