"""One HTML file about one run or many: no network, no markup from names, every number with its definition."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from bokeh.resources import Resources

from cl_plugins.runs import Run, read_run, read_runs

from ._figures import CHANGE, figures_json
from ._numbers import (
    HEADLINE,
    MEASURES,
    UNDEFINED,
    Group,
    cost_of,
    group_runs,
    measures_of,
    number,
    quantity,
    summarize,
    warnings_of,
)
from ._payload import payload
from ._table import as_csv, as_latex, as_markdown, table_lines
from ._text import embedded_json, name, text

_SCRIPTS = ("core.js", "charts.js", "compare.js", "main.js")
_PANEL = (
    '<figure id="box-panel{0}"><figcaption></figcaption><div class="plot" id="plot-panel{0}" tabindex="0"></div>'
    '<div class="key"></div></figure>'
)


@lru_cache(maxsize=16)
def _asset(file: str) -> str:
    return (resources.files("cl_plugins.report") / "assets" / file).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _bokeh() -> str:
    """Bokeh's core script; widgets, tables and typesetting are not needed."""
    scripts = Resources(mode="inline", components=["bokeh"], log_level="error").js_raw
    return "\n".join(scripts).replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode('ascii')}'"


def run_labels(runs: Sequence[Run]) -> list[str]:
    """A short name for each run, the seed where it tells the runs apart and the folder's name where it does not."""
    labels = []
    for run in runs:
        seeds = [f"{k.replace('_', ' ')} {run.meta[k]}" for k in ("seed", "order_seed") if run.meta.get(k) is not None]
        labels.append(", ".join(seeds) or run.id)
    keys = [(r.meta.get("method"), r.meta.get("scenario"), label) for r, label in zip(runs, labels, strict=True)]
    return [
        f"{label} ({run.id})" if keys.count(key) > 1 and label != run.id else label
        for run, label, key in zip(runs, labels, keys, strict=True)
    ]


def _tile(measure: str, shown: str, note: str) -> str:
    entry = MEASURES[measure]
    title, _, variant = entry.name.partition(" (")
    variant = f"({variant}" if variant else ""
    undefined = shown == UNDEFINED
    reason = f'<p class="note">{text(entry.undefined)}</p>' if undefined else f'<p class="note">{text(note)}</p>'
    return (
        f'<div class="tile{" undefined" if undefined else ""}" title="{text(entry.definition)}">'
        f'<h3>{text(title)} <span class="variant">{text(variant)}</span></h3>'
        f'<p class="value" data-measure="{measure}">{text(shown)}</p>{reason}</div>'
    )


def _tiles(groups: Sequence[Group], values: Sequence[dict[str, float]], selections: Sequence[str]) -> str:
    """The headline numbers of every selectable run and method; the script shows one set at a time."""
    sets: list[str] = []
    for selection in selections:
        index = int(selection[1:])
        tiles = []
        for measure in HEADLINE:
            better = f"{MEASURES[measure].better} is better"
            if selection[0] == "r":
                tiles.append(_tile(measure, number(values[index][measure]), better))
                continue
            summary = summarize(groups[index], measure, values)
            if summary is None:
                tiles.append(_tile(measure, UNDEFINED, ""))
                continue
            half = summary.half_width
            spread = "no interval below 3 runs" if half is None else f"± {number(half)} (95 % t)"
            tiles.append(_tile(measure, number(summary.mean), f"{spread}, n = {summary.n}"))
        hidden = "" if not sets else " hidden"
        sets.append(f'<div class="tiles" data-selection="{selection}"{hidden}>{"".join(tiles)}</div>')
    return "".join(sets)


def _table(lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col"{" class=n" if i > 1 else ""}>{text(c)}</th>' for i, c in enumerate(lines[0]))
    body = []
    for line in lines[1:]:
        cells = [f'<th scope="row">{name(line[0])}</th><td>{name(line[1])}</td>']
        cells += [f'<td class="n{" undefined" if c == UNDEFINED else ""}">{text(c)}</td>' for c in line[2:]]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _state(run: Run) -> str:
    done = f"{run.correct.shape[0]} of {len(run.tasks)} tasks"
    if run.ended == "finished":
        return done
    if run.ended is not None:
        return f"{done}, {run.ended}: {run.error}" if run.error else f"{done}, {run.ended}"
    return f"{done}, not ended (running or killed)"


def _alerts(runs: Sequence[Run], groups: Sequence[Group], labels: Sequence[str]) -> str:
    notes = [text(note) for note in warnings_of(runs, groups)]
    for run, label in zip(runs, labels, strict=True):
        who = f"{name(run.meta.get('method') or run.id)}, {name(label)}: " if len(runs) > 1 else ""
        notes += [f"{who}{text(problem)}" for problem in run.problems]
        if run.ended != "finished":
            notes.append(f"{who}{text(_state(run))}.")
    items = "".join(f"<li>{note}</li>" for note in notes[:40])
    more = f"<li>and {len(notes) - 40} more</li>" if len(notes) > 40 else ""
    return f'<ul class="notices" role="status">{items}{more}</ul>' if notes else ""


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    shown = json.dumps(value, ensure_ascii=True, default=str)
    return shown if len(shown) <= 400 else shown[:400] + " ..."


def _moment(seconds: float | None) -> str:
    if seconds is None:
        return "not recorded"
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "not recorded"


def _provenance(runs: Sequence[Run], labels: Sequence[str]) -> str:
    blocks = []
    for run, label in zip(runs, labels, strict=True):
        costs = cost_of(run)
        known: Mapping[str, Any] = {
            "run": run.id,
            "state": _state(run),
            "started": _moment(run.started),
            "last event": _moment(run.updated),
            "training seconds": quantity(costs["train_seconds"]),
            "trainable parameters": quantity(costs["trainable"]),
            **run.meta,
        }
        entries = "".join(f"<dt>{name(k)}</dt><dd><bdi>{text(_plain(v))}</bdi></dd>" for k, v in known.items())
        heading = f"{name(run.meta.get('method') or run.id)}, {name(label)}"
        opened = " open" if len(runs) == 1 else ""
        blocks.append(f"<details{opened}><summary>{heading}</summary><dl>{entries}</dl></details>")
    return "".join(blocks)


def _definitions() -> str:
    return "".join(
        f"<dt>{text(m.name)}</dt><dd>{text(m.definition)}. {text(m.better.capitalize())} is better."
        f" Undefined when {text(m.undefined)}.</dd>"
        for m in MEASURES.values()
    )


def _title(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    scenarios = sorted({g.scenario for g in groups if g.scenario})
    if len(groups) == 1:
        return groups[0].label
    where = f" on {scenarios[0]}" if len(scenarios) == 1 else ""
    return f"{len({g.method for g in groups})} methods{where}, {len(runs)} runs"


def render_report(runs: Sequence[Run], title: str | None = None) -> str:
    """The report as HTML.

    Args:
        runs: at least one run.
        title: heading of the page; follows from methods and scenario when None.

    Raises:
        ValueError: without a run.
    """
    runs = list(runs)
    if not runs:
        raise ValueError("`runs` must hold at least one run, got none; train with a ForgettingDashboard first")
    values = [measures_of(run) for run in runs]
    groups = group_runs(runs, values)
    labels = run_labels(runs)
    selections = []
    for index, group in enumerate(groups):
        selections += [f"g{index}"] if len(group.members) > 1 else []
        selections += [f"r{i}" for i in group.members]
    data = payload(runs, groups, values, labels)
    panels = max(len(run["panels"]) for run in data["runs"])
    confusion = any(run["confusions"] for run in data["runs"])
    lines = table_lines(runs, groups, values)
    data["selections"] = selections
    data["change"] = CHANGE
    data["copies"] = {"CSV": as_csv(lines), "Markdown": as_markdown(lines), "LaTeX": as_latex(lines)}
    scripts = [_bokeh(), "\n".join(_asset(file) for file in _SCRIPTS)]
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src 'unsafe-inline';"
        " img-src data: blob:; connect-src 'none'; base-uri 'none'; form-action 'none'"
    )
    heading = title or _title(runs, groups)
    parts = {
        "policy": text(policy),
        "title": text(heading),
        "heading": f"<bdi>{text(heading)}</bdi>",
        "css": _asset("report.css"),
        "tiles": _tiles(groups, values, selections),
        "alerts": _alerts(runs, groups, labels),
        "table": _table(lines),
        "provenance": _provenance(runs, labels),
        "definitions": _definitions(),
        "panels": "".join(_PANEL.format(i) for i in range(panels)),
        "written": _moment(time.time()),
        "count": f"{len(runs)} run{'s' * (len(runs) != 1)}",
        "confusion": "" if confusion else " hidden",
        "has_panels": "" if panels else " hidden",
        "documents": figures_json(panels, confusion),
        "data": embedded_json(data),
        "bokeh": scripts[0],
        "script": scripts[1],
    }
    page = []
    for k, piece in enumerate(_asset("report.html").split("@@")):
        page.append(parts[piece] if k % 2 else piece)
    return "".join(page)


def write_report(runs: Sequence[Run] | Path | str, out: Path | str, title: str | None = None) -> Path:
    """Write the report; a reader sees the old file or the whole new one, never a part.

    Args:
        runs: the runs, or a folder of them (or a single run's folder).
        out: the HTML file; a folder gets ``report.html``.
        title: heading of the page; follows from methods and scenario when None.

    Returns:
        The file.

    Raises:
        ValueError: without a run.
        FileNotFoundError: when ``runs`` is a folder that does not exist.
    """
    if isinstance(runs, (str, Path)):
        folder = Path(runs)
        runs = read_runs(folder)
        if not runs:
            raise ValueError(f"`runs` must hold at least one run, found none in {str(folder)!r}")
    target = Path(out)
    target = target / "report.html" if target.is_dir() else target
    page = render_report(runs, title)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(3)}.tmp")
    try:
        temporary.write_text(page, encoding="utf-8", errors="replace")
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return target


__all__ = ["read_run", "read_runs", "render_report", "write_report"]
