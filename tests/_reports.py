"""Runs for the tests of the reports."""

import numpy as np

from cl_plugins.callbacks.drift import drift_events
from cl_plugins.drift import DriftRow
from cl_plugins.inside_tasks import InsideRow
from cl_plugins.runs import RunWriter, read_run

HOSTILE = "</script><img src=x onerror=alert(1)>"


def record(
    root,
    run_id,
    *,
    method="ovor",
    n_tasks=5,
    seed=0,
    decay=0.1,
    n=200,
    names=None,
    order=0,
    rows=None,
    plug=True,
    full=False,
):
    """A finished run with decaying accuracies."""
    draw = np.random.default_rng(seed)
    top = 0.8 + 0.2 * draw.random(n_tasks)
    with RunWriter(root, run_id) as writer:
        writer.write("run", method=method, scenario="split-digits", seed=seed, order_seed=order, from_task=0)
        for j in range(n_tasks):
            name = names[j] if names else f"digits {j}"
            writer.write("task", index=j, name=name, classes=[(2 * j + order) % (2 * n_tasks)])
        if full:
            writer.write("row", after=-1, correct=[n // 10] * n_tasks, total=[n] * n_tasks)
        for i in range(n_tasks if rows is None else rows):
            width = n_tasks if full else i + 1
            level = [top[j] * np.exp(-decay * max(i - j, 0)) + 0.02 * draw.standard_normal() for j in range(width)]
            correct = [int(np.clip(a, 0, 1) * n) for a in level]
            writer.write("row", after=i, correct=correct, total=[n] * width)
            if n_tasks <= 20:
                counts = np.zeros((n_tasks, n_tasks), int)
                for j in range(i + 1):
                    counts[j, j] += correct[j]
                    counts[j, i] += n - correct[j]
                writer.write("conf", after=i, counts=counts)
            writer.write("cost", task=i, train_seconds=1.5 + i, eval_seconds=0.25, trainable=7680, peak_bytes=2**28)
            if plug:
                writer.write("plug", name="ovor/active", task=i, x=[3, 4], value=[0.5, draw.random()], unit="share")
                writer.write("plug", name="ema/share", task=i, value=draw.random())
        if plug:
            writer.write("plug", name="mora/routing", value=draw.random((4, n_tasks)), x_title="task", y_title="expert")
        writer.write("end", status="finished")
    return read_run(writer.folder)


def everything(root, run_id, n_tasks, *, seed=0):
    """A finished run with every kind of event: all tasks at all times, inside tasks, drift, plugins."""
    draw = np.random.default_rng(seed)
    n, steps = 200, 0
    with RunWriter(root, run_id) as writer:
        writer.write("run", method="everything", scenario="long", seed=seed, order_seed=0, from_task=0)
        for j in range(n_tasks):
            writer.write("task", index=j, name=f"a task with a name of its own, number {j}", classes=[2 * j, 2 * j + 1])
        writer.write("row", after=-1, correct=draw.integers(0, 20, n_tasks).tolist(), total=[n] * n_tasks)
        for i in range(n_tasks):
            writer.write("row", after=i, correct=draw.integers(0, n, n_tasks).tolist(), total=[n] * n_tasks)
            writer.write(
                "cost", task=i, train_seconds=1.0 + i / 7, eval_seconds=0.3, trainable=7680 + i, peak_bytes=2**28 + i,
                parameters={"frozen": 10**6, "trained": 7680 + i, "method": 64 * i},
            )  # fmt: skip
            for k in range(3):
                steps += 10
                chosen = [*sorted(draw.choice(i, min(i, 8), replace=False).tolist()), i]
                right = tuple(draw.integers(0, n, len(chosen)).tolist())
                row = InsideRow(
                    steps, i, i, i + 1, tuple(chosen), right, (n,) * len(chosen), right, 10, i > 8, k == 2
                )  # fmt: skip
                writer.write("mid", **row.to_dict())
            drift = DriftRow(
                i, samples=24, effective_rank=5.0, cka_first=1 / (i + 1), cka_previous=0.9, calibration_error=0.1,
                calibration_drift={j: 0.01 * j for j in range(min(i, 20))}, task_error=0.2, recency_bias=0.1,
                recency_pull=0.5, bytes={"frozen": 3 << 20, "trained": 1 << 20},
            )  # fmt: skip
            for event in drift_events(drift):
                writer.write("plug", **event)
            writer.write("plug", name="ovor/active", task=i, x=list(range(20)), value=draw.random(20), unit="share")
            writer.write("plug", name="mora/ranks", task=i, value=draw.random())
            if i % 10 == 0:
                writer.write("alert", task=i // 2, after=i, text="accuracy fell from 0.900 to 0.500")
        writer.write("plug", name="mora/routing", value=draw.random((16, n_tasks)), x_title="task", y_title="expert")
        writer.write("end", status="finished")
    return read_run(writer.folder)
