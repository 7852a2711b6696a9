"""``cl-bench compare``: methods over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

HELP = "table of methods over seeds"


def parser() -> ArgumentParser:
    """Options of the command."""
    parser = ArgumentParser(description="Mean and 95 % interval over seeds for each method and scenario.")
    parser.add_argument("folders", nargs="+", type=str, help="folders with result.json files, at any depth")
    parser.add_argument("--format", default="text", choices=["text", "markdown", "csv", "latex", "json"])
    return parser


def execute(arguments: Any) -> int:
    """Run the command; returns the exit status."""
    from cl_plugins.compare import collect_results, methods_table

    print(methods_table(collect_results([Path(f) for f in arguments.folders]), arguments.format))
    return 0
