"""Base classes that both ``pytorch_lightning`` and ``lightning.pytorch`` accept.

The two packages hold the same code twice, as two unrelated class trees. Where both are installed, the classes here
inherit from both, so one callback or data module works with either Trainer and with either LightningCLI.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

__all__ = ["Callback", "Checkpoint", "LightningDataModule"]
