"""``cl-bench list``: methods and scenarios."""

from __future__ import annotations

import importlib
from typing import Any

from jsonargparse import ArgumentParser

from cl_plugins.recipes import load_recipe, recipe_names

HELP = "methods and scenarios"


def parser() -> ArgumentParser:
    """Options of the command."""
    return ArgumentParser(description="Methods and scenarios.")


def execute(arguments: Any) -> int:
    """Run the command; returns the exit status."""
    scenarios = importlib.import_module("cl_plugins.scenarios")
    print("methods")
    for name in recipe_names():
        print(f"  {name:<26}{load_recipe(name).description}")
    print("\nscenarios")
    for name in scenarios.scenario_names():
        info = scenarios.scenario_info(name)
        print(f"  {name:<26}{info.description}; {info.sizes}{'; needs ' + info.needs if info.needs else ''}")
    return 0
