"""BalancedEMA beside Lightning's own averaging callback: what goes wrong there in a continual loop goes right here.

Lightning's side is measured too, so that the claims in docs/ema.md stay true; a release that repairs one of them skips
its half of the test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from cl_plugins.callbacks import BalancedEMA
from tests._helpers import quiet_trainer
from tests._regression import Regression, all_equal, regression_data, weights_of

lightning_callbacks = pytest.importorskip("pytorch_lightning.callbacks")
if not hasattr(lightning_callbacks, "EMAWeightAveraging"):
    pytest.skip("this Lightning has no EMAWeightAveraging", allow_module_level=True)


def _ours() -> BalancedEMA:
    return BalancedEMA("fixed", decay=0.5)


def _theirs() -> pl.Callback:
    return lightning_callbacks.EMAWeightAveraging(decay=0.5)


def _second_trainer_learns(callback: Any, folder: Path) -> bool:
    module = Regression()
    start = weights_of(module)
    quiet_trainer(callbacks=[callback], max_epochs=1).fit(module, regression_data())
    first = weights_of(module)
    assert not all_equal(start, first)  # the first training works in both
    quiet_trainer(callbacks=[callback], max_epochs=1).fit(module, regression_data(seed=1))
    return not all_equal(first, weights_of(module))


def _a_checkpoint_is_tested_alike_before_and_after_a_restart(callback: Any, folder: Path) -> bool:
    module, fresh = Regression(), Regression()
    keeper = ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1, filename="{step}")
    trainer = quiet_trainer(callbacks=[callback, keeper], enable_checkpointing=True, max_epochs=1)
    trainer.fit(module, regression_data())
    path = folder / "step=5.ckpt"
    trainer.test(module, regression_data(4), ckpt_path=path, verbose=False)
    restarted = _ours() if isinstance(callback, BalancedEMA) else _theirs()
    quiet_trainer(callbacks=[restarted]).test(fresh, regression_data(4), ckpt_path=path, verbose=False)
    return torch.equal(module.seen["test"][-1], fresh.seen["test"][-1])


def _validation_sees_the_weights_it_is_given(callback: Any, folder: Path) -> bool:
    module = Regression()
    trainer = quiet_trainer(callbacks=[callback], max_epochs=1)
    trainer.fit(module, regression_data())
    with torch.no_grad():
        module.net[0].weight.fill_(7.0)  # as another adapter that is loaded
    trainer.validate(module, regression_data(4), verbose=False)
    return module.seen["validation"][-1].unique().tolist() == [7.0]


def _parameters_of_setup_are_averaged(callback: Any, folder: Path) -> bool:
    """Two steps: the average lies between the first and the last weights in every parameter."""
    module = Regression(late_layer=True)
    course: list[list[torch.Tensor]] = []

    class Course(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            course.append(weights_of(pl_module))

    quiet_trainer(callbacks=[callback, Course()], max_epochs=1).fit(module, regression_data())
    return not any(torch.equal(a, b) for a, b in zip(weights_of(module), course[-1], strict=True))


def _first_weights_are_in_the_average(callback: Any, folder: Path) -> bool:
    """With the decay 0.5, one step ends half way between the weights before it and after it."""
    module = Regression()
    before = weights_of(module)
    after: list[list[torch.Tensor]] = []

    class Steps(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            after.append(weights_of(pl_module))

    quiet_trainer(callbacks=[callback, Steps()], max_epochs=1, max_steps=1).fit(module, regression_data())
    return all(
        torch.allclose(end, (a + b) / 2, atol=1e-6)
        for end, a, b in zip(weights_of(module), before, after[0], strict=True)
    )


SITUATIONS = [
    _second_trainer_learns,
    _a_checkpoint_is_tested_alike_before_and_after_a_restart,
    _validation_sees_the_weights_it_is_given,
    _parameters_of_setup_are_averaged,
    _first_weights_are_in_the_average,
]


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda f: f.__name__.strip("_"))
def test_balanced_averaging(situation, tmp_path):
    assert situation(_ours(), tmp_path)


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda f: f.__name__.strip("_"))
def test_lightning_averaging(situation, tmp_path):
    if situation(_theirs(), tmp_path):
        pytest.skip(f"Lightning {pl.__version__} does this right")
