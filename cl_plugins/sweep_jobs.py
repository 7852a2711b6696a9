"""The jobs of a sweep: what each one runs, and the list of all of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from cl_plugins._text import did_you_mean
from cl_plugins.benchmark import inside_callbacks
from cl_plugins.recipes import load_recipe, recipe_names, with_options


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        method: a recipe.
        scenario: a registered stream.
        seed: of initialization and data order.
        order_seed: shuffles the classes over the tasks; None for the scenario's own order.
        epochs: per task; None for the recipe's.
        device: "auto", "cpu", "cuda" or "mps".
        options: as ``--set``.
        data: as ``--data``.
        eval_every: also evaluate inside the tasks, after so many optimizer steps; None does not.
        eval_tasks: of the old tasks, draw so many each time; None takes all.
        eval_samples: of each task, at most so many samples each time; None takes all.
        drift: measure features, calibration and memory at task ends.

    Each of them is a part of what the job is: with another value it is another job, which needs another folder.
    """

    method: str
    scenario: str
    seed: int = 0
    order_seed: int | None = None
    epochs: int | None = None
    device: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    eval_every: int | None = None
    eval_tasks: int | None = None
    eval_samples: int | None = None
    drift: bool = False

    @property
    def name(self) -> str:
        """Name of the run's folder.

        Example:
            >>> Job("ovor", "split-digits", 1, 2).name
            'split-digits_ovor_seed1_order2'
        """
        order = "" if self.order_seed is None else f"_order{self.order_seed}"
        return f"{self.scenario}_{self.method}_seed{self.seed}{order}"

    def command(self, folder: Path) -> list[str]:
        """The command line that runs it and that a user can repeat."""
        words = [sys.executable, "-m", "cl_plugins.cli", "run", "--method", self.method, "--scenario", self.scenario]
        words += ["--seed", str(self.seed), "--device", self.device, "--out", str(folder), "--quiet", "--resume"]
        for key in ("order_seed", "epochs", "eval_every", "eval_tasks", "eval_samples"):
            value = getattr(self, key)
            words += [] if value is None else ["--" + key.replace("_", "-"), str(value)]
        words += ["--drift"] if self.drift else []
        for flag, pairs in (("--set", self.options), ("--data", self.data)):
            for key, value in pairs.items():
                words += [flag, f"{key}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}"]
        return words


def plan(
    methods: Sequence[str],
    scenarios: Sequence[str],
    seeds: int | Sequence[int] = 3,
    orders: Literal["own", "seed"] | Sequence[int] = "seed",
    **common: Any,
) -> list[Job]:
    """The jobs of a sweep, seed by seed, so that the first results are of all methods.

    Args:
        methods: recipes.
        scenarios: registered streams.
        seeds: their number, counted from 0, or the seeds.
        orders: class orders: "own" for the scenario's, "seed" for one drawn by each run's seed, or order seeds, which
            are crossed with the seeds.
        common: further fields of :class:`Job`, the same for all; an option ``mora.rank`` goes to the method ``mora``
            alone, ``rank`` to every method.

    Raises:
        ValueError: for nothing to do, an unknown method or scenario, an option that a method does not take, one for a
            method that is not in the sweep, or settings of the evaluation inside tasks that a run refuses.

    Example:
        >>> [job.name for job in plan(["ovor"], ["split-digits"], seeds=2)]
        ['split-digits_ovor_seed0_order0', 'split-digits_ovor_seed1_order1']
        >>> [dict(job.options) for job in plan(["lora", "mora"], ["split-digits"], 1, options={"mora.rank": 8})]
        [{}, {'rank': 8}]
    """
    known = importlib.import_module("cl_plugins.scenarios").scenario_names()
    for scenario in scenarios:
        if scenario not in known:
            raise ValueError(
                f"`scenarios` must hold known scenarios, got {scenario!r}{did_you_mean(str(scenario), known)}"
            )
    options = _options_by_method(methods, common.pop("options", {}))
    for method in methods:
        with_options(load_recipe(method), options[method])  # refuses what is unknown
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not methods or not scenarios or not chosen:
        raise ValueError(
            f"`methods`, `scenarios` and `seeds` must hold one each at least, got {methods!r}, {scenarios!r}, {seeds!r}"
        )
    # a run refuses these, too, but then every job of the sweep fails
    inside_callbacks(common.get("eval_every"), common.get("eval_tasks"), common.get("eval_samples"))
    jobs = []
    for seed in chosen:
        drawn: list[int | None] = [None] if orders == "own" else [seed] if orders == "seed" else list(orders)
        jobs += [
            Job(m, s, seed, order, options=options[m], **common) for order in drawn for s in scenarios for m in methods
        ]
    names = [job.name for job in jobs]
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise ValueError(f"`methods`, `scenarios` and `seeds` must not repeat themselves, got {twice[0]!r} twice")
    return jobs


def _options_by_method(methods: Sequence[str], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    of: dict[str, dict[str, Any]] = {method: {} for method in methods}
    own: list[tuple[str, str, Any]] = []
    for key, value in options.items():
        owner, _, name = key.partition(".")
        if name and owner in recipe_names():
            if owner not in of:
                raise ValueError(f"`--set {key}` must be for a method of the sweep, got {list(methods)!r}")
            own.append((owner, name, value))
            continue
        for method in methods:
            of[method][key] = value
    for owner, name, value in own:  # what is said of one method wins over what is said of all
        of[owner][name] = value
    return of
