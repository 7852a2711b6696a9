"""``cl-bench check``: which definition a published number follows."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from cl_plugins.commands._pairs import pairs

HELP = "which definition a published number follows"


def parser() -> ArgumentParser:
    """Options of the command."""
    parser = ArgumentParser(description="Which definition a published number follows, given its accuracy matrix.")
    parser.add_argument("file", type=str, help="CSV file (rows: evaluations, columns: tasks) or result.json")
    parser.add_argument("--value", action="append", metavar="NAME=NUMBER", help="a published number; may be repeated")
    parser.add_argument("--tolerance", type=float, default=5e-4, help="half of the last digit printed")
    return parser


def execute(arguments: Any) -> int:
    """Run the command; returns the exit status."""
    from cl_plugins.check import check_report, describe_table, read_table

    values: dict[str, float] = {}
    for name, value in pairs(arguments.value, "--value").items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"`--value {name}` must be a number, got {value!r}")
        values[name] = float(value)
    if not values:
        raise ValueError("`--value` must give at least one published number, such as forgetting=0.12")
    matrix, percent = read_table(arguments.file)
    print(describe_table(matrix, percent))
    print(check_report(matrix, values, arguments.tolerance))
    return 0
