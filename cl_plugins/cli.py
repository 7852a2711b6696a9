"""``cl-bench``: benchmarks, reports and comparisons from the shell, with flags or a configuration file."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from cl_plugins._text import did_you_mean
from cl_plugins.commands import NAMES

_FAILED = 1
_MISUSED = 2
_INTERRUPTED = 130


def build_parser() -> tuple[ArgumentParser, dict[str, Callable[[Any], int]]]:
    """The command line and what its sub-commands do."""
    parser = ArgumentParser(prog="cl-bench", description="Continual-learning benchmarks.")
    commands = parser.add_subcommands(dest="command")
    actions: dict[str, Callable[[Any], int]] = {}
    for name in NAMES:
        module: Any = importlib.import_module(f"cl_plugins.commands.{name}")
        commands.add_subcommand(name, module.parser(), help=module.HELP)
        actions[name] = module.execute
    return parser, actions


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``cl-bench``; returns the exit status."""
    parser, actions = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-") and words[0] not in actions:
        print(f"cl-bench: unknown command {words[0]!r}{did_you_mean(words[0], actions)}", file=sys.stderr)
        return _MISUSED
    try:
        arguments = parser.parse_args(words)
    except UnicodeError as error:  # a configuration file, or a word, that is no text
        print(f"cl-bench: options and configuration files must be UTF-8 text: {error}", file=sys.stderr)
        return _MISUSED
    try:
        return actions[arguments.command](arguments[arguments.command])
    except KeyboardInterrupt:
        print(
            "cl-bench: stopped; finished tasks are recorded in the run folder; the same command with --resume goes on",
            file=sys.stderr,
        )
        return _INTERRUPTED
    except SystemExit as stop:
        if not isinstance(getattr(stop, "text", None), str):
            raise
        print(f"cl-bench: {stop}; the same command with --resume goes on", file=sys.stderr)
        return int(stop.code or 0)
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
