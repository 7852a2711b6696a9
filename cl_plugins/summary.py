"""A result for a terminal: the named numbers and the accuracy matrix."""

from __future__ import annotations

from cl_plugins.result import StreamResult


def _inside_lines(result: StreamResult) -> list[str]:
    """The numbers inside the tasks, and the average with its interval where tasks were drawn."""
    inside = result.inside
    if not inside.rows:
        return []
    lines = ["", f"inside the tasks, evaluated every {inside.every} steps ({len(inside.rows)} evaluations)"]
    reasons = inside.undefined()
    for key, value in inside.metrics().items():
        name = key.split("@")[0].replace("_", " ")
        why = f" ({reasons[key]})" if key in reasons else ""
        lines.append(f"{name:<34}{'undefined' if value is None else format(value, '.4f'):>9}{why}")
    drawn = [row for row in inside.rows if row.sampled]
    if drawn:
        value, half = drawn[-1].average
        width = "undefined" if half != half else f"{half:.4f}"
        lines.append(f"{f'average at step {drawn[-1].step}, tasks drawn':<34}{value:>9.4f} +- {width} (95 %)")
    return [*lines, ""]


def _cell(value: float) -> str:
    return f"{'undefined' if value != value else format(value, '.4f'):>9}"


def _why(reason: str) -> str:
    return f"  ({reason})" if reason else ""


def summary_table(result: StreamResult) -> str:
    """The named numbers and the accuracy matrix, for a terminal."""
    names = {
        "map": "mAP of seen classes (last row)",
        "average_map": "mAP, mean over rows",
        "cf1": "CF1 (last row)",
        "of1": "OF1 (last row)",
        "transfer": "transfer (before learning)",
        "average": "average (all cells)",
        "last": "last (last row, all tasks)",
        "zero_shot": "zero-shot (before any training)",
        "average_accuracy": "average accuracy (last row)",
        "average_incremental_accuracy": "average incremental accuracy",
        "learning_accuracy": "learning accuracy",
        "forgetting": "forgetting (peak since learned)",
        "backward_transfer": "backward transfer",
        "average_accuracy_task_known": "average accuracy, task known",
    }
    lines = []
    if result.label_scores and len(result.rows) <= 12:
        lines.append(" " * 12 + "".join(f"{name:>9}" for name in ("mAP", "CF1", "OF1")))
        for row in result.rows:
            if row.labels is not None:
                values = (row.labels.map, row.labels.cf1, row.labels.of1)
                lines.append(f"after T{row.after:<5}" + "".join(_cell(v) for v in values) + _why(row.labels.undefined))
        lines.append("")
    if len(result.tasks) <= 12:
        matrix = result.accuracy_matrix
        lines.append(" " * 12 + "".join(f"{'T' + str(t.index):>7}" for t in result.tasks))
        for row, values in zip(result.rows, matrix, strict=True):
            cells = "".join("      ." if v != v else f"{float(v):7.3f}" for v in values)
            lines.append(f"after T{row.after:<5}{cells}")
        lines.append("")
    for key, value in result.metrics().items():
        lines.append(f"{names[key]:<34}{'undefined' if value is None else format(value, '.4f'):>9}")
    lines += _inside_lines(result)
    seconds = sum(result.train_seconds)
    lines.append(f"{'trainable parameters':<34}{result.trainable_parameters:>9,}")
    lines.append(f"{'seconds training / evaluating':<34}{seconds:>9.1f} / {result.eval_seconds:.1f}")
    return "\n".join(lines)
