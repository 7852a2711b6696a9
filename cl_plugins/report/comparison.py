"""The comparison of methods as one HTML file: no script, no network, names are text.

Each scenario shows its methods on one axis: every run as a tick, the mean as a dot, the 95 % t interval as a bar, so
that the eye sees whether two methods differ by more than their runs do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from cl_plugins.compare import MOST_ORDERS, table_rows
from cl_plugins.comparison import MethodComparison, MethodEntry, ScenarioComparison
from cl_plugins.label_scores import LABEL_ACCURACY
from cl_plugins.stats import SeedSummary

from ._fragments import moment
from ._numbers import UNDEFINED, number
from ._text import name, text
from .page import _asset

_PAD = 5.0


def _bounds(scenario: ScenarioComparison) -> tuple[float, float]:
    """The axis: all runs and intervals of a scenario; intervals that leave [0, 1] are cut there."""
    low, high = math.inf, -math.inf
    for entry in scenario.entries:
        for value in entry.values.values():
            low, high = min(low, value), max(high, value)
        if entry.summary is not None:
            half = entry.summary.half_width or 0.0
            low = min(low, max(entry.summary.mean - half, min(low, 0.0)))
            high = max(high, min(entry.summary.mean + half, max(high, 1.0)))
    if not math.isfinite(low):
        return 0.0, 1.0
    room = max((high - low) * 0.04, 0.005)
    return low - room, high + room


def _svg(content: str, label: str) -> str:
    return f'<svg class="strip" role="img" aria-label="{text(label)}">{content}</svg>'


def _strip(entry: MethodEntry, low: float, high: float, best: bool) -> str:
    """Runs, mean and interval of one method on the common axis."""

    def x(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return _PAD + share * (100 - 2 * _PAD)

    if entry.summary is None:
        return ""
    mean, half = entry.summary.mean, entry.summary.half_width
    parts = [f'<line class="axis" x1="{_PAD}%" x2="{100 - _PAD}%" y1="11" y2="11"/>']
    if half is not None:
        left, right = x(mean - half), x(mean + half)
        parts.append(f'<rect x="{left:.2f}%" y="6.5" width="{max(right - left, 0.3):.2f}%" height="9" rx="3"/>')
    parts += [
        f'<line class="tick" x1="{x(v):.2f}%" x2="{x(v):.2f}%" y1="4" y2="18"/>' for v in sorted(entry.values.values())
    ]
    parts.append(f'<circle cx="{x(mean):.2f}%" cy="11" r="4"/>')
    kind = "bound" if entry.reference else "top" if best else "other"
    told = f"mean {number(mean)}, {'no interval' if half is None else f'95 % t interval ± {number(half)}'}"
    return _svg(f'<g class="{kind}">{"".join(parts)}</g>', told)


def _axis(low: float, high: float) -> str:
    step = next(s for s in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 1e12) if (high - low) / s <= 6)
    digits = 3 if step < 0.01 else 2 if step < 0.1 else 1
    parts = []
    labels = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    for k in labels:
        at = _PAD + (k * step - low) / (high - low) * (100 - 2 * _PAD)
        kind = ' class="minor"' if k % 2 and len(labels) > 4 else ""  # left out on narrow screens
        parts.append(f'<text{kind} x="{at:.2f}%" y="13" text-anchor="middle">{number(k * step, digits)}</text>')
    return _svg("".join(parts), "axis")


def _amount(summary: SeedSummary | None, signed: bool = False) -> str:
    if summary is None:
        return UNDEFINED
    sign = "+" if signed and float(number(summary.mean)) > 0 else ""
    half = "" if summary.half_width is None else f" ± {number(summary.half_width)}"
    return f"{sign}{number(summary.mean)}{half}"


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _two(upper: str, lower: str, kind: str = "") -> str:
    """A cell with what limits the number in small letters below it."""
    below = f'<span class="below">{text(lower)}</span>' if lower else ""
    return f'<td class="n{kind}">{text(upper)}{below}</td>'


def _line(entry: MethodEntry, scenario: ScenarioComparison, comparison: MethodComparison) -> str:
    low, high = _bounds(scenario)
    best = entry is scenario.entries[0] and not entry.reference
    tags = ["baseline"] * (entry.method == scenario.baseline) + ["joint reference"] * entry.reference
    tag = "".join(f'<span class="below">{t}</span>' for t in tags)
    cells = [_two(_amount(entry.summary), f"n = {entry.runs}")]
    if entry.difference is None:
        cells.append(_two("", ""))
    else:
        better = (entry.difference.mean > 0) is comparison.higher_is_better
        half = entry.difference.half_width  # colored where the interval leaves no doubt about the sign
        kind = "" if half is None or abs(entry.difference.mean) <= half else " better" if better else " worse"
        n = entry.difference.n
        cells.append(_two(_amount(entry.difference, signed=True), f"{n} pair{'s' * (n > 1)}", kind))
    cells.append(_two(_p(entry.adjusted_p), "" if entry.p_value is None else f"alone {_p(entry.p_value)}"))
    rank = comparison.mean_rank(entry.method)
    cells.append(_two("" if rank is None else f"{rank:.2f}", ""))
    strip = f'<td class="strip-cell">{_strip(entry, low, high, best)}</td>'
    return f'<tr><th scope="row">{name(entry.method)}{tag}</th>{strip}{"".join(cells)}</tr>'


def _scenario(
    scenario: ScenarioComparison, comparison: MethodComparison, rows: dict[tuple[str, str], dict[str, str]]
) -> str:
    base = f"minus {scenario.baseline}" if scenario.baseline else "difference"
    head = '<th scope="col">method</th><th scope="col">runs, mean and interval</th>'
    heads = ("mean ± 95 % t", base, "p (Holm)", "mean rank")
    head += "".join(f'<th scope="col" class="n">{text(h)}</th>' for h in heads)
    body = "".join(_line(e, scenario, comparison) for e in scenario.entries)
    low, high = _bounds(scenario)
    scale = f'<tr class="scale-row"><td></td><td class="strip-cell">{_axis(low, high)}</td></tr>'
    return (
        f'<section class="card wide12"><div class="head"><h2>{name(scenario.scenario)}</h2></div>'
        f'<p class="about">{text(scenario.measure_name)}. A tick is a run, the dot their mean, the bar the'
        " 95 % t interval.</p>"
        f'<div class="scroll"><table class="methods"><thead><tr>{head}</tr></thead><tbody>{body}{scale}</tbody></table>'
        f"</div>{_further(scenario, rows)}{_values(scenario)}</section>"
    )


def _further(scenario: ScenarioComparison, rows: dict[tuple[str, str], dict[str, str]]) -> str:
    """Mean and interval of the other measures."""
    own = [rows[scenario.scenario, e.method] for e in scenario.entries]
    heads = [h for h in own[0] if h not in ("scenario", "method") and any(row[h] for row in own)]
    head = "".join(f'<th scope="col" class="n">{text(h)}</th>' for h in heads)
    body = "".join(
        f'<tr><th scope="row">{name(row["method"])}</th>'
        + "".join(f'<td class="n">{text(row[h])}</td>' for h in heads)
        + "</tr>"
        for row in own
    )
    return (
        '<details><summary>other measures, mean ± 95 % t</summary><div class="scroll"><table class="values"><thead><tr>'
        f"<th>method</th>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _values(scenario: ScenarioComparison) -> str:
    """Every run's value, method by replicate."""
    keys = sorted({key for e in scenario.entries for key in e.values}, key=lambda k: (str(k[0]), str(k[1]), str(k[2])))
    shown = keys[:40]
    heads = "".join(
        f'<th class="n">seed {text(s)}{"" if o in (None, s) else f", order {text(o)}"}</th>' for s, o, _ in shown
    )
    lines = "".join(
        f'<tr><th scope="row">{name(e.method)}</th>'
        + "".join(f'<td class="n">{number(e.values[k], 4) if k in e.values else "–"}</td>' for k in shown)
        + "</tr>"
        for e in scenario.entries
    )
    more = f"<p>and {len(keys) - 40} more</p>" if len(keys) > 40 else ""
    return (
        "<details><summary>every run; – is one that was not made or is undefined</summary>"
        f'<div class="scroll"><table class="values"><thead><tr><th>method</th>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>{more}</details>"
    )


def _ranking(comparison: MethodComparison) -> str:
    if comparison.borda is None:
        return ""
    order = sorted(comparison.ranked, key=lambda m: (comparison.mean_rank(m) or 0.0, m))
    unit = "runs" if comparison.level == 1 else "scenarios"
    blocks = comparison.cells if comparison.level == 1 else len(comparison.scenarios)
    body = "".join(
        f'<tr><th scope="row">{name(m)}</th><td class="n">{comparison.mean_rank(m):.2f}</td></tr>' for m in order
    )
    borda = (
        '<section class="card wide6"><div class="head"><h2>Mean ranks (Borda)</h2></div>'
        f'<p class="about">over {blocks} {unit} that all {len(order)} methods share; 1 is best, ties share the middle'
        ' rank</p><table><thead><tr><th scope="col">method</th><th scope="col" class="n">mean rank</th></tr></thead>'
        f"<tbody>{body}</tbody></table></section>"
    )
    if comparison.kemeny is None:
        return borda
    orders = comparison.kemeny.orders
    told = (
        "One order has the fewest pairwise disagreements with the runs."
        if len(orders) == 1
        else f"{len(orders)} orders have equally few pairwise disagreements: the data does not decide between them."
    )
    items = "".join(f"<li>{' &gt; '.join(name(comparison.ranked[k]) for k in o)}</li>" for o in orders[:MOST_ORDERS])
    more = f'<p class="about">and {len(orders) - MOST_ORDERS} more</p>' if len(orders) > MOST_ORDERS else ""
    return (
        f'{borda}<section class="card wide6"><div class="head"><h2>Optimal orders (Kemeny, exact)</h2></div>'
        f'<p class="about">{told}</p><ol class="orders">{items}</ol>{more}</section>'
    )


def _definitions(comparison: MethodComparison) -> str:
    better = "higher" if comparison.higher_is_better else "lower"
    on = {s.measure_name: [t.scenario for t in comparison.scenarios if t.measure_name == s.measure_name]
          for s in comparison.scenarios}  # fmt: skip
    entries = {
        name: f"what is compared{' on ' + ', '.join(where) if len(on) > 1 else ''}; {better} is better"
        for name, where in on.items()
    }
    if any(s.multi_label for s in comparison.scenarios):
        entries["label accuracy"] = LABEL_ACCURACY
    entries |= {
        "mean ± 95 % t": "mean over runs and half of the t interval; a run is the unit, below 3 there is no interval",
        "difference, pairs": "mean paired difference to the baseline over the runs with the same seed, order seed and"
        " class order, and their number; colored where its interval does not hold 0",
        "p (Holm)": "exact two-sided sign-flip test of that difference, after Holm's correction over all tests on this"
        " page; below it the same test alone",
        "mean rank": "Borda: rank of the method, averaged; 1 is best",
        "joint reference": "trains on all tasks at once; neither tested nor ranked",
    }
    return "".join(f"<dt>{text(k)}</dt><dd>{text(v)}</dd>" for k, v in entries.items())


def render_comparison(results: Sequence[dict[str, Any]], comparison: MethodComparison, title: str | None = None) -> str:
    """The comparison as HTML.

    Args:
        results: contents of ``result.json`` files.
        comparison: the same results by :func:`cl_plugins.comparison.compare_methods`.
        title: heading of the page; numbers of methods and scenarios when None.
    """
    rows = {(row["scenario"], row["method"]): row for row in table_rows(results)}
    methods = {e.method for s in comparison.scenarios for e in s.entries}
    several = len(comparison.scenarios)
    heading = title or f"{len(methods)} methods on {several} scenario{'s' * (several > 1)}"
    notes = "".join(f"<li>{text(note)}</li>" for note in comparison.notes)
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(heading)}</title><style>{_asset('report.css')}{_asset('comparison.css')}</style></head><body>"
        f'<header><p class="kind">Comparison of methods</p><h1><bdi>{text(heading)}</bdi></h1>'
        f'<p class="lede">Compared by {text(" and ".join(comparison.measure_names))} over {len(results)} runs.</p>'
        + (f'<ul class="notices" role="status">{notes}</ul>' if notes else "")
        + "</header><main>"
        + "".join(_scenario(s, comparison, rows) for s in comparison.scenarios)
        + _ranking(comparison)
        + f'<section class="card wide{6 if comparison.borda and not comparison.kemeny else 12}">'
        '<div class="head"><h2>Definitions in force</h2></div>'
        f'<dl class="definitions">{_definitions(comparison)}</dl></section></main>'
        f"<footer>written {text(moment(time.time()))} by cl-plugins. This page has no script and needs no network."
        "</footer></body></html>\n"
    )
