"""MoRA with two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests._helpers import run_script

SCRIPT = """
import sys
import torch
from pytorch_lightning.strategies import DDPStrategy
from cl_plugins import fit_stream
from cl_plugins.callbacks import MoRA
from tests._helpers import PlainModule, quiet_trainer, tiny_stream

method = MoRA(rank=2)
module = PlainModule(weight_decay=0.1)
trainer = quiet_trainer(
    max_epochs=1, callbacks=[method], devices=2,
    strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=False),
)
torch.manual_seed(trainer.global_rank)  # processes that were seeded apart still start from the same keys
result = fit_stream(trainer, module, tiny_stream(n_per_class=4), seed=1)
state = {k: v.cpu() for k, v in module.state_dict().items()}
torch.save(state, f"{sys.argv[1]}/rank{trainer.global_rank}.pt")
"""


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_grow_the_same_experts(tmp_path: Path) -> None:
    run_script(SCRIPT, tmp_path, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    assert first["plugins.mora.model__blocks__0__attn__qkv.old_keys"].shape == (3, 4, 16)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
