"""Tables of methods over seeds from the ``result.json`` files of finished runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cl_plugins._reading import read_json
from cl_plugins.stats import summarize_seeds

COLUMNS = {
    "average_accuracy": "average accuracy",
    "average_incremental_accuracy": "incremental accuracy",
    "forgetting": "forgetting",
    "train_seconds": "train s",
}
"""Keys of a result and the headings of their columns."""

DOMAIN_COLUMNS = {"transfer": "transfer", "average": "average (all cells)", "last": "last"}
"""Further columns, where some result has them: streams of domains with class names."""


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
            for key in (*COLUMNS, *DOMAIN_COLUMNS):
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
    further = {k: h for k, h in DOMAIN_COLUMNS.items() if any(m.get(k) is not None for m in results)}
    for (scenario, method), members in sorted(groups.items()):
        cells = {h: _cell([m[k] for m in members if m.get(k) is not None]) for k, h in {**COLUMNS, **further}.items()}
        rows.append({"scenario": scenario, "method": method, **cells, "runs": str(len(members))})
    return rows


def methods_table(results: Sequence[dict[str, Any]], style: str = "text") -> str:
    """The table as text.

    Args:
        results: contents of ``result.json`` files.
        style: "text", "markdown", "csv", "latex" or "json".

    Raises:
        ValueError: for another style.
    """
    rows = table_rows(results)
    head = list(rows[0])
    lines = [head, *([row[h] for h in head] for row in rows)]
    if style == "json":
        return json.dumps(rows, indent=1, ensure_ascii=False)
    if style == "csv":
        return "\n".join(",".join(f'"{c}"' if "," in c else c for c in line) for line in lines)
    if style == "latex":
        body = "\n".join(
            " & ".join(c.replace("±", r"$\pm$").replace("_", r"\_") for c in line) + r" \\" for line in lines
        )
        return f"\\begin{{tabular}}{{{'l' * len(head)}}}\n{body}\n\\end{{tabular}}"
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    if style == "markdown":
        padded = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
        return "\n".join([padded[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *padded[1:]])
    if style == "text":
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
    raise ValueError(f"`style` must be text, markdown, csv, latex or json, got {style!r}")
