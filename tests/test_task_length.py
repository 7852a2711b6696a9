"""Tasks that are trained for a number of steps, or for epochs of their own."""

from __future__ import annotations

import math

import pytest
import pytorch_lightning as pl

from cl_plugins import fit_stream
from cl_plugins.callbacks import MaskedHead
from cl_plugins.recipes import load_recipe, with_options
from cl_plugins.task_length import TaskLength
from cl_plugins.workloads.optimizers import configure_optimizers

from ._helpers import PlainModule, tiny_stream


class Counting(PlainModule):
    """Counts its steps per task and notes the learning rate of each."""

    def __init__(self, recipe=None):
        super().__init__()
        self.recipe = recipe
        self.rates = []

    def on_train_start(self):
        self.rates.append([])

    def training_step(self, batch, batch_idx):
        self.rates[-1].append(self.optimizers().param_groups[0]["lr"])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return super().configure_optimizers() if self.recipe is None else configure_optimizers(self, self.recipe)


def train(length, module=None, n_per_class=16, **options):
    module = module or Counting()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[MaskedHead(), length], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    fit_stream(trainer, module, tiny_stream(n_tasks=3, n_per_class=n_per_class))
    return [len(r) for r in module.rates]


@pytest.mark.parametrize("steps", [1, 3, 4, 9])  # an epoch has four steps
def test_steps_count_per_task(steps):
    assert train(TaskLength(steps=steps)) == [steps] * 3


def test_epochs_of_each_task():
    assert train(TaskLength(epochs=[2, 1, 3])) == [8, 4, 12]


def test_cosine_runs_over_the_steps():
    recipe = with_options(load_recipe("finetune"), {"steps": 6, "schedule": "cosine", "lr": 0.5})
    module = Counting(recipe)
    assert train(TaskLength(steps=6), module) == [6] * 3
    for rates in module.rates:
        assert rates == pytest.approx([0.25 * (1 + math.cos(math.pi * k / 6)) for k in range(6)])


def test_betas_reach_the_optimizer():
    recipe = with_options(load_recipe("finetune"), {"betas": (0.9, 0.9999)})
    module = Counting(recipe)
    train(TaskLength(steps=1), module)
    assert module.optimizers().param_groups[0]["betas"] == (0.9, 0.9999)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "`steps` or `epochs` must be given"),
        ({"steps": 1, "epochs": [1]}, "`steps` or `epochs` must be given"),
        ({"steps": 0}, "must be 1 or more"),
        ({"epochs": [1, 0]}, "must be 1 or more"),
    ],
)
def test_faulty_lengths(arguments, text):
    with pytest.raises(ValueError, match=text):
        TaskLength(**arguments)


def test_a_stream_of_another_length_is_refused():
    with pytest.raises(ValueError, match="`epochs` must hold 3 numbers"):
        train(TaskLength(epochs=[1, 2]))
    with pytest.raises(ValueError, match="accumulate_grad_batches=1"):
        train(TaskLength(steps=2), accumulate_grad_batches=2)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": 0}, "`epochs_per_task` and `steps` must be whole numbers"),
        ({"steps": 3, "epochs_per_task": (1,)}, "`steps` must be None"),
        ({"betas": (0.9, 1.0)}, "`betas` must be two numbers"),
        ({"gradient_clip": -1.0}, "`gradient_clip` must be 0 or more"),
    ],
)
def test_faulty_recipes(options, text):
    with pytest.raises(ValueError, match=text):
        with_options(load_recipe("finetune"), options)
