"""How a stream of many tasks and samples scales: time and memory to build it, time to go to another task.

    python benchmarks/stream_scale.py --tasks 1000 --samples 1000000

The data set is one that gives labels alone, so what is measured is the stream. Memory is the growth of the process's
resident memory beyond the labels, and what Python and NumPy allocated at the most (``tracemalloc``).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import tracemalloc
from pathlib import Path

import numpy as np

from cl_plugins.scenarios import ClassIncremental


class Labels:
    """A data set of ``samples`` numbers with a label each."""

    def __init__(self, samples: int, classes: int, seed: int) -> None:
        self.targets = np.random.default_rng(seed).integers(0, classes, samples)
        self.targets[:classes] = np.arange(classes)  # every class is there

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[float, int]:
        return float(index), int(self.targets[index])


def resident() -> int:
    """Resident bytes of this process, where the system tells them."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * 4096 if path.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--classes-per-task", type=int, default=2)
    options = parser.parse_args()
    classes = options.tasks * options.classes_per_task
    train, test = Labels(options.samples, classes, 0), Labels(max(classes, options.samples // 10), classes, 1)
    ClassIncremental(Labels(100, 10, 0), test=Labels(20, 10, 1), n_tasks=5)  # imports and first calls
    gc.collect()
    before, started = resident(), time.perf_counter()
    stream = ClassIncremental(train, test=test, n_tasks=options.tasks, order_seed=0)
    built = time.perf_counter() - started
    gc.collect()
    grown = resident() - before
    switches = []
    for task in np.random.default_rng(0).integers(0, options.tasks, 200).tolist():
        started = time.perf_counter()
        stream.task = task
        loader = stream.train_dataloader()
        len(loader.dataset)
        switches.append(time.perf_counter() - started)
    tracemalloc.start()
    again = ClassIncremental(train, test=test, n_tasks=options.tasks, order_seed=0)
    most = tracemalloc.get_traced_memory()[1]
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(again.tasks) == options.tasks
    mib = 2**20
    told = {
        "tasks": options.tasks,
        "samples": options.samples,
        "labels_mib": (train.targets.nbytes + test.targets.nbytes) / mib,
        "build_seconds": built,
        "resident_growth_mib": grown / mib,
        "allocated_mib_kept": kept / mib,
        "allocated_mib_most": most / mib,
        "switch_ms_median": 1e3 * statistics.median(switches),
        "switch_ms_most": 1e3 * max(switches),
    }
    print(json.dumps({k: round(v, 3) for k, v in told.items()}, indent=1))


if __name__ == "__main__":
    main()
