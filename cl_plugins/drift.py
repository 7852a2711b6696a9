"""What changes in a model between the ends of tasks: features, confidences, confused tasks, and what it all weighs.

=================  ===================================================================================================
effective rank     of the probe set's features, see :func:`cl_plugins.functional.effective_rank`
CKA                linear, of the probe set's features now against those at the first and at the previous task end
calibration drift  ``ECE_i - ECE_l(j)`` of task j learned in row l(j), 15 equal bins by default
recency            from the evaluation's integer counts of true against predicted task
=================  ===================================================================================================
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cl_plugins.plugin import Row

KINDS = ("frozen", "trained", "method", "buffers", "callbacks")
"""Weights that stay as they are, weights that the last task trained, weights and buffers that a method added and no
longer trains, buffers of the model, tensors that callbacks keep for themselves."""


@dataclass(frozen=True)
class DriftRow:
    """The measurement after one task; a number that is undefined is None and has its reason in ``undefined``.

    Attributes:
        after: index of the task that was learned last.
        samples: samples of the probe set.
        effective_rank: of their features, from 1 to the smaller of samples and dimensions.
        cka_first: similarity with the features at the first measurement, in [0, 1]; 1 there.
        cka_previous: likewise with those at the previous one.
        calibration_error: ECE in [0, 1] of the probe samples of all tasks learned so far.
        task_calibration_error: ECE of each of these tasks, by its index.
        calibration_drift: of each task the ECE now minus the ECE right after the task was learned.
        task_error: share of test samples whose predicted class belongs to another task, in [0, 1].
        recency_bias: share of predictions in the newest task minus its share of test samples, in [-1, 1].
        recency_pull: share of the errors on old tasks that land in the newest task, in [0, 1].
        parameters: number of values by kind, see :data:`KINDS`.
        bytes: what they weigh.
        undefined: why a number is None.
    """

    after: int
    samples: int = 0
    effective_rank: float | None = None
    cka_first: float | None = None
    cka_previous: float | None = None
    calibration_error: float | None = None
    task_calibration_error: dict[int, float] = field(default_factory=dict)
    calibration_drift: dict[int, float] = field(default_factory=dict)
    task_error: float | None = None
    recency_bias: float | None = None
    recency_pull: float | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    undefined: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; tasks become text keys."""
        values = asdict(self)
        for name in ("task_calibration_error", "calibration_drift"):
            values[name] = {str(k): v for k, v in values[name].items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DriftRow:
        """The row that :meth:`to_dict` told."""
        tasks = {
            name: {int(k): v for k, v in values[name].items()}
            for name in ("task_calibration_error", "calibration_drift")
        }
        return cls(**{**values, **tasks})


def recency_of_row(row: Row, learned: Sequence[int], newest: Collection[int]) -> dict[str, float | None]:
    """Task confusion of an evaluation in numbers, from its integer counts.

    Args:
        row: the evaluation, with ``confusion`` (true task x predicted task).
        learned: tasks learned so far, by index.
        newest: those of them that were learned last.

    Returns:
        ``task_error``, ``recency_bias`` and ``recency_pull`` as in :class:`DriftRow`; None where undefined: all without
        a confusion, the last two before the second task, the last one without an error on an old task.

    Example:
        >>> row = Row(1, (6, 9), (10, 10), (8, 9), ((7, 3), (0, 10)), 0.1)
        >>> recency_of_row(row, [0, 1], [1])
        {'task_error': 0.15, 'recency_bias': 0.15, 'recency_pull': 0.75}
    """
    numbers: dict[str, float | None] = dict.fromkeys(("task_error", "recency_bias", "recency_pull"))
    measured = [j for j in learned if row.total[j]]
    if not row.confusion or not measured:
        return numbers
    counts = torch.tensor(row.confusion, dtype=torch.int64)
    new, rows = sorted(newest), counts[measured]
    total = int(rows.sum())
    numbers["task_error"] = (total - int(counts.diagonal()[measured].sum())) / total
    old = [j for j in measured if j not in newest]
    if not old or len(old) == len(measured):
        return numbers
    own = int(counts[[j for j in measured if j in newest]].sum())
    numbers["recency_bias"] = (int(rows[:, new].sum()) - own) / total
    wrong = sum((row.total[j] or 0) - (row.correct[j] or 0) for j in old)
    numbers["recency_pull"] = int(counts[old][:, new].sum()) / wrong if wrong else None
    return numbers


def _tensors(value: Any) -> Iterator[Tensor]:
    """Tensors inside nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def size_by_kind(
    module: nn.Module, trained: Collection[int] | None = None, state: Any = ()
) -> tuple[dict[str, int], dict[str, int]]:
    """Number of values and of bytes of a model, by :data:`KINDS`; memory that is shared counts once.

    Args:
        module: the model; what methods put beside it is its submodule ``plugins``.
        trained: ``id`` of each parameter that the last task trained; None for those that require gradients now.
        state: tensors, in containers of any depth, that callbacks keep outside the model.

    Example:
        >>> counts, sizes = size_by_kind(nn.Linear(3, 2), trained=())
        >>> counts["frozen"], sizes["frozen"], counts["trained"]
        (8, 32, 0)
    """
    if trained is None:
        trained = {id(p) for p in module.parameters() if p.requires_grad}
    plugins = getattr(module, "plugins", None)
    added = {id(t) for t in [*plugins.parameters(), *plugins.buffers()]} if isinstance(plugins, nn.Module) else set()
    counts, sizes, known = dict.fromkeys(KINDS, 0), dict.fromkeys(KINDS, 0), set()

    def take(tensor: Tensor, kind: str) -> None:
        place = (tensor.device, tensor.data_ptr())
        if tensor.numel() and place not in known:
            known.add(place)
            counts[kind] += tensor.numel()
            sizes[kind] += tensor.numel() * tensor.element_size()

    for parameter in module.parameters():
        kind = "trained" if id(parameter) in trained else "method" if id(parameter) in added else "frozen"
        take(parameter, kind)
    for buffer in module.buffers():
        take(buffer, "method" if id(buffer) in added else "buffers")
    for tensor in _tensors(state):
        take(tensor, "callbacks")
    return counts, sizes


def drift_events(row: DriftRow) -> list[dict[str, Any]]:
    """A measurement as events of the run store: a number or a line per chart."""
    events: list[dict[str, Any]] = []

    def tell(name: str, **values: Any) -> None:
        known = {k: v for k, v in values.items() if v is not None}
        if known:
            events.append({"name": f"drift/{name}", "task": row.after, **known})

    tell("effective rank", value=row.effective_rank)
    tell("linear CKA", first=row.cka_first, previous=row.cka_previous)
    tell("expected calibration error", value=row.calibration_error)
    tell("task confusion", task_error=row.task_error, recency_bias=row.recency_bias, recency_pull=row.recency_pull)
    tell("memory by kind", unit="bytes", **row.bytes)
    if row.calibration_drift:
        tell("calibration drift per task", x=list(row.calibration_drift), values=list(row.calibration_drift.values()))
    return events
