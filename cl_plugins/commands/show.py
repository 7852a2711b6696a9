"""``cl-bench show``: samples of each task and how many samples each class has."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from cl_plugins.commands._pairs import pairs, with_root

HELP = "samples of each task, and the classes' sizes"


def parser() -> ArgumentParser:
    """Options of the command."""
    parser = ArgumentParser(description="Draws samples of each task and the number of samples of each class.")
    parser.add_argument("scenario", type=str, help="a scenario of `cl-bench list`")
    parser.add_argument("--out", "-o", type=str | None, default=None, help="a PNG file; the terminal when left out")
    parser.add_argument("--tasks", type=str | None, default=None, help="such as 0,3,5-7; the first twelve")
    parser.add_argument("--columns", type=int | None, default=None, help="samples of a task")
    parser.add_argument("--seed", type=int, default=0, help="draws the samples")
    parser.add_argument("--data", action="append", metavar="KEY=VALUE", help="an argument of the scenario")
    return parser


def _numbers(text: str) -> list[int]:
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"`--tasks` must be numbers and ranges such as 0,3,5-7, got {text!r}")
        if dash and int(last) < int(first):
            raise ValueError(f"`--tasks` must have ranges from low to high, got {part.strip()!r}")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def execute(arguments: Any) -> int:
    """Run the command; returns the exit status."""
    from cl_plugins.sheet import draw_sheet, text_sheet

    for name, value, least in (("--columns", arguments.columns, 1), ("--seed", arguments.seed, 0)):
        if value is not None and value < least:
            raise ValueError(f"`{name}` must be {least} or more, got {value!r}")

    scenarios = importlib.import_module("cl_plugins.scenarios")
    stream = scenarios.build_scenario(
        arguments.scenario, **with_root(arguments.scenario, pairs(arguments.data, "--data"))
    )
    tasks = None if arguments.tasks is None else _numbers(arguments.tasks)
    left_out = 0
    if tasks is None and len(stream.tasks) > 12:
        tasks, left_out = list(range(12)), len(stream.tasks) - 12
    if arguments.out is None:
        colors = sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        columns = shutil.get_terminal_size((100, 24)).columns
        print(text_sheet(stream, tasks, arguments.columns or 4, arguments.seed, colors=colors, width=columns))
    else:
        out = Path(arguments.out)
        if out.suffix.lower() != ".png":
            raise ValueError(f"`--out` must end in .png, got {arguments.out!r}")
        sheet = draw_sheet(stream, tasks, arguments.columns or (4 if stream.modality == "text" else 8), arguments.seed)
        out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(out)
        print(out)
    if left_out:
        print(f"{left_out} more tasks; choose with --tasks", file=sys.stderr)
    return 0
