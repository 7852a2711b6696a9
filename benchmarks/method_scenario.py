"""Every method of ``cl-bench`` on every stream that comes along: it works, or is refused with the reason.

Each cell is a run by ``run_benchmark`` with the method's recipe on a small version of the stream, or the refusal before
training that came in its place.

    python benchmarks/method_scenario.py                       # the table on the terminal
    python benchmarks/method_scenario.py docs/scenarios.md     # between the page's markers
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks._common import tell
from cl_plugins.benchmark import run_benchmark
from cl_plugins.recipes import recipe_names
from cl_plugins.scenarios import scenario_info, scenario_names

BEGIN, END = "<!-- method x scenario: begin -->", "<!-- method x scenario: end -->"
_CHARACTERS = {
    "data_options": {"n_classes": 6, "train_images": 12, "validation_images": 1, "test_images": 2, "n_tasks": 3}
}
_BLOCKS = {"n_classes": 2, "train_images": 4, "validation_images": 1, "test_images": 1}
SMALL: dict[str, dict[str, Any]] = {
    "split-digits": {"n_tasks": 2},
    "fewshot-glyphs": {**_CHARACTERS, "base_classes": 2, "ways": 2, "shots": 5},
    "multilabel-glyphs": {"n_classes": 6, "n_tasks": 3, "train_images": 24, "test_images": 12},
    "domain-glyphs": {"n_classes": 4, "train_images": 5, "test_images": 2},
    "instructions": {"n_train": 8, "n_test": 2},
    **dict.fromkeys(("xtail-glyphs", "mtil-glyphs"), _BLOCKS),
}
"""Arguments that make a stream small; the other glyph streams take those of ``_CHARACTERS``."""
_OUTLIERS = {"neighbors": 3, "n_boundary": 4, "draws": 10, "per_class": 4, "batch_size": 8}
_PROJECTION = {"projection": 32}
OPTIONS: dict[str, dict[str, Any]] = {
    "ovor": {"outliers": _OUTLIERS, "head_epochs": 1},
    **dict.fromkeys(("ranpac", "ranpac-deep", "mora-ranpac"), _PROJECTION),
}
"""Settings of a method for small streams."""
_SINGLE_PASS = ("online-glyphs", "blurry-glyphs")


def streams() -> list[str]:
    """The scenarios that need no data from elsewhere."""
    return [name for name in scenario_names() if not scenario_info(name).needs]


def outcome(method: str, scenario: str) -> str | None:
    """None where a run came to its end with a whole accuracy matrix, else the words of the refusal.

    Raises:
        AssertionError: for a run that is not whole.
        Exception: what a run raised after training began, where nothing may be refused any more.
    """
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        out = Path(folder, "run")
        try:
            result = run_benchmark(
                method, scenario, out=out, epochs=1 if scenario in _SINGLE_PASS else 2, device="cpu", progress=False,
                data=SMALL.get(scenario, _CHARACTERS), options=OPTIONS.get(method),
            )  # fmt: skip
        except ValueError as error:
            if any(out.glob("checkpoints/*")):
                raise  # too late for a refusal: something was trained
            return " ".join(str(error).split())
        rows, columns = result.correct.shape
        assert rows >= 1
        assert columns == len(result.tasks)
        assert bool((result.correct[-1] >= 0).all()), result.correct
        for name in ("report.html", "result.json"):
            assert (out / name).is_file()
        return None


def _general(reason: str, method: str, scenario: str) -> str:
    """A reason without the names and classes of its cell, so that many cells share it."""
    head, separator, tail = reason.partition(f"got {method!r}: ")
    text = re.sub(r"^\w+ works on", "works on", tail if separator else head)
    return re.sub(r"got classes \[[^]]*\] in several", "got classes in several", text).replace(repr(scenario), "it")


def table() -> str:
    """The table and its legend in Markdown, from running everything."""
    reasons: dict[str, int] = {}
    lines = ["| | " + " | ".join(f"`{s}`" for s in streams()) + " |", "|" + "---|" * (len(streams()) + 1)]
    for method in recipe_names():
        cells = []
        for scenario in streams():
            refused = outcome(method, scenario)
            number = None if refused is None else _general(refused, method, scenario)
            cells.append("yes" if number is None else f"r{reasons.setdefault(number, len(reasons) + 1)}")
        print(method, *cells, file=sys.stderr, flush=True)
        lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
    lines += ["", "Refused, with the words of the error:", ""]
    return "\n".join([*lines, *(f"* r{number}: {text}" for text, number in reasons.items())])


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="?", type=Path, help="a page with the two markers; the terminal when left out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tell(table(), arguments.page, BEGIN, END)


if __name__ == "__main__":
    main()
