"""The drift of two processes is that of one: the probe set is put back into its order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests._helpers import run_script

SCRIPT = """
import json, sys
import torch
from pytorch_lightning.strategies import DDPStrategy
from cl_plugins import fit_stream
from cl_plugins.callbacks import DriftTracker
from tests._helpers import PlainModule, quiet_trainer, tiny_stream

many = int(sys.argv[2])
strategy = DDPStrategy(process_group_backend="gloo") if many > 1 else "auto"
trainer = quiet_trainer(max_epochs=1, callbacks=[DriftTracker(probe=27)], devices=many, strategy=strategy)
module = PlainModule(lr=0.0)  # the weights stay the same, so that only the measurement can differ
result = fit_stream(trainer, module, tiny_stream(n_per_class=4))
rows = [row.to_dict() for row in result.drift]
with open(f"{sys.argv[1]}/{many}-{trainer.global_rank}.json", "w") as file:
    json.dump(rows, file)
"""


@pytest.mark.ddp
@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    for many in (1, 2):
        run_script(SCRIPT, tmp_path, tmp_path, many)
    one, first, second = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("1-0", "2-0", "2-1"))
    assert first == second
    for alone, shared in zip(one, first, strict=True):
        exact = ("samples", "task_error", "recency_bias", "recency_pull", "parameters", "bytes", "undefined")
        assert {k: shared[k] for k in exact} == {k: alone[k] for k in exact}
        for name in ("effective_rank", "cka_first", "cka_previous", "calibration_error", "task_calibration_error"):
            assert shared[name] == (alone[name] if alone[name] is None else pytest.approx(alone[name], rel=1e-5)), name
