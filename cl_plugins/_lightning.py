"""What both ``pytorch_lightning`` and ``lightning.pytorch`` accept: base classes, and what a Trainer does not declare.

The two packages hold the same code twice, as two unrelated class trees. Where both are installed, the classes here
inherit from both, so one callback or data module works with either Trainer and with either LightningCLI. A Trainer is
given some attributes by its connectors, which type checkers cannot see; they are read here.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from pytorch_lightning import Callback, LightningDataModule
    from pytorch_lightning.callbacks import Checkpoint
else:
    import pytorch_lightning
    import pytorch_lightning.callbacks

    if importlib.util.find_spec("lightning") is not None and importlib.util.find_spec("lightning.pytorch") is not None:
        import lightning.pytorch
        import lightning.pytorch.callbacks

        class Callback(pytorch_lightning.Callback, lightning.pytorch.Callback):
            """A callback of both class trees."""

        class Checkpoint(Callback, pytorch_lightning.callbacks.Checkpoint, lightning.pytorch.callbacks.Checkpoint):
            """What Lightning runs behind all other callbacks, of both class trees."""

        class LightningDataModule(pytorch_lightning.LightningDataModule, lightning.pytorch.LightningDataModule):
            """A data module of both class trees."""

    else:
        Callback = pytorch_lightning.Callback
        Checkpoint = pytorch_lightning.callbacks.Checkpoint
        LightningDataModule = pytorch_lightning.LightningDataModule

__all__ = ["Callback", "Checkpoint", "LightningDataModule", "callbacks_of", "datamodule_of"]


def callbacks_of(trainer: pl.Trainer) -> list[Any]:
    """The Trainer's own list of callbacks; what is put into it takes part."""
    untyped: Any = trainer
    callbacks: list[Any] = untyped.callbacks
    return callbacks


def datamodule_of(trainer: pl.Trainer) -> Any:
    """The data module, or the stream, that the Trainer reads; None before it has one."""
    untyped: Any = trainer
    return untyped.datamodule
