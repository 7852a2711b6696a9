"""``cl-bench serve``: the report, live on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

HELP = "live HTML page about runs"


def parser() -> ArgumentParser:
    """Options of the command."""
    parser = ArgumentParser(description="The report on this machine at 127.0.0.1, up to date while training goes on.")
    parser.add_argument("folder", type=str, help="a run folder, or a folder of them")
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one")
    return parser


def execute(arguments: Any) -> int:
    """Run the command; returns the exit status."""
    from cl_plugins.report.server import serve

    serve(Path(arguments.folder), arguments.port)
    return 0
