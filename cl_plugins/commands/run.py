"""``cl-bench run``: train a method on a scenario."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from cl_plugins.commands._measuring import add_measuring
from cl_plugins.commands._pairs import pairs, with_root

HELP = "train a method on a scenario"


def parser() -> ArgumentParser:
    """Options of the command."""
    parser = ArgumentParser(description="Train a method on a scenario; writes result.json and report.html.")
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--method", type=str, required=True, help="a method of `cl-bench list`")
    parser.add_argument("--scenario", type=str, required=True, help="a scenario of `cl-bench list`")
    parser.add_argument("--seed", type=int, default=0, help="of initialization and data order")
    parser.add_argument("--order-seed", type=int | None, default=None, help="shuffles the classes over the tasks")
    parser.add_argument("--epochs", type=int | None, default=None, help="per task, in place of the recipe's")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--out", type=str | None, default=None, help="run folder; runs/<method>_<scenario>_seed<seed>")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="a setting of the recipe or its callbacks")
    parser.add_argument(
        "--data",
        action="append",
        metavar="KEY=VALUE",
        help="an argument of the scenario; root=DIR, else CL_DATA",
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder where it was stopped")
    parser.add_argument("--save-every-steps", type=int | None, default=None, help="save inside tasks, too")
    parser.add_argument("--save-every-minutes", type=float | None, default=None, help="save inside tasks, too")
    add_measuring(parser)
    parser.add_argument(
        "--eval-old", type=int | None, default=None, help="at task ends draw so many old tasks, instead of all"
    )
    parser.add_argument("--keep-checkpoints", action="store_true", help="leave both when the run is finished, not one")
    parser.add_argument("--adapters", action="store_true", help="also write checkpoints/adapters.safetensors")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def execute(arguments: Any) -> int:
    """Run the command; returns the exit status."""
    from cl_plugins.benchmark import run_benchmark
    from cl_plugins.summary import summary_table

    options, data = pairs(arguments.set, "--set"), pairs(arguments.data, "--data")
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
        data=with_root(arguments.scenario, data),
        drift=arguments.drift,
        progress=not arguments.quiet,
        resume=arguments.resume,
        save_every_steps=arguments.save_every_steps,
        save_every_minutes=arguments.save_every_minutes,
        eval_every=arguments.eval_every,
        eval_tasks=arguments.eval_tasks,
        eval_samples=arguments.eval_samples,
        eval_old=arguments.eval_old,
        keep_checkpoints=arguments.keep_checkpoints,
        adapters=arguments.adapters,
    )
    print(summary_table(result))
    print(f"\nresult  {folder / 'result.json'}\nreport  {folder / 'report.html'}")
    return 0
