"""``cl-bench sweep``: methods x scenarios x seeds, resumable, in processes here or on a Ray cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from cl_plugins.commands._measuring import add_measuring
from cl_plugins.commands._pairs import pairs

HELP = "many runs: methods x scenarios x seeds"


def parser() -> ArgumentParser:
    """Options of the command."""
    parser = ArgumentParser(
        description="Runs what has no result yet; start it again after any stop. Failures are listed at the end."
    )
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--methods", nargs="+", type=str, required=True, help="methods of `cl-bench list`")
    parser.add_argument("--scenarios", nargs="+", type=str, required=True, help="scenarios of `cl-bench list`")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, counted from 0")
    parser.add_argument("--orders", type=str, default="seed", help="class orders: own, seed, or a number to cross with")
    parser.add_argument("--epochs", type=int | None, default=None, help="per task, in place of the recipes'")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--out", type=str, default="runs/sweep", help="folder of the sweep")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--engine", type=str, default="local", help="local, or ray")
    parser.add_argument("--address", type=str | None, default=None, help="of the Ray cluster; starts one when left out")
    add_measuring(parser)
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="of all methods, or METHOD.KEY=VALUE")
    parser.add_argument("--data", action="append", metavar="KEY=VALUE", help="an argument of all the scenarios")
    return parser


def execute(arguments: Any) -> int:
    """Run the command; returns the exit status."""
    from cl_plugins.compare import collect_results, methods_table
    from cl_plugins.sweep import plan, run_sweep

    orders: Any = arguments.orders
    if orders not in ("own", "seed"):
        if not orders.isdigit() or int(orders) < 1:
            raise ValueError(f"`--orders` must be own, seed or a number of orders, got {orders!r}")
        orders = range(int(orders))
    jobs = plan(
        arguments.methods,
        arguments.scenarios,
        arguments.seeds,
        orders,
        epochs=arguments.epochs,
        device=arguments.device,
        options=pairs(arguments.set, "--set"),
        data=pairs(arguments.data, "--data"),
        eval_every=arguments.eval_every,
        eval_tasks=arguments.eval_tasks,
        eval_samples=arguments.eval_samples,
        drift=arguments.drift,
    )
    out = Path(arguments.out)
    try:
        result = run_sweep(
            jobs,
            out,
            n_jobs=arguments.jobs,
            threads=arguments.threads,
            engine=arguments.engine,
            address=arguments.address,
            tell=lambda line: print(line, flush=True),
        )
    except KeyboardInterrupt:
        print("cl-bench: stopped; the same command goes on where it was", file=sys.stderr)
        raise
    if result.finished:
        print(methods_table(collect_results([out / job.name for job in result.finished]), "text"))
    for failure in result.failed:
        print(f"failed: {failure.job.name} (status {failure.status}): {failure.message}", file=sys.stderr)
        print(f"        {failure.log}", file=sys.stderr)
    return 1 if result.failed else 0
