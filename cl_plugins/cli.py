"""``cl-bench``: benchmarks, reports and comparisons from the shell, with flags or a configuration file."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from cl_plugins._text import did_you_mean
from cl_plugins.recipes import load_recipe, recipe_names

_FAILED = 1
_MISUSED = 2
_INTERRUPTED = 130


def _pair(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ValueError(f"`--set` must be KEY=VALUE, got {text!r}")
    parsed = yaml.safe_load(value)
    if isinstance(parsed, str):
        try:
            parsed = float(parsed)  # YAML reads 1e-3 as text
        except ValueError:
            return key, parsed
    return key, parsed


def _run(arguments: Any) -> int:
    from cl_plugins.benchmark import run_benchmark, summary_table

    options = dict(_pair(text) for text in arguments.set or [])
    data = dict(_pair(text) for text in arguments.data or [])
    folder = Path(arguments.out or Path("runs") / f"{arguments.method}_{arguments.scenario}_seed{arguments.seed}")
    result = run_benchmark(
        arguments.method,
        arguments.scenario,
        seed=arguments.seed,
        order_seed=arguments.order_seed,
        epochs=arguments.epochs,
        device=arguments.device,
        out=folder,
        options=options,
        data=data,
        progress=not arguments.quiet,
    )
    print(summary_table(result))
    print(f"\nresult  {folder / 'result.json'}\nreport  {folder / 'report.html'}")
    return 0


def _list(arguments: Any) -> int:
    scenarios = importlib.import_module("cl_plugins.scenarios")
    print("methods")
    for name in recipe_names():
        print(f"  {name:<26}{load_recipe(name).description}")
    print("\nscenarios")
    for name in scenarios.scenario_names():
        info = scenarios.scenario_info(name)
        print(f"  {name:<26}{info.description}; {info.sizes}{'; needs ' + info.needs if info.needs else ''}")
    return 0


def _report(arguments: Any) -> int:
    from cl_plugins.report import write_report
    from cl_plugins.runs import read_runs

    runs = read_runs(Path(arguments.folder))
    if not runs:
        raise ValueError(f"`folder` must hold runs, found none in {arguments.folder!r}")
    print(write_report(runs, Path(arguments.out)))
    return 0


def _serve(arguments: Any) -> int:
    from cl_plugins.report.server import serve

    serve(Path(arguments.folder), arguments.port)
    return 0


def _compare(arguments: Any) -> int:
    from cl_plugins.compare import collect_results, methods_table

    print(methods_table(collect_results([Path(f) for f in arguments.folders]), arguments.format))
    return 0


def _check(arguments: Any) -> int:
    from cl_plugins.check import check_report, read_matrix

    values: dict[str, float] = {}
    for text in arguments.value or []:
        name, value = _pair(text)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"`--value {name}` must be a number, got {value!r}")
        values[name] = float(value)
    if not values:
        raise ValueError("`--value` must give at least one published number, such as forgetting=0.12")
    print(check_report(read_matrix(arguments.file), values, arguments.tolerance))
    return 0


def build_parser() -> tuple[ArgumentParser, dict[str, Callable[[Any], int]]]:
    """The command line and what its sub-commands do."""
    parser = ArgumentParser(prog="cl-bench", description="Continual-learning benchmarks.")
    commands = parser.add_subcommands(dest="command")

    run = ArgumentParser(description="Train a method on a scenario; writes result.json and report.html.")
    run.add_argument("--config", action="config", help="YAML file with any of these options")
    run.add_argument("--method", required=True, help="a method of `cl-bench list`")
    run.add_argument("--scenario", required=True, help="a scenario of `cl-bench list`")
    run.add_argument("--seed", type=int, default=0, help="of initialization and data order")
    run.add_argument("--order-seed", type=int | None, default=None, help="shuffles the classes over the tasks")
    run.add_argument("--epochs", type=int | None, default=None, help="per task, in place of the recipe's")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    run.add_argument("--out", type=str | None, default=None, help="run folder; runs/<method>_<scenario>_seed<seed>")
    run.add_argument("--set", action="append", metavar="KEY=VALUE", help="a setting of the recipe or of its callbacks")
    run.add_argument(
        "--data", action="append", metavar="KEY=VALUE", help="an argument of the scenario, such as root=DIR"
    )
    run.add_argument("--quiet", action="store_true", help="no progress bar")
    commands.add_subcommand("run", run, help="train a method on a scenario")

    commands.add_subcommand("list", ArgumentParser(description="Methods and scenarios."), help="methods and scenarios")

    report = ArgumentParser(description="One HTML page about all runs in a folder.")
    report.add_argument("folder", type=str, help="a run folder, or a folder of them")
    report.add_argument("--out", "-o", default="report.html", help="the HTML file")
    commands.add_subcommand("report", report, help="HTML page about runs")

    live = ArgumentParser(description="The report on this machine at 127.0.0.1, up to date while training goes on.")
    live.add_argument("folder", type=str, help="a run folder, or a folder of them")
    live.add_argument("--port", type=int, default=8765, help="0 takes a free one")
    commands.add_subcommand("serve", live, help="live HTML page about runs")

    compare = ArgumentParser(description="Mean and 95 % interval over seeds for each method and scenario.")
    compare.add_argument("folders", nargs="+", type=str, help="folders with result.json files, at any depth")
    compare.add_argument("--format", default="text", choices=["text", "markdown", "csv", "latex", "json"])
    commands.add_subcommand("compare", compare, help="table of methods over seeds")

    check = ArgumentParser(description="Which definition a published number follows, given its accuracy matrix.")
    check.add_argument("file", type=str, help="CSV file (rows: evaluations, columns: tasks) or result.json")
    check.add_argument("--value", action="append", metavar="NAME=NUMBER", help="a published number; may be repeated")
    check.add_argument("--tolerance", type=float, default=5e-4, help="half of the last digit printed")
    commands.add_subcommand("check", check, help="which definition a published number follows")
    return parser, {
        "run": _run,
        "list": _list,
        "report": _report,
        "serve": _serve,
        "compare": _compare,
        "check": _check,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cl-bench``; returns the exit status."""
    parser, actions = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-") and words[0] not in actions:
        print(f"cl-bench: unknown command {words[0]!r}{did_you_mean(words[0], actions)}", file=sys.stderr)
        return _MISUSED
    arguments = parser.parse_args(words)
    try:
        return actions[arguments.command](arguments[arguments.command])
    except KeyboardInterrupt:
        print("cl-bench: stopped; finished tasks are recorded in the run folder", file=sys.stderr)
        return _INTERRUPTED
    except (
        ValueError,
        TypeError,
        RuntimeError,
        OSError,
        FloatingPointError,
        json.JSONDecodeError,
        yaml.YAMLError,
    ) as error:
        if os.environ.get("CL_BENCH_TRACEBACK"):
            raise
        print(f"cl-bench: {error}", file=sys.stderr)
        return _FAILED


if __name__ == "__main__":
    sys.exit(main())
