"""``cl-bench list``: methods and scenarios, and whether their data is there."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from cl_plugins.recipes import load_recipe, recipe_names

HELP = "methods and scenarios"


def parser() -> ArgumentParser:
    """Options of the command."""
    parser = ArgumentParser(description="Methods and scenarios, their sizes, what they need and whether it is there.")
    parser.add_argument(
        "--root", type=str | None, default=None, help="folder of all data sets; CL_DATA of the environment"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


def execute(arguments: Any) -> int:
    """Run the command; returns the exit status."""
    scenarios = importlib.import_module("cl_plugins.scenarios")
    presence = importlib.import_module("cl_plugins.scenarios.presence")
    root = arguments.root or presence.data_folder()
    if arguments.root is not None and not Path(arguments.root).expanduser().is_dir():
        raise NotADirectoryError(f"`--root` must be a folder that exists, got {arguments.root!r}")
    infos = [scenarios.scenario_info(name) for name in scenarios.scenario_names()]
    there = {info.name: presence.availability(info, root) for info in infos}
    if arguments.json:
        told = {
            "methods": [{"name": n, "description": load_recipe(n).description} for n in recipe_names()],
            "scenarios": [
                {
                    "name": i.name,
                    "description": i.description,
                    "sizes": i.sizes,
                    "modality": i.modality,
                    "needs": i.needs,
                    "there": there[i.name],
                }
                for i in infos
            ],
        }
        print(json.dumps(told, indent=1))
        return 0
    print("methods")
    for name in recipe_names():
        print(f"  {name:<24}{load_recipe(name).description}")
    for title, wanted in (("scenarios that come along", False), ("scenarios that need data", True)):
        print(f"\n{title}")
        for info in infos:
            if bool(info.needs) is wanted:
                print(f"  {info.name:<24}{info.description}\n{'':26}{info.sizes}")
                if wanted:
                    print(f"{'':26}there: {there[info.name]}; needs {info.needs}")
    if root is None:
        print("\nSay with --root DIR or CL_DATA=DIR where data sets are, to see which of them are there.")
    return 0
