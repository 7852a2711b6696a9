"""Tables of methods over seeds from the ``result.json`` files of finished runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cl_plugins._reading import read_json
from cl_plugins.comparison import MethodComparison, MethodEntry, is_multi_label
from cl_plugins.stats import SeedSummary, summarize_seeds

COLUMNS = {
    "average_accuracy": "average accuracy",
    "average_incremental_accuracy": "incremental accuracy",
    "forgetting": "forgetting",
    "train_seconds": "train s",
}
"""Keys of a result and the headings of their columns."""

LABEL_HEADINGS = {
    "average_accuracy": "label accuracy",
    "average_incremental_accuracy": "incremental label accuracy",
    "forgetting": "forgetting of label accuracy",
}
"""Headings of the same keys on multi-label streams, where the accuracies count labels: columns of their own."""

DOMAIN_COLUMNS = {"transfer": "transfer", "average": "average (all cells)", "last": "last"}
LABEL_COLUMNS = {"map": "mAP", "average_map": "mean mAP", "cf1": "CF1", "of1": "OF1"}
FURTHER_COLUMNS = {**LABEL_COLUMNS, **DOMAIN_COLUMNS}
"""Further columns, where some result has them: streams of several labels an image, or of domains with class names."""


MOST_ORDERS = 10
"""So many optimal orders are listed; their number is always told."""


def collect_results(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """All results below the folders, except those of replaced runs.

    Raises:
        ValueError: when there is none, or a file is not a result.
    """
    results = []
    for folder in folders:
        files = [folder] if folder.is_file() else sorted(folder.rglob("result.json"))
        for path in files:
            if any(part.startswith("previous-") for part in path.parts):
                continue
            content = read_json(path)
            if not isinstance(content, dict) or "accuracy_matrix" not in content:
                raise ValueError(f"{str(path)!r} must be a result of cl-bench run, found no `accuracy_matrix`")
            for key in (*COLUMNS, *FURTHER_COLUMNS):
                number = content.get(key)
                finite = isinstance(number, int | float) and not isinstance(number, bool) and abs(number) < 1e12
                if number is not None and not finite:
                    raise ValueError(f"`{key}` in {str(path)!r} must be a finite number or null, got {number!r}")
            results.append(content)
    if not results:
        raise ValueError(f"`folders` must hold result.json files, found none in {', '.join(map(str, folders))}")
    return results


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "undefined"
    summary = summarize_seeds(values)
    digits = 1 if abs(summary.mean) >= 10 else 3
    interval = "" if summary.half_width is None else f" ± {summary.half_width:.{digits}f}"
    return f"{summary.mean:.{digits}f}{interval}"


def table_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """One row a scenario and method: mean ± 95 % t interval over runs, and how many runs."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for result in results:
        key = (str(result.get("scenario", "?")), str(result.get("method", "?")))
        groups.setdefault(key, []).append(result)
    rows = []
    labelled = {str(r.get("scenario", "?")) for r in results if is_multi_label(r)}
    plain = any(scenario not in labelled for scenario, _ in groups)
    has = {k for k in FURTHER_COLUMNS if any(m.get(k) is not None for m in results)}
    # key, heading, and which scenarios have it: accuracies of labels and of samples never share a column
    columns: list[tuple[str, str, bool | None]] = [(k, h, True) for k, h in LABEL_COLUMNS.items() if k in has]
    columns += [
        (k, h, False if k in LABEL_HEADINGS else None) for k, h in COLUMNS.items() if plain or k not in LABEL_HEADINGS
    ]
    columns[-1:-1] = [(k, h, True) for k, h in LABEL_HEADINGS.items() if labelled]
    columns += [(k, h, None) for k, h in DOMAIN_COLUMNS.items() if k in has]
    for (scenario, method), members in sorted(groups.items()):
        cells = {
            h: _cell([m[k] for m in members if m.get(k) is not None]) if of in (None, scenario in labelled) else ""
            for k, h, of in columns
        }
        rows.append({"scenario": scenario, "method": method, **cells, "runs": str(len(members))})
    return rows


def _decimals(summary: SeedSummary) -> str:
    """A difference with its sign and interval."""
    interval = "" if summary.half_width is None else f" ± {summary.half_width:.3f}"
    return f"{summary.mean:+.3f}{interval}"


def _comparison_cells(comparison: MethodComparison) -> dict[tuple[str, str], dict[str, str]]:
    """Further columns by scenario and method."""
    cells = {}
    for scenario in comparison.scenarios:
        for entry in scenario.entries:
            rank = comparison.mean_rank(entry.method)
            cells[scenario.scenario, entry.method] = {
                "difference": "baseline" if entry.method == scenario.baseline else _difference(entry),
                "p (Holm)": "" if entry.adjusted_p is None else f"{entry.adjusted_p:.3g}",
                "mean rank": "" if rank is None else f"{rank:.2f}",
            }
    return cells


def _difference(entry: MethodEntry) -> str:
    if entry.reference:
        return "joint reference"
    return "" if entry.difference is None else f"{_decimals(entry.difference)} (n = {entry.difference.n})"


def comparison_rows(results: Sequence[dict[str, Any]], comparison: MethodComparison) -> list[dict[str, str]]:
    """:func:`table_rows`, the best method of a scenario first, with difference, adjusted p and mean rank."""
    further = _comparison_cells(comparison)
    place = {key: n for n, key in enumerate(further)}
    rows = [{**row, **further[row["scenario"], row["method"]]} for row in table_rows(results)]
    return sorted(rows, key=lambda row: place[row["scenario"], row["method"]])


def comparison_notes(comparison: MethodComparison) -> list[str]:
    """What the further columns mean, the orders over all scenarios, and what limits the comparison."""
    lines = [
        f"difference: {' or '.join(comparison.measure_names)} minus the baseline's over the runs both share, mean ±"
        " half of the 95 % t interval;"
        " p: exact two-sided sign-flip test, Holm's correction over all tests"
    ]
    if comparison.borda is not None:
        unit = "runs" if comparison.level == 1 else "scenarios"
        blocks = comparison.cells if comparison.level == 1 else len(comparison.scenarios)
        lines.append(
            f"mean rank (Borda): over {blocks} {unit} common to {len(comparison.ranked)} methods; 1 is the"
            f" {'highest' if comparison.higher_is_better else 'lowest'}; ties share the middle rank"
        )
    if comparison.kemeny is not None:
        orders = comparison.kemeny.orders
        several = f"{len(orders)} optimal orders, the data does not decide between them" if len(orders) > 1 else "order"
        lines.append(f"Kemeny's {several}:")
        lines += ["  " + " > ".join(comparison.ranked[k] for k in order) for order in orders[:MOST_ORDERS]]
        lines += [f"  and {len(orders) - MOST_ORDERS} more"] * (len(orders) > MOST_ORDERS)
    return [*lines, *(f"note: {note}" for note in comparison.notes)]


def comparison_text(results: Sequence[dict[str, Any]], comparison: MethodComparison, style: str = "text") -> str:
    """Table, ranks, tests and notes as text.

    Args:
        results: contents of ``result.json`` files.
        comparison: the same results by :func:`cl_plugins.comparison.compare_methods`.
        style: "text", "markdown", "csv" (numbers of the measure alone), "latex" (notes as comments) or "json".

    Raises:
        ValueError: for another style.
    """
    rows = comparison_rows(results, comparison)
    notes = comparison_notes(comparison)
    if style == "json":
        return json.dumps(_plain(rows, comparison), indent=1, ensure_ascii=False)
    table = _layout(_numeric_rows(comparison) if style == "csv" else rows, style)
    if style == "csv":
        return table
    if style == "latex":
        return "\n".join([*("% " + " ".join(note.split()) for note in notes), table])
    if style == "markdown":
        return "\n\n".join([table, "\n".join(f"- {note.strip()}" for note in notes)])
    return "\n".join([table, "", *notes])


def _numeric_rows(comparison: MethodComparison) -> list[dict[str, str]]:
    """One row a scenario and method with plain numbers, empty where undefined, for a spreadsheet."""

    def cell(value: float | None) -> str:
        return "" if value is None else repr(value)

    rows = []
    for scenario in comparison.scenarios:
        for e in scenario.entries:
            mean, sd, half, n = e.summary or (None, None, None, 0)
            difference, _, interval, pairs = e.difference or (None, None, None, 0)
            numbers = {"mean": mean, "sd": sd, "t95_half_width": half, "n": n, "difference": difference}
            numbers |= {"difference_t95_half_width": interval, "pairs": pairs, "p": e.p_value, "p_holm": e.adjusted_p}
            numbers |= {"mean_rank": comparison.mean_rank(e.method)}
            head = {"scenario": scenario.scenario, "method": e.method, "measure": scenario.measure}
            rows.append({**head, "baseline": scenario.baseline or "", **{k: cell(v) for k, v in numbers.items()}})
    return rows


def _plain(rows: list[dict[str, str]], comparison: MethodComparison) -> dict[str, Any]:
    """The comparison for JSON, in full precision."""
    borda, kemeny = comparison.borda, comparison.kemeny
    return {
        "measures": list(comparison.measures),
        "higher_is_better": comparison.higher_is_better,
        "methods": rows,
        "scenarios": [
            {
                "scenario": s.scenario,
                "measure": s.measure,
                "measure_name": s.measure_name,
                "baseline": s.baseline,
                "methods": [
                    {
                        "method": e.method,
                        "upper_bound": e.reference,
                        "runs": e.runs,
                        "summary": e.summary and e.summary._asdict(),
                        "difference": e.difference and e.difference._asdict(),
                        "p_value": e.p_value,
                        "adjusted_p": e.adjusted_p,
                    }
                    for e in s.entries
                ],
            }
            for s in comparison.scenarios
        ],
        "ranking": {
            "level": comparison.level,
            "methods": list(comparison.ranked),
            "cells": comparison.cells,
            "borda_mean_ranks": [comparison.mean_rank(m) for m in comparison.ranked] if borda else None,
            "kemeny_orders": [[comparison.ranked[k] for k in o] for o in kemeny.orders] if kemeny else None,
        },
        "notes": list(comparison.notes),
    }


def methods_table(results: Sequence[dict[str, Any]], style: str = "text") -> str:
    """The table as text.

    Args:
        results: contents of ``result.json`` files.
        style: "text", "markdown", "csv", "latex" or "json".

    Raises:
        ValueError: for another style.
    """
    return _layout(table_rows(results), style)


def _layout(rows: Sequence[dict[str, str]], style: str) -> str:
    """Rows with the same keys as a table."""
    head = list(rows[0])
    lines = [head, *([row[h] for h in head] for row in rows)]
    if style == "json":
        return json.dumps(rows, indent=1, ensure_ascii=False)
    if style in ("csv", "latex"):
        from cl_plugins.report._table import as_csv, as_latex

        return as_csv(lines).rstrip("\n") if style == "csv" else as_latex(lines)
    if style == "markdown":
        lines = [[escape_markdown(c) for c in line] for line in lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    if style == "markdown":
        padded = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
        return "\n".join([padded[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *padded[1:]])
    if style == "text":
        plain = [[" ".join(c.split()) for c in line] for line in lines]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in plain)
    raise ValueError(f"`style` must be text, markdown, csv, latex or json, got {style!r}")


def escape_markdown(cell: str) -> str:
    r"""A cell that stays text.

    Example:
        >>> escape_markdown("a|b <i>")
        'a\\|b \\<i\\>'
    """
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", " ".join(cell.split()))
