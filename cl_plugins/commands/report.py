"""``cl-bench report``: one HTML page about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

HELP = "HTML page about runs"


def parser() -> ArgumentParser:
    """Options of the command."""
    parser = ArgumentParser(description="One HTML page about all runs in a folder.")
    parser.add_argument("folder", type=str, help="a run folder, or a folder of them")
    parser.add_argument("--out", "-o", default="report.html", help="the HTML file")
    return parser


def execute(arguments: Any) -> int:
    """Run the command; returns the exit status."""
    from cl_plugins.report import write_report
    from cl_plugins.runs import read_runs

    runs = read_runs(Path(arguments.folder))
    if not runs:
        raise ValueError(f"`folder` must hold runs, found none in {arguments.folder!r}")
    print(write_report(runs, Path(arguments.out)))
    return 0
