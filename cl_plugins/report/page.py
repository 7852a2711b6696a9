"""One HTML file about one run or many: no network, no markup from names, every number with its definition."""

from __future__ import annotations

import base64
import hashlib
import os
import secrets
import time
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from bokeh.resources import Resources

from cl_plugins.runs import Run, read_runs

from . import _fragments as fragments
from ._drift import CHARTS
from ._figures import CHANGE, figures_json
from ._numbers import group_runs, measures_of
from ._payload import payload
from ._table import as_csv, as_latex, as_markdown, tables
from ._text import embedded_json, text

_SCRIPTS = ("core.js", "charts.js", "compare.js", "methods.js", "inside.js", "main.js")
_LIVE = "live.js"
_PANEL = (
    '<figure id="box-{0}"><figcaption></figcaption><div class="plot" id="plot-{0}" tabindex="0"></div>'
    '<div class="key"></div></figure>'
)


@lru_cache(maxsize=16)
def _asset(file: str) -> str:
    return (resources.files("cl_plugins.report") / "assets" / file).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _bokeh() -> str:
    """Bokeh's core script; widgets, tables and typesetting are not needed."""
    scripts = Resources(mode="inline", components=["bokeh"], log_level="error").js_raw
    return "\n".join(scripts).replace("</script", "<\\/script").replace("<!--", "<\\!--").replace("\r\n", "\n")


@lru_cache(maxsize=8)
def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode('utf-8')).digest()).decode('ascii')}'"


def report_content(runs: Sequence[Run], title: str | None = None) -> dict[str, Any]:
    """What follows from the runs: ``data`` for the page's script and ``html`` pieces by the id of their place.

    Raises:
        ValueError: without a run.
    """
    runs = list(runs)
    if not runs:
        raise ValueError("`runs` must hold at least one run, got none; train with a ForgettingDashboard first")
    values = [measures_of(run) for run in runs]
    groups = group_runs(runs, values)
    labels = fragments.run_labels(runs)
    selections = []
    for index, group in enumerate(groups):
        selections += [f"g{index}"] if len(group.members) > 1 else []
        selections += [f"r{i}" for i in group.members]
    data = payload(runs, groups, values, labels)
    several = tables(runs, groups, values)
    data["selections"] = selections
    data["change"] = CHANGE
    kinds = {"CSV": as_csv, "Markdown": as_markdown, "LaTeX": as_latex}
    data["copies"] = {kind: "\n".join(map(layout, several)) for kind, layout in kinds.items()}
    heading = title or fragments.default_title(runs, groups)
    return {
        "data": data,
        "title": heading,
        "panels": max(len(run["panels"]) for run in data["runs"]),
        "confusion": any(run["confusions"] for run in data["runs"]),
        "transfer": any(run["before"] or run["initial"] for run in data["runs"]),
        "inside": any(run["inside"] for run in data["runs"]),
        "drift": any(run["drift"] for run in data["runs"]),
        "orders": any(run["order"] for run in data["runs"]),
        "html": {
            "heading": f"<bdi>{text(heading)}</bdi>",
            "tiles": fragments.tiles(runs, groups, values, selections),
            "notices": fragments.notices(runs, groups, labels),
            "table": fragments.tables(several),
            "definitions": fragments.definitions(groups),
            "orders": fragments.orders(runs, groups, values),
            "provenance": fragments.provenance(runs, labels),
            "written": f"{len(runs)} run{'s' * (len(runs) != 1)}, written {fragments.moment(time.time())}",
        },
    }


def render_report(runs: Sequence[Run], title: str | None = None, *, live: bool = False) -> str:
    """The report as HTML.

    Args:
        runs: at least one run.
        title: heading of the page; follows from methods and scenario when None.
        live: add the script that asks its own server for news; without it the page may connect to nothing.

    Raises:
        ValueError: without a run.
    """
    content = report_content(runs, title)
    panels, confusion, transfer = content["panels"], content["confusion"], content["transfer"]
    drift = CHARTS if content["drift"] else 0
    files = (*_SCRIPTS, _LIVE) if live else _SCRIPTS
    scripts = [_bokeh(), "\n".join(_asset(file) for file in files)]
    connect = "'self'" if live else "'none'"
    policy = (
        f"default-src 'none'; script-src {' '.join(map(_hash, scripts))}; style-src 'unsafe-inline';"
        f" img-src data: blob:; connect-src {connect}; base-uri 'none'; form-action 'none'"
    )
    parts = {
        **content["html"],
        "policy": text(policy),
        "title": text(content["title"]),
        "css": _asset("report.css"),
        "panels": "".join(_PANEL.format(f"panel{i}") for i in range(panels)),
        "confusion": "" if confusion else " hidden",
        "has_transfer": "" if transfer else " hidden",
        "has_inside": "" if content["inside"] else " hidden",
        "has_orders": "" if content["orders"] else " hidden",
        "stream_width": "7" if content["orders"] else "12",
        "drift": "".join(_PANEL.format(f"drift{i}") for i in range(drift)),
        "has_drift": "" if drift else " hidden",
        "has_panels": "" if panels else " hidden",
        "documents": figures_json(panels, confusion, transfer, content["inside"], drift),
        "data": embedded_json(content["data"]),
        "bokeh": scripts[0],
        "script": scripts[1],
    }
    return "".join(parts[piece] if k % 2 else piece for k, piece in enumerate(_asset("report.html").split("@@")))


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

    Example:
        >>> import tempfile
        >>> from cl_plugins.runs import RunWriter
        >>> folder = Path(tempfile.mkdtemp())
        >>> with RunWriter(folder, "demo") as writer:
        ...     writer.write("row", after=0, correct=[9], total=[10])
        >>> write_report(folder, folder / "report.html").stat().st_size > 1_000_000
        True
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
