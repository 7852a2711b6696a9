"""Both Lightning packages, which are two unrelated class trees, with the same callbacks and streams."""

import importlib

import pytest
import torch
from torch.nn.functional import cross_entropy

from cl_plugins import fit_stream
from cl_plugins.callbacks import ForgettingTracker, MaskedHead
from tests._helpers import quiet_trainer, tiny_stream, tiny_vit

PACKAGES = ["pytorch_lightning", "lightning.pytorch"]


def _module(package):
    class Classifier(importlib.import_module(package).LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny_vit()

        def forward(self, x):
            return self.model(x)

        def training_step(self, batch, batch_idx):
            return cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    return Classifier()


@pytest.mark.parametrize("package", PACKAGES)
def test_a_stream_trains_and_gives_the_same_counts(package):
    pl = importlib.import_module(package)
    pl.seed_everything(0)
    tracker = ForgettingTracker()
    trainer = quiet_trainer(pl.Trainer, callbacks=[MaskedHead(), tracker])
    result = fit_stream(trainer, _module(package), tiny_stream())
    assert isinstance(tracker, pl.Callback)
    importlib.import_module(PACKAGES[0]).seed_everything(0)
    reference = fit_stream(quiet_trainer(callbacks=[MaskedHead()]), _module(PACKAGES[0]), tiny_stream())
    assert torch.equal(result.correct, reference.correct)


YAML = """
seed_everything: 0
data: {class_path: tests.test_lightning_packages.TinyStream}
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: cl_plugins.callbacks.MaskedHead
      init_args: {head: model.head}
    - class_path: cl_plugins.callbacks.ForgettingTracker
"""


@pytest.mark.parametrize("package", PACKAGES)
def test_lightning_cli_builds_the_stream_and_the_callbacks_from_yaml(package, tmp_path):
    from cl_plugins.scenarios import TaskStream

    pl, cli_module = importlib.import_module(package), importlib.import_module(f"{package}.cli")
    module = type(_module(package))
    (tmp_path / "config.yaml").write_text(YAML)
    cli = cli_module.LightningCLI(
        module, TaskStream, run=False, subclass_mode_data=True, save_config_callback=None,
        args=["--config", str(tmp_path / "config.yaml")],
    )  # fmt: skip
    assert isinstance(cli.trainer, pl.Trainer)
    result = fit_stream(cli.trainer, cli.model, cli.datamodule)
    assert result.correct.shape == (3, 3)


def __getattr__(name):
    """`TinyStream` for the YAML file above, made when asked for."""
    if name != "TinyStream":
        raise AttributeError(name)
    from cl_plugins.scenarios import ClassIncremental
    from tests._helpers import image_data

    class TinyStream(ClassIncremental):
        def __init__(self) -> None:
            super().__init__(image_data(16), test=image_data(5, seed=1), n_tasks=3, batch_size=8)

    return TinyStream
