"""The examples and the README's program run as they stand, in small."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLI_YAML = ROOT / "examples" / "lightning_cli.yaml"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _run(tmp_path, *words):
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("one_callback", ["--epochs", "1"]),
        ("own_dataset", ["--epochs", "2"]),
        pytest.param("hand_written_loop", ["--epochs", "1"], marks=pytest.mark.slow),
        pytest.param("lightning_cli", ["--config", CLI_YAML, "--trainer.max_epochs", "1"], marks=pytest.mark.slow),
    ],
)
def test_example(name, words, tmp_path):
    assert "average accuracy" in _run(tmp_path, ROOT / "examples" / f"{name}.py", *words)


@pytest.mark.slow
def test_pretraining_of_the_bundled_backbone(tmp_path):
    printed = _run(tmp_path, ROOT / "examples" / "pretrain_vit_glyph.py", "--steps", "3", "--batch-size", "8")
    assert "digits_linear_probe" in printed
    assert (tmp_path / "vit_glyph.safetensors").stat().st_size > 2_000_000


def test_the_program_in_the_readme_runs(tmp_path):
    program = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert len([line for line in program.splitlines() if line.strip()]) <= 24
    small = program.replace("max_epochs=10", "max_epochs=1, logger=False, enable_checkpointing=False")
    assert small != program
    (tmp_path / "program.py").write_text(small)
    printed = _run(tmp_path, "program.py")
    assert re.search(r"0\.\d+", printed)
