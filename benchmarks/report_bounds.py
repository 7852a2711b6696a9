"""Size, ready time and heap of the report for long and for many runs, measured in headless Chromium.

Bounds: 1,000 x 1,000 tasks at most 5 MB, ready within 2 s, heap at most 100 MB; 20 tasks x 25 runs at most 3 MB.
``ready_s`` is the median and the least of the loads, from the navigation to painted charts; ``blank_s`` the same of a
page with nothing but the same mark, taken in turns. ``heap_mb`` is the used JavaScript heap after a collection with the
memory of its arrays, which lies outside of the engine's own heap; ``heap_peak_mb`` is the largest value seen without a
collection, while every selector is driven.

    python benchmarks/report_bounds.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cl_plugins.report import write_report
from cl_plugins.runs import Run
from tests._browser import CHROMIUM, Page
from tests._reports import everything, record

_BLANK = (
    "<!doctype html><script>requestAnimationFrame(() => setTimeout(() => {"
    "document.documentElement.dataset.ready = String(Math.round(performance.now())); }))</script>"
)


def heap(page: Page, collect: bool) -> float:
    """Used JavaScript heap and arrays in MB."""
    return page.heap(collect) / 1e6


def drive(page: Page) -> float:
    """Set every selector to every value, at most 12 of each; the largest heap seen."""
    peak = 0.0
    for _ in range(2):
        for name in ("selection", "mode", "axis", "task", "reference"):
            values = page.evaluate(f"[...document.querySelectorAll('#{name} option')].map((o) => o.value)")
            for value in values[:: max(1, len(values) // 12)]:
                page.choose(f"#{name}", value)
                peak = max(peak, heap(page, collect=False))
    return peak


def measure(runs: list[Run], file: Path, loads: int) -> dict[str, Any]:
    """All figures of one page."""
    started = time.perf_counter()
    write_report(runs, file)
    written = time.perf_counter() - started
    blank = file.with_name("blank.html")
    blank.write_text(_BLANK)
    page = Page()
    try:
        ready, nothing = [], []
        for _ in range(loads):
            nothing.append(page.open(blank) / 1e3)
            ready.append(page.open(file) / 1e3)
        settled = heap(page, collect=True)
        peak = drive(page)
        told = {
            "file_mb": file.stat().st_size / 1e6,
            "write_s": written,
            "ready_s": [statistics.median(ready), min(ready)],
            "blank_s": [statistics.median(nothing), min(nothing)],
            "heap_mb": settled,
            "heap_peak_mb": peak,
            "heap_after_every_selector_mb": heap(page, collect=True),
            "console": page.errors,
        }
    finally:
        page.close()
    return {k: [round(x, 3) for x in v] if k.endswith("_s") and isinstance(v, list) else v for k, v in told.items()}


def main() -> None:
    """Print a line of JSON per page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--loads", type=int, default=5)
    options = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit("needs Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        root, file = Path(folder), Path(folder) / "report.html"
        long = everything(root / "long", "a", options.tasks)
        cases = {
            f"{options.tasks} x {options.tasks} tasks, every kind of event": [long],
            f"{options.tasks} x {options.tasks} tasks, five runs": [
                everything(root / "five", f"r{k}", options.tasks, seed=k) for k in range(5)
            ],
            "20 tasks x 25 runs": [
                record(root / "many", f"r{k}", method=f"m{k % 5}", n_tasks=20, seed=k) for k in range(25)
            ],
        }
        for name, runs in cases.items():
            told = measure(runs, file, options.loads)
            rounded = {k: round(v, 2) if isinstance(v, float) else v for k, v in told.items()}
            print(json.dumps({"page": name, **rounded}), flush=True)


if __name__ == "__main__":
    main()
