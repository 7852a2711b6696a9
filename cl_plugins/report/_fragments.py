"""Pieces of the page that need no script: headline numbers, the table, notices, provenance and definitions."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cl_plugins.runs import Run
from cl_plugins.stats import variance_parts

from ._measures import LABEL_NOTE, Measure, headline, measures_for
from ._numbers import (
    UNDEFINED,
    Group,
    class_order,
    cost_of,
    number,
    quantity,
    steps_of,
    summarize,
    warnings_of,
)
from ._text import name, text


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


def _tile(measure: str, entry: Measure, shown: str, note: str) -> str:
    title, _, variant = entry.name.partition(" (")
    variant = f"({variant}" if variant else ""
    written = ' class="written"' if title.startswith("mAP") else ""  # others begin with a capital
    undefined = shown == UNDEFINED
    reason = f'<p class="note">{text(entry.undefined)}</p>' if undefined else f'<p class="note">{text(note)}</p>'
    return (
        f'<div class="tile{" undefined" if undefined else ""}" title="{text(entry.definition)}">'
        f'<h3{written}>{text(title)} <span class="variant">{text(variant)}</span></h3>'
        f'<p class="value" data-measure="{measure}">{text(shown)}</p>{reason}</div>'
    )


def tiles(
    runs: Sequence[Run], groups: Sequence[Group], values: Sequence[dict[str, float]], selections: Sequence[str]
) -> str:
    """The headline numbers of every selectable run and method; the script shows one set at a time."""
    sets: list[str] = []
    for selection in selections:
        index = int(selection[1:])
        entries = []
        group = groups[index] if selection[0] == "g" else next(g for g in groups if index in g.members)
        shown = [runs[index]] if selection[0] == "r" else [runs[i] for i in group.members]
        names = measures_for(group.multi_label)
        for measure in headline(shown, group.multi_label):
            entry = names[measure]
            better = f"{entry.better} is better"
            if selection[0] == "r":
                entries.append(_tile(measure, entry, number(values[index][measure]), better))
                continue
            summary = summarize(group, measure, values)
            if summary is None:
                entries.append(_tile(measure, entry, UNDEFINED, ""))
                continue
            half = summary.half_width
            spread = "no interval below 3 runs" if half is None else f"± {number(half)} (95 % t)"
            entries.append(_tile(measure, entry, number(summary.mean), f"{spread}, n = {summary.n}"))
        hidden = "" if not sets else " hidden"
        sets.append(f'<div class="tiles" data-selection="{selection}"{hidden}>{"".join(entries)}</div>')
    return "".join(sets)


def tables(several: Sequence[Sequence[Sequence[str]]]) -> str:
    """The methods tables, one for each kind of stream."""
    return "".join(_table(lines) for lines in several)


def _table(lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col"{" class=n" if i > 1 else ""}>{text(c)}</th>' for i, c in enumerate(lines[0]))
    body = []
    for line in lines[1:]:
        # short names stay on one line, hyphens and all
        first, second = (' class="long"' if len(c) > 28 else "" for c in line[:2])
        cells = [f'<th scope="row"{first}>{name(line[0])}</th><td{second}>{name(line[1])}</td>']
        cells += [f'<td class="n{" undefined" if c == UNDEFINED else ""}">{text(c)}</td>' for c in line[2:]]
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _state(run: Run) -> str:
    done = f"{run.correct.shape[0]} of {steps_of(run)} tasks"
    if run.ended == "finished":
        return done
    if run.ended is not None:
        return f"{done}, {run.ended}: {run.error}" if run.error else f"{done}, {run.ended}"
    return f"{done}, not ended (running or killed)"


def notices(runs: Sequence[Run], groups: Sequence[Group], labels: Sequence[str]) -> str:
    notes = [text(note) for note in warnings_of(runs, groups)]
    for run, label in zip(runs, labels, strict=True):
        who = f"{name(run.meta.get('method') or run.id)}, {name(label)}: " if len(runs) > 1 else ""
        notes += [f"{who}{text(problem)}" for problem in run.problems]
        if run.ended != "finished":
            notes.append(f"{who}{text(_state(run))}.")
    items = "".join(f"<li>{note}</li>" for note in notes[:40])
    more = f"<li>and {len(notes) - 40} more</li>" if len(notes) > 40 else ""
    return f'<ul class="notices" role="status">{items}{more}</ul>' if notes else ""


def orders(runs: Sequence[Run], groups: Sequence[Group], values: Sequence[dict[str, float]]) -> str:
    """How much of the differences between runs is due to the class order, by method; a table for each measure."""
    return "".join(
        _orders(runs, [g for g in groups if g.multi_label == kind], values)
        for kind in sorted({g.multi_label for g in groups})
    )


def _orders(runs: Sequence[Run], groups: Sequence[Group], values: Sequence[dict[str, float]]) -> str:
    lines, mixed = [], []
    measure = groups[0].ranking
    title = text(measures_for(groups[0].multi_label)[measure].name)
    for group in groups:
        by_order: dict[Any, list[float]] = {}
        for i in group.members:
            if math.isfinite(values[i][measure]):
                by_order.setdefault(class_order(runs[i]), []).append(values[i][measure])
        if len(by_order) < 2:
            continue
        parts = variance_parts(list(by_order.values()))
        if parts is None:
            mixed.append(group)
            continue
        cells = (str(parts.orders), str(parts.runs), number(parts.order_sd), number(parts.seed_sd))
        lines.append(f"<tr><th>{name(group.label)}</th>{''.join(f'<td class=n>{c}</td>' for c in cells)}</tr>")
    told = ""
    if mixed:
        told = (
            '<p class="about">Orders and seeds change together in the runs of '
            f"{', '.join(name(g.label) for g in mixed[:6])}{f' and {len(mixed) - 6} more' if len(mixed) > 6 else ''}:"
            " their parts cannot be told apart. Run several seeds for each order to split them.</p>"
        )
    if not lines:
        return told
    heads = ("orders", "runs", "sd between orders", "sd between seeds")
    head = "".join(f'<th class="n">{h}</th>' for h in heads)
    return (
        f"<table><thead><tr><th>{title} of</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        f'<p class="about">One-way random effects.</p>{told}'
    )


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return value
    shown = json.dumps(value, ensure_ascii=True, default=str)
    return shown if len(shown) <= 400 else shown[:400] + " ..."


def moment(seconds: float | None) -> str:
    if seconds is None:
        return "not recorded"
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return "not recorded"


def provenance(runs: Sequence[Run], labels: Sequence[str]) -> str:
    blocks = []
    for run, label in zip(runs, labels, strict=True):
        costs = cost_of(run)
        known: Mapping[str, Any] = {
            "run": run.id,
            "state": _state(run),
            "started": moment(run.started),
            "last event": moment(run.updated),
            "training seconds": quantity(costs["train_seconds"]),
            "trainable parameters": quantity(costs["trainable"]),
            **run.meta,
        }
        entries = "".join(f"<dt>{name(k)}</dt><dd><bdi>{text(_plain(v))}</bdi></dd>" for k, v in known.items())
        heading = f"{name(run.meta.get('method') or run.id)}, {name(label)}"
        opened = " open" if len(runs) == 1 else ""
        blocks.append(f"<details{opened}><summary>{heading}</summary><dl>{entries}</dl></details>")
    return "".join(blocks)


def definitions(groups: Sequence[Group]) -> str:
    """What every measure is, for the kinds of streams on the page."""
    kinds = sorted({group.multi_label for group in groups})
    known = [measure for kind in kinds for measure in measures_for(kind).values()]
    told = "".join(
        f"<dt>{text(m.name)}</dt><dd>{text(m.definition)}. {text(m.better.capitalize())} is better."
        f" Undefined when {text(m.undefined)}.</dd>"
        for m in known
    )
    return told + (f"<dt>label accuracy</dt><dd>{text(LABEL_NOTE)}.</dd>" if True in kinds else "")


def default_title(runs: Sequence[Run], groups: Sequence[Group]) -> str:
    scenarios = sorted({g.scenario for g in groups if g.scenario})
    if len(groups) == 1:
        return groups[0].label
    where = f" on {scenarios[0]}" if len(scenarios) == 1 else f" on {len(scenarios)} scenarios" if scenarios else ""
    return f"{len({g.method for g in groups})} methods{where}, {len(runs)} runs"
