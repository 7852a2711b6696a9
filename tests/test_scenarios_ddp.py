"""Two processes: training shares are equal, evaluation shares hold every sample once, whatever the Trainer does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import json, sys
import pytorch_lightning as pl, torch
from torch.utils.data import Dataset
from cl_plugins.scenarios import ClassIncremental

class Numbers(Dataset):
    def __init__(self, n):
        self.targets = [i % 3 for i in range(n)]
    def __len__(self):
        return len(self.targets)
    def __getitem__(self, index):
        return torch.tensor([float(index)]), self.targets[index]

class Recorder(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 4)
        self.register_buffer("count", torch.zeros(1))  # DDP broadcasts buffers at every forward pass
        self.seen = {"train": [], "val": [], "test": []}
    def forward(self, x):
        return self.layer(x)
    def training_step(self, batch, _):
        self.seen["train"].append(batch[0].flatten().tolist())
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
    def validation_step(self, batch, _):
        self.seen["val"].append(batch[0].flatten().tolist())
        self(batch[0])
    def test_step(self, batch, _, dataloader_idx=0):
        self.seen["test"].append(batch[0].flatten().tolist())
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)

if __name__ == "__main__":
    stream = ClassIncremental((Numbers(51), Numbers(18)), n_tasks=1, batch_size=4, eval_batch_size=4,
                              validation_fraction=0.2, train_transform=lambda x: x + 0.5 * torch.rand(1))
    module = Recorder()
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", devices=2, strategy="ddp", logger=False,
                         enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
                         num_sanity_val_steps=0)
    trainer.fit(module, datamodule=stream)
    trainer.test(module, datamodule=stream, verbose=False)
    sizes = stream.provenance()["sizes"]
    open(f"{sys.argv[1]}/{trainer.global_rank}.json", "w").write(json.dumps([module.seen, sizes]))
"""


@pytest.mark.ddp
def test_shares_of_two_processes(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}")
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (first, sizes), (second, _) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert sizes == {"train": [42], "validation": [9], "test": [18]}
    shapes = {part: ([len(b) for b in first[part]], [len(b) for b in second[part]]) for part in first}
    assert shapes["train"] == ([4, 4, 4, 4, 4, 1], [4, 4, 4, 4, 4, 1])
    assert shapes["val"] == ([3, 2], [2, 2])  # batches of 4 would be 2 in one process and 1 in the other
    for part, expected in (("val", sizes["validation"][0]), ("test", sum(sizes["test"]))):
        drawn = [x for batches in (first[part], second[part]) for batch in batches for x in batch]
        assert len(drawn) == len(set(drawn)) == expected
    trained = [int(x) for batches in (first["train"], second["train"]) for batch in batches for x in batch]
    assert len(trained) == len(set(trained)) == sizes["train"][0]
