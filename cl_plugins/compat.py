"""What other libraries report for the same accuracy matrix, and which definition a published value agrees with.

Each peer is given the square matrix it would have recorded: the boundary rows only, columns in the order of learning.
Values are fractions. Where a peer raises, the value is the name of its exception. The versions are those that were
measured: continuum 1.2.7 from the package index ("continuum") and from its repository ("continuum-head"), avalanche-lib
0.6.0, and the repositories of Mammoth, PILOT, Renate and CLArena of 2025.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

from cl_plugins import functional
from cl_plugins.functional._matrix import LearnedAt, NanPolicy, as_double, check_choice

Peer: TypeAlias = Literal["avalanche", "clarena", "continuum", "continuum-head", "mammoth", "pilot", "renate", "zscl"]
PeerValue: TypeAlias = float | str

_MTIL_TASKS = 11


@dataclass(frozen=True)
class _Square:
    """What a peer would have recorded: ``cells[i][j]`` after the i-th step on the j-th task learned."""

    cells: list[list[float]]
    initial: list[float] | None
    n_test: list[float] | None
    independent: list[float] | None
    joint: list[float] | None
    random: list[float] | None
    table: Tensor

    @property
    def tasks(self) -> int:
        return len(self.cells)

    @property
    def final(self) -> list[float]:
        return self.cells[-1]

    @property
    def learned(self) -> list[float]:
        return [self.cells[j][j] for j in range(self.tasks)]


def _mean(values: Sequence[float], empty: float = math.nan) -> float:
    return math.fsum(values) / len(values) if values else empty


def _nanmean(values: Sequence[float], empty: float = math.nan) -> float:
    return _mean([v for v in values if not math.isnan(v)], empty)


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / math.fsum(weights)


def _backward(s: _Square) -> list[float]:
    return [s.final[j] - s.learned[j] for j in range(s.tasks - 1)]


def _forward(s: _Square) -> list[float]:
    assert s.initial is not None
    return [s.cells[j - 1][j] - s.initial[j] for j in range(1, s.tasks)]


def _avalanche(s: _Square) -> dict[str, PeerValue]:
    lost = [-value for value in _backward(s)]
    values: dict[str, PeerValue] = {
        "functional.forgetting[last].mean": _mean(lost),
        "Forgetting.mean": _nanmean(lost, 0.0),
        "BWT.mean": 0.0 - _nanmean(lost, 0.0),
    }
    if s.initial is not None:
        values["ForwardTransfer.mean"] = _nanmean(_forward(s), 0.0)
    return values


def _mammoth(s: _Square) -> dict[str, PeerValue]:
    steps = range(s.tasks)
    padded = [[0.0 if j > i and math.isnan(s.cells[i][j]) else s.cells[i][j] for j in steps] for i in steps]
    # the row before learning is part of the peak, since it holds the accuracy on the next task
    columns = [[padded[i][j] for i in range(max(j - 1, 0), s.tasks)] for j in range(s.tasks - 1)]
    values: dict[str, PeerValue] = {
        "backward_transfer": _mean(_backward(s)),
        "forgetting": _mean([_peak(column) - column[-1] for column in columns]),
    }
    if s.initial is not None:
        values["forward_transfer"] = _mean(_forward(s))
    return values


def _pilot(s: _Square) -> dict[str, PeerValue]:
    lost = []
    for j in range(s.tasks - 1):
        column = [round(100 * s.cells[i][j], 2) if i >= j else 0.0 for i in range(s.tasks)]
        peak = math.nan if any(map(math.isnan, column)) else max(column)
        lost.append((peak - column[-1]) / 100)
    return {"forgetting": _mean(lost)}


def _renate(s: _Square) -> dict[str, PeerValue]:
    # the built-in max keeps a NaN that comes first and drops one that comes later
    lost = [max(s.cells[i][j] for i in range(s.tasks - 1)) - s.final[j] for j in range(s.tasks - 1)]
    values: dict[str, PeerValue] = {
        "average_accuracy": _mean(s.final),
        "forgetting": _mean(lost, 0.0),
        "backward_transfer": _mean(_backward(s), 0.0),
    }
    if s.n_test is not None:
        values["micro_average_accuracy"] = _weighted(s.final, s.n_test)
    if s.initial is not None:
        values["forward_transfer"] = _mean(_forward(s), 0.0)
    return values


def _raising(compute: Callable[[], float]) -> PeerValue:
    """The library asserts that what it reads was measured."""
    value = compute()
    return "ValueError" if math.isnan(value) else value


def _continuum_transfer(backward: float) -> dict[str, PeerValue]:
    return {
        "backward_transfer": _raising(lambda: backward),
        "positive_backward_transfer": _raising(lambda: backward if math.isnan(backward) else max(0.0, backward)),
        "remembering": _raising(lambda: backward if math.isnan(backward) else 1.0 - abs(min(0.0, backward))),
    }


def _continuum(s: _Square) -> dict[str, PeerValue]:
    """The released version: loops stop one step early and keep their divisor; forward transfer reads old tasks."""
    t, cells = s.tasks, s.cells
    pairs = t * (t - 1) / 2 or 1.0
    running = math.fsum(cells[i][j] - cells[j][j] for i in range(2, t) for j in range(i - 1)) / pairs
    lower = math.fsum(cells[i][j] for i in range(1, t) for j in range(i)) / pairs
    peaks = [_peak([cells[i][j] for i in range(j, t - 2)]) - s.final[j] for j in range(t - 2)]
    return {
        "accuracy_A": _raising(lambda: _mean([cells[i][j] for i in range(t) for j in range(i + 1)])),
        **_continuum_transfer(running),
        "forward_transfer": _raising(lambda: lower),
        "forgetting": _raising(lambda: math.fsum(peaks) / max(t - 1, 1)),
        "average_incremental_accuracy": _mean([_nanmean(row) for row in cells]),
    }


def _continuum_head(s: _Square) -> dict[str, PeerValue]:
    t, cells = s.tasks, s.cells
    running = _mean([cells[i][j] - cells[j][j] for i in range(1, t) for j in range(i)], 0.0)
    peaks = [_peak([cells[i][j] for i in range(j, t - 1)]) - s.final[j] for j in range(t - 1)]
    return {
        "accuracy_A": _raising(lambda: _mean([cells[i][j] for i in range(t) for j in range(i + 1)])),
        **_continuum_transfer(running),
        "forward_transfer": _raising(lambda: _mean([cells[j - 1][j] for j in range(1, t)], 0.0)),
        "forgetting": _raising(lambda: _mean(peaks, 0.0)),
    }


def _peak(values: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values)


def _clarena(s: _Square) -> dict[str, PeerValue]:
    written = s.tasks > 2  # with fewer tasks it writes an empty file, which cannot be read back
    values: dict[str, PeerValue] = {"BWT": _mean(_backward(s)) if written else "EmptyDataError"}
    if s.independent is not None:
        gains = [s.learned[j] - s.independent[j] for j in range(1, s.tasks)]
        values["FWT"] = _mean(gains) if written else "EmptyDataError"
    if s.joint is not None and s.random is not None:
        shares = [
            (now - floor) / (top - floor) if top != floor else math.nan
            for now, top, floor in zip(s.final, s.joint, s.random, strict=True)
        ]
        values["FR"] = _mean(shares) - 1.0
    return values


def _zscl(s: _Square) -> dict[str, PeerValue]:
    if s.tasks != _MTIL_TASKS:
        return {}
    scores = functional.mtil_scores(s.table)
    names = {"transfer": "transfer", "avg": "average", "last": "last"}
    return {key: round(float(scores[name]), 3) for key, name in names.items()}


_PEERS: dict[str, Callable[[_Square], dict[str, PeerValue]]] = {
    "avalanche": _avalanche,
    "clarena": _clarena,
    "continuum": _continuum,
    "continuum-head": _continuum_head,
    "mammoth": _mammoth,
    "pilot": _pilot,
    "renate": _renate,
    "zscl": _zscl,
}


def _order(matrix: Tensor, learned_at: LearnedAt) -> list[tuple[int, int]]:
    """Row of learning and column of the tasks that were learned, in the order of learning."""
    count, tasks = matrix.shape
    given = list(range(tasks)) if learned_at is None else [-1 if x is None else int(x) for x in learned_at]
    return sorted((row, j) for j, row in enumerate(given) if 0 <= row < count)


def _square(matrix: Tensor, learned_at: LearnedAt, rows: Mapping[str, Tensor | None]) -> _Square:
    cells = as_double(matrix).cpu()
    reached = _order(cells, learned_at)
    if not reached:
        raise ValueError(f"`learned_at` must name a row of the matrix ({len(cells)} rows), got {learned_at!r}")
    if len({row for row, _ in reached}) < len(reached):
        raise ValueError(f"`learned_at` must have one task per row for other libraries' values, got {learned_at!r}")
    order = [j for _, j in reached]
    boundaries = [row for row, _ in reached]

    def pick(name: str) -> list[float] | None:
        values = rows.get(name)
        return None if values is None else [float(v) for v in as_double(values).cpu()[order]]

    square = cells[boundaries][:, order]
    return _Square(
        cells=square.tolist(),
        initial=pick("initial"),
        n_test=pick("n_test"),
        independent=pick("independent"),
        joint=pick("joint"),
        random=pick("random"),
        table=square,
    )


def peer_values(
    matrix: Tensor,
    compat: Peer,
    *,
    learned_at: LearnedAt = None,
    initial: Tensor | None = None,
    n_test: Tensor | None = None,
    independent: Tensor | None = None,
    joint: Tensor | None = None,
    random: Tensor | None = None,
) -> dict[str, PeerValue]:
    """What a peer reports for a matrix, by its own keys.

    Args:
        matrix: accuracy ``(rows, tasks)`` in [0, 1], NaN where not measured.
        compat: the library.
        learned_at: row at which each column was learned, None or -1 for never; None for column j at row j.
        initial: accuracy before any training ``(tasks,)``.
        n_test: test samples ``(tasks,)``.
        independent: accuracy of a model for each task alone ``(tasks,)``.
        joint: accuracy of a model trained on all tasks ``(tasks,)``.
        random: accuracy of guessing ``(tasks,)``.

    Returns:
        Fractions by key, NaN where the peer gives NaN, the name of an exception where it raises. Keys that need an
        input which was not given are left out.

    Raises:
        ValueError: for an unknown library, or two tasks learned at one row, which none of them records.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[0.6, 0.4], [0.7, 0.8]])
        >>> {peer: round(peer_values(matrix, peer)["forgetting"], 2) for peer in ("mammoth", "renate", "continuum")}
        {'mammoth': 0.0, 'renate': -0.1, 'continuum': 0.0}
    """
    check_choice("compat", compat, sorted(_PEERS))
    rows = {"initial": initial, "n_test": n_test, "independent": independent, "joint": joint, "random": random}
    return _PEERS[compat](_square(matrix, learned_at, rows))


class Match(NamedTuple):
    """Which definitions a published value agrees with.

    Attributes:
        value: the published value as a fraction.
        agrees: definitions within the tolerance, ours first, then ``"peer: key"``.
        nearest: the closest definition when none agrees, and its value; None when nothing is defined.
    """

    value: float
    agrees: list[str]
    nearest: tuple[str, float] | None


def definitions(
    matrix: Tensor,
    *,
    learned_at: LearnedAt = None,
    initial: Tensor | None = None,
    n_test: Tensor | None = None,
    independent: Tensor | None = None,
    joint: Tensor | None = None,
    random: Tensor | None = None,
    nan_policy: NanPolicy = "propagate",
) -> dict[str, float]:
    """Every definition that a published number could follow, by key; NaN where undefined.

    Arguments as for :func:`peer_values`.

    Example:
        >>> import torch
        >>> values = definitions(torch.tensor([[0.6, 0.4], [0.7, 0.8]]))
        >>> round(values["forgetting[peak,since=learned]"], 2), values["forgetting[peak,since=learned,clip]"]
        (-0.1, 0.0)
    """
    f = functional
    common: dict[str, Any] = {"learned_at": learned_at, "initial": initial, "nan_policy": nan_policy}
    micro: dict[str, Any] = {"average": "micro", "n_test": n_test, **common}
    found = {
        "average_accuracy": f.average_accuracy(matrix, **common),
        "average_accuracy[micro]": f.average_accuracy(matrix, **micro),
        "average_incremental_accuracy": f.average_incremental_accuracy(matrix, **common),
        "average_incremental_accuracy[micro]": f.average_incremental_accuracy(matrix, **micro),
        "accuracy_over_time": f.accuracy_over_time(matrix, **common),
        "learning_accuracy": f.learning_accuracy(matrix, **common),
        "worst_task_accuracy": f.worst_task_accuracy(matrix, **common),
        "stability": f.stability(matrix, **common),
        "forgetting[peak,since=learned]": f.forgetting(matrix, **common),
        "forgetting[peak,since=start]": f.forgetting(matrix, since="start", **common),
        "forgetting[peak,since=learned,clip]": f.forgetting(matrix, clip=True, **common),
        "forgetting[learned]": f.forgetting(matrix, peak="learned", **common),
        "forgetting[peak,since=learned,relative]": f.forgetting(matrix, normalize="peak", **common),
        "forgetting[peak,since=learned,max]": f.forgetting(matrix, reduction="max", **common),
        "backward_transfer": f.backward_transfer(matrix, **common),
        "backward_transfer[running]": f.backward_transfer(matrix, scheme="running", **common),
        "remembering": f.remembering(matrix, **common),
        "positive_backward_transfer": f.positive_backward_transfer(matrix, **common),
        "forward_transfer": f.forward_transfer(matrix, **common),
        "forward_transfer[baseline=none]": f.forward_transfer(matrix, baseline=None, **common),
        "forward_transfer[triangle]": f.forward_transfer(matrix, scheme="triangle", **common),
        "plasticity_gain": f.plasticity_gain(matrix, independent, **common),
        "forgetting_ratio": f.forgetting_ratio(matrix, joint, random, **common),
        "normalized_accuracy": f.normalized_accuracy(matrix, joint, **common),
        "transfer_accuracy[order=row]": f.transfer_accuracy(matrix, order="row", **common),
        **{f"mtil_{name}": value for name, value in f.mtil_scores(matrix, **common).items()},
    }
    return {name: float(value) for name, value in found.items()}


def match_definitions(
    values: Mapping[str, float],
    matrix: Tensor,
    *,
    learned_at: LearnedAt = None,
    tolerance: float = 5e-4,
    percent: bool | None = None,
    **inputs: Any,
) -> dict[str, Match]:
    """Say which definitions published values agree with, among ours and those of other libraries.

    Args:
        values: published numbers by the names they were published under.
        matrix: the published accuracy matrix ``(rows, tasks)`` in [0, 1], NaN where not given.
        learned_at: row at which each column was learned, None or -1 for never; None for column j at row j.
        tolerance: largest difference of fractions; half of the last digit printed.
        percent: whether ``values`` are percent; None takes a value beyond 1 for percent.
        **inputs: ``initial``, ``n_test``, ``independent``, ``joint``, ``random`` as for :func:`peer_values`.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[0.6, 0.4], [0.7, 0.8]])
        >>> match_definitions({"forgetting": -0.1}, matrix)["forgetting"].agrees[:2]
        ['forgetting[peak,since=learned]', 'forgetting[peak,since=start]']
    """
    known: dict[str, float] = definitions(matrix, learned_at=learned_at, **inputs)
    recorded = _order(matrix, learned_at)
    peers = _PEERS if len({row for row, _ in recorded}) == len(recorded) > 0 else {}
    for peer, report in peers.items():
        theirs = report(_square(matrix, learned_at, inputs))
        known |= {f"{peer}: {key}": value for key, value in theirs.items() if isinstance(value, float)}
    defined = {name: value for name, value in known.items() if not math.isnan(value)}
    found = {}
    for name, published in values.items():
        scale = 100.0 if percent or (percent is None and abs(published) > 1) else 1.0
        value = published / scale
        agrees = [key for key, other in defined.items() if abs(other - value) <= tolerance]
        closest = min(defined, key=lambda key: abs(defined[key] - value), default=None)
        nearest = None if agrees or closest is None else (closest, defined[closest])
        found[name] = Match(value, agrees, nearest)
    return found
