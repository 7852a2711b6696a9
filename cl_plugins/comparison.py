"""Methods against each other: paired by run, tested, ranked, and with everything that makes a comparison doubtful said.

A run is the unit: two methods are paired by the runs that share seed, order seed and class order. Every difference has
a t interval and the exact two-sided sign-flip test; Holm's correction is over all tests of the comparison. Ranks join
scenarios without averaging scores of different scales (Colombo et al. 2022, arXiv:2202.03799).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from cl_plugins._text import did_you_mean
from cl_plugins.label_scores import of_label_accuracy
from cl_plugins.stats import (
    Ranking,
    SeedSummary,
    aggregate_rankings,
    holm,
    sign_flip_test,
    summarize_seeds,
)

MEASURES = {
    "average_accuracy": ("average accuracy (last row)", True),
    "average_accuracy_task_known": ("average accuracy, task known (last row)", True),
    "average_incremental_accuracy": ("average incremental accuracy (mean over rows)", True),
    "learning_accuracy": ("learning accuracy (plasticity)", True),
    "forgetting": ("forgetting (peak since learned)", False),
    "backward_transfer": ("backward transfer (final - learned)", True),
    "transfer": ("transfer (before learning, column first)", True),
    "average": ("average (all cells)", True),
    "last": ("last (all columns)", True),
    "map": ("mAP of seen classes (last row)", True),
    "average_map": ("mAP of seen classes, mean over rows", True),
    "cf1": ("CF1 (last row)", True),
    "of1": ("OF1 (last row)", True),
}
"""Keys of a result that can be compared: the name with its variant, and whether higher is better."""

_OF_LABELS = ("map", "average_map", "cf1", "of1")

_EXACT_PAIRS = 20
_EXACT_SYSTEMS = 8

Replicate = tuple[Any, Any, tuple[int, ...]]


def is_multi_label(result: Mapping[str, Any]) -> bool:
    """Whether a ``result.json`` is of a multi-label stream: it has mAP, and its accuracies count labels."""
    return "multilabel" in result or "map" in result


def measure_name(measure: str, multi_label: bool) -> str:
    """Name of a key of :data:`MEASURES` with its variant, saying so where the accuracies count labels.

    Example:
        >>> measure_name("average_accuracy", True), measure_name("map", True)
        ('average label accuracy (last row)', 'mAP of seen classes (last row)')
    """
    name = MEASURES[measure][0]
    return of_label_accuracy(name) if multi_label and measure not in _OF_LABELS else name


@dataclass(frozen=True)
class MethodEntry:
    """One method on one scenario.

    Attributes:
        method: its name.
        reference: whether it trains on all tasks at once; such a reference is shown but neither ranked nor tested.
        summary: mean and 95 % t interval; None when the measure is undefined in every run.
        values: the measure by replicate ``(seed, order_seed, class_order)``, undefined runs left out.
        runs: number of runs, those without a value included.
        difference: this method minus the baseline over the common replicates; None for the baseline and without any.
        p_value: of the sign-flip test; None where it was not made.
        adjusted_p: the same after Holm's correction.
    """

    method: str
    reference: bool
    summary: SeedSummary | None
    values: Mapping[Replicate, float]
    runs: int
    difference: SeedSummary | None = None
    p_value: float | None = None
    adjusted_p: float | None = None


@dataclass(frozen=True)
class ScenarioComparison:
    """All methods on one scenario, the best mean first, joint references at the end.

    Attributes:
        scenario: its name.
        baseline: the method that the others are compared with; None when there is only one.
        entries: the methods.
        measure: key of what is compared here.
        multi_label: whether the stream has several labels a sample, so that accuracies count labels.
    """

    scenario: str
    baseline: str | None
    entries: tuple[MethodEntry, ...]
    measure: str = "average_accuracy"
    multi_label: bool = False

    @property
    def measure_name(self) -> str:
        """Name of the measure with its variant."""
        return measure_name(self.measure, self.multi_label)


@dataclass(frozen=True)
class MethodComparison:
    """Methods over scenarios and seeds.

    Attributes:
        level: see :func:`cl_plugins.stats.aggregate_rankings`.
        scenarios: one comparison each.
        ranked: the methods in the rankings; those with common replicates on all scenarios.
        cells: number of (scenario, replicate) cells in which all of them have a value.
        borda: sums of ranks in the order of ``ranked``; None with fewer than two methods or no common cell.
        kemeny: all optimal orders; None as above and above 8 methods.
        notes: what a reader must know before believing the table.
    """

    level: Literal[1, 2]
    scenarios: tuple[ScenarioComparison, ...]
    ranked: tuple[str, ...]
    cells: int
    borda: Ranking | None
    kemeny: Ranking | None
    notes: tuple[str, ...] = field(default_factory=tuple)

    @property
    def measures(self) -> tuple[str, ...]:
        """Keys of what is compared, each once; more than one where scenarios of several kinds stand together."""
        return tuple(dict.fromkeys(s.measure for s in self.scenarios))

    @property
    def measure_names(self) -> tuple[str, ...]:
        """Their names with the variants, each once."""
        return tuple(dict.fromkeys(s.measure_name for s in self.scenarios))

    @property
    def higher_is_better(self) -> bool:
        """Which way is better; the same for all of :attr:`measures`."""
        return MEASURES[self.measures[0]][1]

    def mean_rank(self, method: str) -> float | None:
        """Mean rank from 1 for the best, over the cells (level 1) or the scenarios (level 2); None if not ranked."""
        if self.borda is None or method not in self.ranked:
            return None
        blocks = self.cells if self.level == 1 else len(self.scenarios)
        return 1 + self.borda.rank_sums[self.ranked.index(method)] / blocks


def _seed(value: Any) -> Any:
    """A seed as it pairs runs; anything odd that a damaged file holds is told apart by how it is written."""
    plain = value is None or isinstance(value, (int, str)) or (isinstance(value, float) and math.isfinite(value))
    return value if plain else repr(value)


def _replicate(result: Mapping[str, Any]) -> Replicate:
    order = result.get("class_order")
    classes = tuple(_seed(c) for c in order) if isinstance(order, list) else ()
    return _seed(result.get("seed")), _seed(result.get("order_seed")), classes


def _value(result: Mapping[str, Any], measure: str) -> float | None:
    value = result.get(measure)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _entries(
    results: Sequence[Mapping[str, Any]], measure: str, notes: list[str], where: str
) -> dict[str, MethodEntry]:
    entries: dict[str, MethodEntry] = {}
    for method in sorted({str(r.get("method", "?")) for r in results}):
        own = [r for r in results if str(r.get("method", "?")) == method]
        defined = [(_replicate(r), v) for r in own if (v := _value(r, measure)) is not None]
        repeated = len(defined) - len({key for key, _ in defined})
        if repeated:
            notes.append(
                f"{where}: {method} has {repeated} more run(s) with a seed and class order it already has; none of them"
                " can be paired, so it is neither tested nor ranked. Give each setting a folder of its own."
            )
        recipe = own[0].get("recipe")
        entries[method] = MethodEntry(
            method,
            isinstance(recipe, Mapping) and recipe.get("joint") is True,
            summarize_seeds([v for _, v in defined]) if defined else None,
            {} if repeated else dict(defined),
            len(own),
        )
        if len(defined) < len(own):
            notes.append(f"{where}: the measure is undefined in {len(own) - len(defined)} of {len(own)} {method} runs.")
    return entries


def _seeds(values: Mapping[Replicate, float]) -> str:
    seeds = sorted({str(seed) if order in (None, seed) else f"{seed}/order {order}" for seed, order, _ in values})
    return ", ".join(seeds[:8]) + (f" and {len(seeds) - 8} more" if len(seeds) > 8 else "")


def _mismatches(entries: Mapping[str, MethodEntry], where: str) -> list[str]:
    """What differs between the runs of the methods."""
    notes, by_replicates = [], dict[frozenset[Replicate], list[str]]()
    for name, entry in entries.items():
        if entry.values:
            by_replicates.setdefault(frozenset(entry.values), []).append(name)
    if len(by_replicates) > 1:
        told = "; ".join(f"{', '.join(names)}: {_seeds(entries[names[0]].values)}" for names in by_replicates.values())
        notes.append(f"{where}: the methods ran with different seeds ({told}). Tests use what both methods share.")
    orders: dict[tuple[Any, Any], set[tuple[int, ...]]] = {}
    for seed, order_seed, order in (key for entry in entries.values() for key in entry.values):
        orders.setdefault((seed, order_seed), set()).add(order)
    if any(len(found) > 1 for found in orders.values()):
        notes.append(f"{where}: runs with the same seeds saw different class orders, so these are not paired.")
    constant = [n for n, e in entries.items() if e.summary and e.summary.sd is not None and e.summary.sd < 1e-9]
    if constant:
        notes.append(
            f"{where}: every run gives the same value for {', '.join(constant)}: its seeds and orders change nothing"
            " here, so they are no replicates, and neither the interval nor a test that rests on them says anything."
        )
    few = [f"{n} ({e.runs})" for n, e in entries.items() if e.runs < 3]
    if few:
        notes.append(f"{where}: fewer than 3 runs, so no interval: {', '.join(few)}.")
    return notes


def _best(entries: Mapping[str, MethodEntry], higher: bool) -> str | None:
    sign = -1 if higher else 1
    known = [
        (sign * e.summary.mean, e.method)
        for e in entries.values()
        if e.summary is not None and e.values and not e.reference
    ]
    return min(known)[1] if len(known) >= 2 else None


def _tested(entry: MethodEntry, base: MethodEntry) -> MethodEntry:
    common = [key for key in entry.values if key in base.values]
    if entry.method == base.method or entry.reference or not common:
        return entry
    mine, theirs = [entry.values[k] for k in common], [base.values[k] for k in common]
    difference = summarize_seeds([a - b for a, b in zip(mine, theirs, strict=True)])
    p = sign_flip_test(mine, theirs) if 2 <= len(common) <= _EXACT_PAIRS else None
    return MethodEntry(entry.method, False, entry.summary, entry.values, entry.runs, difference, p)


def _rankings(
    tables: Sequence[Mapping[str, MethodEntry]], level: Literal[1, 2], higher: bool, notes: list[str]
) -> tuple[tuple[str, ...], int, Ranking | None, Ranking | None]:
    """Methods ranked, number of cells, Borda and Kemeny."""
    everyone = sorted({m for table in tables for m, e in table.items() if not e.reference})
    ranked = [m for m in everyone if all(m in table and table[m].values for table in tables)]
    left = [m for m in everyone if m not in ranked]
    if left:
        notes.append(f"Not ranked, since a scenario or its values are missing: {', '.join(left)}.")
    if len(ranked) < 2:
        return tuple(ranked), 0, None, None
    blocks = []
    for table in tables:
        common = sorted(set.intersection(*(set(table[m].values) for m in ranked)), key=repr)
        if not common:
            notes.append("No ranks: on one scenario no seed is common to all methods.")
            return tuple(ranked), 0, None, None
        blocks.append(np.array([[table[m].values[key] for key in common] for m in ranked]))
    cells = sum(block.shape[1] for block in blocks)
    scores = np.concatenate(blocks, axis=1)
    if level == 2:  # rank inside each scenario first; lower sums are better there, so the sign turns
        inside = [aggregate_rankings(block, higher_is_better=higher).rank_sums for block in blocks]
        scores = np.stack([-np.array(sums) for sums in inside], axis=1)
        higher = True
    borda = aggregate_rankings(scores, higher_is_better=higher)
    kemeny = aggregate_rankings(scores, "kemeny", higher_is_better=higher) if len(ranked) <= _EXACT_SYSTEMS else None
    if kemeny is None:
        notes.append(f"Kemeny's order is exact up to {_EXACT_SYSTEMS} methods and left out for {len(ranked)}.")
    return tuple(ranked), cells, borda, kemeny


def _measured(results: Sequence[Mapping[str, Any]], measure: str | None) -> tuple[str, bool]:
    """What is compared on a scenario, and whether it has several labels a sample."""
    multi_label = any(is_multi_label(r) for r in results)
    own = "map" if multi_label else "average_accuracy_task_known" if _task_known(results) else "average_accuracy"
    return measure or own, multi_label


def _task_known(results: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the results are of a stream that is evaluated with the task of each sample known."""
    streams = [r.get("stream") for r in results]
    return bool(streams) and all(isinstance(s, Mapping) and s.get("task_known") is True for s in streams)


def compare_methods(
    results: Sequence[Mapping[str, Any]],
    measure: str | None = None,
    *,
    baseline: str | None = None,
    level: Literal[1, 2] = 1,
) -> MethodComparison:
    """Compare methods over the runs they share.

    Args:
        results: contents of ``result.json`` files, see :func:`cl_plugins.compare.collect_results`.
        measure: a key of :data:`MEASURES`; None takes mAP on multi-label streams, the accuracy with the
            task known on streams that are evaluated so, average accuracy on others.
        baseline: compare with this method; the best mean of each scenario when None, which favors it a little.
        level: 1 ranks in every (scenario, run) cell; 2 ranks inside a scenario first, so that all count the same.

    Raises:
        ValueError: for an unknown measure, level or baseline, or without results.

    Example:
        >>> runs = [{"method": m, "scenario": "s", "seed": s, "average_accuracy": a + s / 100}
        ...         for m, a in (("new", 0.8), ("old", 0.7)) for s in range(6)]
        >>> (scenario,) = compare_methods(runs).scenarios
        >>> scenario.baseline, scenario.entries[1].adjusted_p
        ('new', 0.03125)
    """
    if measure is not None and measure not in MEASURES:
        raise ValueError(
            f"`measure` must be one of {', '.join(MEASURES)}, got {measure!r}{did_you_mean(str(measure), MEASURES)}"
        )
    if level not in (1, 2):
        raise ValueError(f"`level` must be 1 or 2, got {level!r}")
    methods = {str(r.get("method", "?")) for r in results}
    if not results or (baseline is not None and baseline not in methods):
        raise ValueError(f"`baseline` must be a method among the results, {sorted(methods)!r}, got {baseline!r}")
    higher = MEASURES[measure or "average_accuracy"][1]
    notes: list[str] = []
    names = sorted({str(r.get("scenario", "?")) for r in results})
    own = [[r for r in results if str(r.get("scenario", "?")) == name] for name in names]
    kinds = [_measured(of_scenario, measure) for of_scenario in own]
    tables = [_entries(o, kind, notes, name) for o, (kind, _), name in zip(own, kinds, names, strict=True)]
    several = list(dict.fromkeys(measure_name(*kind) for kind in kinds))
    if len(several) > 1:
        told = "; ".join(
            f"{name}: {', '.join(n for n, kind in zip(names, kinds, strict=True) if measure_name(*kind) == name)}"
            for name in several
        )
        notes.append(f"The scenarios are of several kinds and are compared by different measures ({told}).")
    bases: list[str | None] = []
    for index, (name, table) in enumerate(zip(names, tables, strict=True)):
        notes += _mismatches(table, name)
        base = baseline if baseline is not None else _best(table, higher)
        if base is not None and (base not in table or not table[base].values):
            notes.append(f"{name}: the baseline {base} has no value there, so nothing is tested.")
            base = None
        bases.append(base)
        if base is not None:
            tables[index] = {m: _tested(entry, table[base]) for m, entry in table.items()}
    tested = [(i, m, e.p_value) for i, table in enumerate(tables) for m, e in table.items() if e.p_value is not None]
    adjusted = holm([p for _, _, p in tested])
    for (i, m, _), p in zip(tested, adjusted, strict=True):
        e = tables[i][m]
        tables[i][m] = MethodEntry(m, e.reference, e.summary, e.values, e.runs, e.difference, e.p_value, p)
    pairs = [e.difference.n for t in tables for e in t.values() if e.difference is not None]
    if pairs and min(pairs) < 6:
        least = 2.0 ** (1 - min(pairs))
        notes.append(
            f"With {min(pairs)} pair{'s' * (min(pairs) > 1)} the sign-flip test cannot go below p = {least:.4g};"
            " 6 are the first that can pass 0.05."
        )
    if baseline is None and any(bases):
        notes.append(
            "The baseline of a scenario is its best method, chosen by the same runs; name one for a planned comparison."
        )
    ranked, cells, borda, kemeny = _rankings(tables, level, higher, notes)
    sign = -1 if higher else 1

    def place(entry: MethodEntry) -> tuple[bool, float, str]:
        return entry.reference, math.inf if entry.summary is None else sign * entry.summary.mean, entry.method

    scenarios = tuple(
        ScenarioComparison(name, base, tuple(sorted(table.values(), key=place)), *kind)
        for name, base, table, kind in zip(names, bases, tables, kinds, strict=True)
    )
    return MethodComparison(level, scenarios, ranked, cells, borda, kemeny, tuple(notes))
