"""Domain-incremental streams: the same classes in every task, in another domain each time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import Unpack

from ._seeds import CLASS_ORDER, check_seed, generator, spread_seed
from .data import BatchSource, Split
from .labels import FoundLabels, Labels, align_labels, find_labels
from .stream import LoaderOptions, TaskStream
from .stream_data import Prepared, StreamData, as_stream_data

_Found = tuple[FoundLabels, FoundLabels, FoundLabels | None]


class Concatenated:
    """Several data sets one behind the other.

    Args:
        parts: map datasets.
    """

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self.starts = np.concatenate([[0], np.cumsum([len(p) for p in parts])])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Any:
        part = bisect_right(self.starts.tolist(), index) - 1
        return self.parts[part][index - int(self.starts[part])]


class ConcatenatedBatches(Concatenated):
    """The same for sources that read whole batches."""

    def read_batch(self, indices: NDArray[np.int64]) -> Tensor:
        """Inputs of these samples as one batch."""
        owner = np.searchsorted(self.starts, indices, side="right") - 1
        pieces: list[Tensor] = []
        places: list[NDArray[np.int64]] = []
        for part in np.unique(owner).tolist():
            mine = np.flatnonzero(owner == part)
            pieces.append(self.parts[part].read_batch(indices[mine] - self.starts[part]))
            places.append(mine)
        return torch.cat(pieces)[torch.from_numpy(np.argsort(np.concatenate(places)))]


def concatenated(parts: Sequence[Any]) -> Concatenated:
    """The parts as one source, which reads whole batches when all of them do."""
    kind = ConcatenatedBatches if all(isinstance(p, BatchSource) for p in parts) else Concatenated
    return kind(parts)


class DomainIncremental(TaskStream):
    """Each task is a domain: other images of the same classes.

    WHEN: drawn when it is constructed. ``shared_classes`` is true, so a class may stand in every task; predictions may
    name every class from the first task on.

    Args:
        domains: one per task: a pair (train, test), :class:`StreamData`, or a registered name.
        names: text of each domain.
        domain_order: the domains' positions in the order in which they are learned.
        order_seed: draws that order; None keeps it as given.
        data_seed: orders and augments the samples.
        split_seed: draws the validation samples.
        seed: stands for ``order_seed`` and ``data_seed`` where these are not given.
        validation_fraction: share of each class and domain that becomes validation data, in [0, 1).
        labels: where the labels are, see :func:`find_labels`.
        root: folder of registered data that are not bundled.
        options: of :class:`TaskStream`.

    Raises:
        ValueError: for no domain, faulty orders, or data without labels.

    Example:
        >>> from cl_plugins.scenarios import TensorSource
        >>> day, night = (TensorSource(torch.full((4, 3), v), torch.tensor([0, 1, 0, 1])) for v in (1.0, 0.0))
        >>> stream = DomainIncremental([(day, day), (night, night)], names=["day", "night"])
        >>> [(task.name, task.classes) for task in stream.tasks]
        [('day', (0, 1)), ('night', (0, 1))]
    """

    def __init__(
        self,
        domains: Sequence[Any],
        names: Sequence[str] | None = None,
        *,
        domain_order: Sequence[int] | None = None,
        order_seed: int | None = None,
        data_seed: int | None = None,
        split_seed: int = 0,
        seed: int | None = None,
        validation_fraction: float = 0.0,
        labels: Labels | None = None,
        root: str | None = None,
        **options: Unpack[LoaderOptions],
    ) -> None:
        if isinstance(domains, str) or not len(domains):
            raise ValueError(f"`domains` must hold one (train, test) pair per domain, got {domains!r}")
        if names is not None and len(names) != len(domains):
            raise ValueError(f"`names` must hold {len(domains)} texts, one per domain, got {len(names)}")
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must be in [0, 1), got {validation_fraction!r}")
        order_seed, data_seed = spread_seed(seed, order_seed, data_seed, fixed_order=domain_order is not None)
        order = learning_order(len(domains), domain_order, order_seed)
        given = [as_stream_data(domains[i], None, root, False) for i in order]
        texts = [names[i] if names is not None else given[k].name for k, i in enumerate(order)]
        found = _label_all(given, labels)
        train, validation = _by_part([d.train for d in given], [f[0] for f in found]), None
        if validation_fraction:
            train, validation = _hold_out(train, validation_fraction, check_seed("split_seed", split_seed))
        elif any(f[2] is not None for f in found):  # a domain without validation data has none of its training data
            held = [FoundLabels(np.full(len(f[0].values), -1)) if f[2] is None else f[2] for f in found]
            sources = [d.train if f[2] is None else d.validation for d, f in zip(given, found, strict=True)]
            validation = _by_part(sources, held)
        present = [np.unique(f[0].values[f[0].values >= 0]).tolist() for f in found]
        every = sorted({c for own in present for c in own})
        text_of = Prepared(given[0], found[0][0], found[0][1], None, every)
        options.setdefault("name", "domain-" + given[0].name.partition("/")[0])
        options.setdefault("train_transform", given[0].train_transform)
        options.setdefault("eval_transform", given[0].eval_transform)
        super().__init__(
            [text_of.task(k, own, name=texts[k] or f"domain {k}") for k, own in enumerate(present)],
            train,
            _by_part([d.test for d in given], [f[1] for f in found]),
            validation,
            class_order=every,
            seeds={"order": order_seed, "data": 0 if data_seed is None else data_seed, "split": split_seed},
            shared_classes=True,
            **options,
        )
        self.class_names = text_of.names
        self.label_mapping = text_of.train.mapping
        self.domain_order = tuple(order)


def learning_order(n: int, domain_order: Sequence[int] | None, order_seed: int | None) -> list[int]:
    """Positions of the domains in the order in which they are learned: as given, or drawn."""
    if domain_order is None:
        if order_seed is None:
            return list(range(n))
        return [int(i) for i in generator(CLASS_ORDER, check_seed("order_seed", order_seed)).permutation(n)]
    if order_seed is not None:
        raise ValueError(f"`order_seed` must be None when `domain_order` is given, got {order_seed!r}")
    if sorted(domain_order) != list(range(n)):
        raise ValueError(f"`domain_order` must name each position from 0 to {n - 1} once, got {list(domain_order)!r}")
    return list(domain_order)


def _label_all(given: Sequence[StreamData], labels: Labels | None) -> list[_Found]:
    """Labels of every domain's training, test and validation data, in the numbers of all domains together."""
    found: list[_Found] = []
    for domain in given:
        if domain.test is None:
            raise ValueError("every domain must have test data, got None; give each as a pair (train, test)")
        how, names = domain.labels if labels is None else labels, domain.class_names
        found.append(
            domain.found
            or (
                find_labels(domain.train, how, names),
                find_labels(domain.test, how, names),
                None if domain.validation is None else find_labels(domain.validation, how, names),
            )
        )
    every = [f for group in found for f in group if f is not None]
    if not all(f.names for f in every):
        return found
    union = tuple(dict.fromkeys(name for f in every for name in f.names))
    mapping = {t: i for i, t in enumerate(union)} if every[0].mapping is not None else None
    reference = FoundLabels(every[0].values, union, mapping)
    return [
        (
            align_labels(reference, train),
            align_labels(reference, test),
            None if validation is None else align_labels(reference, validation, "validation"),
        )
        for train, test, validation in found
    ]


def _by_part(sources: Sequence[Any], found: Sequence[FoundLabels]) -> Split:
    owner = np.repeat(np.arange(len(sources)), [len(s) for s in sources])
    values = np.concatenate([f.values for f in found])
    owner[values < 0] = -1
    return Split.by_task(concatenated(sources), values, owner, len(sources))


def _hold_out(train: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """As :meth:`Split.hold_out`, but a share of every class within every task."""
    n_tasks = len(train.offsets) - 1
    owner = np.repeat(np.arange(n_tasks), train.sizes())
    per_task = np.full(len(train.labels), -1, np.int64)
    per_task[train.indices] = train.labels[train.indices] * n_tasks + owner
    kept, held = Split(train.source, per_task, train.indices, train.offsets).hold_out(fraction, seed)
    return replace(kept, labels=train.labels), replace(held, labels=train.labels)
