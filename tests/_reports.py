"""Runs for the tests of the reports."""

import numpy as np

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
