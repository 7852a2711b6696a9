"""OVOR with two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cl_plugins.head_phase import tune_head
from cl_plugins.outliers import VirtualOutliers
from tests._helpers import run_script

DDP = """
import sys
import torch
from pytorch_lightning.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset
from tests._helpers import PlainModule, image_data, quiet_trainer
from cl_plugins import Task
from cl_plugins.callbacks.ovor import OVOR

settings = {"neighbors": 5, "n_boundary": 6, "draws": 30, "per_class": 10, "batch_size": 8}
method = OVOR(settings, lengths={0: 4, 1: 6}, head_epochs=1)
module = PlainModule(weight_decay=0.1)
method.install(module)
trainer = quiet_trainer(
    max_epochs=2, callbacks=[method], devices=2,
    strategy=DDPStrategy(process_group_backend="gloo", find_unused_parameters=False),
)
before = module.model.head.weight.detach().clone()
method.on_task_start(trainer, module, Task(0, (0, 1)))
images, labels = image_data(9, n_classes=2).tensors
trainer.fit(module, DataLoader(TensorDataset(images, labels), batch_size=4))
state = {k: v.cpu() for k, v in module.state_dict().items()}
torch.save(state, f"{sys.argv[1]}/rank{trainer.global_rank}.pt")
assert torch.equal(state["model.head.weight"][2:], before[2:])
(event,) = [e for e in method.report_events(module) if e["name"] == "ovor/loss"]
torch.save(event["value"], f"{sys.argv[1]}/loss{trainer.global_rank}.pt")
"""


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_train_one_classifier(tmp_path: Path) -> None:
    run_script(DDP, tmp_path, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    losses = [torch.load(tmp_path / f"loss{r}.pt", weights_only=True) for r in (0, 1)]
    assert losses[0] == losses[1]


GATHER = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from cl_plugins._processes import gather_rows
from cl_plugins.head_phase import tune_head
from cl_plugins.outliers import VirtualOutliers

rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/meet", rank=rank, world_size=2)
features = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
labels = torch.arange(30) % 2
share = slice(0, 11) if rank == 0 else slice(11, 30)
got, got_labels = gather_rows(features[share]), gather_rows(labels[share])
assert torch.equal(got, features) and torch.equal(got_labels, labels)
assert gather_rows(features[:0] if rank else features).shape == (30, 6)
assert gather_rows(torch.zeros(0, 0) if rank else features, dealt=True).equal(features)
torch.manual_seed(3)
head = nn.Linear(6, 2)
settings = VirtualOutliers(neighbors=3, draws=20, n_boundary=4, batch_size=8)
optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
tune_head(head, got, got_labels, (0, 1), optimizer, settings, torch.Generator().manual_seed(1))
torch.save(head.state_dict(), f"{sys.argv[1]}/{rank}.pt")
"""


@pytest.mark.ddp
def test_uneven_shares_give_the_result_of_one_process(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, "-c", GATHER, str(tmp_path), str(rank)] for rank in (0, 1)]
    running = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
    for process in running:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        head = nn.Linear(6, 2)
    settings = VirtualOutliers(neighbors=3, draws=20, n_boundary=4, batch_size=8)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    tune_head(head, features, torch.arange(30) % 2, (0, 1), optimizer, settings, torch.Generator().manual_seed(1))
    for rank in (0, 1):
        for name, value in torch.load(tmp_path / f"{rank}.pt", weights_only=True).items():
            torch.testing.assert_close(value, head.state_dict()[name])
