"""Programs in the documentation run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_trained_model_answers_the_same_wherever_it_is_loaded(tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "trained_model.md").read_text(), re.DOTALL)
    (tmp_path / "program.py").write_text(program + "print(trained.eval()(images).argmax(1))\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = re.findall(r"tensor\(\[[\d,\s]+\]\)", done.stdout)
    assert len(answers) == 3
    assert len(set(answers)) == 1
    assert len(set(re.findall(r"\d", answers[0]))) > 1
