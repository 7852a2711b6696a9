"""``cl-bench compare``: methods over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

HELP = "table, tests and ranks of methods over seeds"


def parser() -> ArgumentParser:
    """Options of the command."""
    parser = ArgumentParser(
        description="Mean and 95 % interval over seeds for each method and scenario, paired tests and ranks."
    )
    parser.add_argument("folders", nargs="+", type=str, help="folders with result.json files, at any depth")
    parser.add_argument("--format", default="text", choices=["text", "markdown", "csv", "latex", "json", "html"])
    parser.add_argument("--out", "-o", type=str | None, default=None, help="write to this file")
    parser.add_argument(
        "--measure",
        type=str | None,
        default=None,
        help="what is tested and ranked; mAP on multi-label streams, average accuracy on others",
    )
    parser.add_argument(
        "--baseline", type=str | None, default=None, help="method to compare with; the best of each scenario"
    )
    parser.add_argument(
        "--level",
        type=int,
        default=1,
        help="1 ranks in every run, 2 in scenarios first, which then count alike",
    )
    return parser


def execute(arguments: Any) -> int:
    """Run the command; returns the exit status."""
    from cl_plugins.compare import collect_results, comparison_text
    from cl_plugins.comparison import compare_methods

    results = collect_results([Path(f) for f in arguments.folders])
    comparison = compare_methods(results, arguments.measure, baseline=arguments.baseline, level=arguments.level)
    if arguments.format == "html":
        from cl_plugins.report.comparison import render_comparison

        content, out = render_comparison(results, comparison), Path(arguments.out or "comparison.html")
    else:
        content = comparison_text(results, comparison, arguments.format)
        if arguments.out is None:
            print(content)
            return 0
        content, out = content + "\n", Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(content, encoding="utf-8", errors="replace")
    print(out)
    return 0
