"""Multi-domain streams for vision-language models: every task is another domain with class names of its own.

Two forms of one stream. X-TAIL ("Advancing Cross-domain Discriminability in Continual Learning of Vision-Language
Models", Xu, Chen, Nie, Wang, Zhuang and Okumura, 2024, arXiv 2406.18868): an image is classified among the classes of
all domains, learned or not. MTIL ("Preventing Zero-Shot Transfer Degradation in Continual Learning of Vision-Language
Models", Zheng, Ma, Wang, Qin, Yue and You, 2023, arXiv 2303.06628): among the classes of its own domain. Training is
the same in both. Implemented: the streams over any data sets with class names, the number of shots, one template per
domain. Not implemented: several templates per class.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Unpack

from cl_plugins.task import Task

from ._seeds import SHOTS, check_seed, spread_seed, words
from .data import Split, Transform, rank_in_class
from .domains import concatenated, learning_order
from .labels import Labels
from .stream import LoaderOptions, TaskStream
from .stream_data import Prepared, as_stream_data, prepare

DEFAULT_TEMPLATE = "a photo of a {}."
"""Text of a class where neither the stream nor the domain's data bring one (CLIP, arXiv 2103.00020)."""


class DomainOptions(LoaderOptions, total=False):
    """Keyword arguments of :class:`XTAIL` that streams built on it pass on."""

    templates: str | Sequence[str] | None
    shots: int | None
    domain_order: Sequence[int] | None
    order_seed: int | None
    data_seed: int | None
    split_seed: int
    seed: int | None
    validation_fraction: float
    labels: Labels | None
    root: str | None


class XTAIL(TaskStream):
    """Each task is a domain with classes of its own; an image is classified among the classes of all domains.

    Domain k's classes are numbered behind those of domain k - 1, in the order in which ``domains`` are given, so labels
    do not depend on the order of learning. Classes of different domains stay apart even when their names are equal.

    WHEN: drawn when it is constructed, without reading an image. Predictions may name every class at any time
    (``open_vocabulary``), so that domains not learned yet have an accuracy: evaluate with ``fit_stream(...,
    evaluate_initial=True, evaluate_future=True)``, as ``cl-bench`` does. ``class_names`` and ``class_texts`` hold the
    name and the full text of every label.

    Args:
        domains: one per task: :class:`StreamData`, a pair (train, test) of data sets that know their class names, or a
            registered name.
        names: text of each domain; None takes the names of the data.
        templates: text of a class with ``{}`` for its name, one for all domains or one per domain in the order of
            ``domains``; None takes the data's own, and ``"a photo of a {}."`` for data without one.
        shots: training images per class, drawn by ``split_seed``; None takes all. Published for X-TAIL: 16.
        domain_order: the domains' positions in the order in which they are learned.
        order_seed: draws that order; None keeps it as given.
        data_seed: orders and augments the samples.
        split_seed: draws shots and validation samples.
        seed: stands for ``order_seed`` and ``data_seed`` where these are not given.
        validation_fraction: share of each class's training samples, after ``shots``, that becomes validation data, in
            [0, 1), for streams whose domains bring no validation data.
        labels: where the labels are, see :func:`find_labels`.
        root: folder of registered data that are not bundled.
        options: of :class:`TaskStream`.

    Raises:
        ValueError: for no domain, a domain without class names, a template without ``{}``, test images of a class that
            has no training image, faulty orders, or domains that bring different transforms.

    Example:
        >>> import torch
        >>> from cl_plugins.scenarios import StreamData, TensorSource
        >>> some = TensorSource(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))
        >>> pets = StreamData(some, some, class_names=("cat", "dog"), name="pets")
        >>> food = StreamData(some, some, class_names=("soup", "pie"), name="food", template="{}, a kind of food")
        >>> stream = XTAIL([pets, food])
        >>> [(task.name, task.classes) for task in stream.tasks]
        [('pets', (0, 1)), ('food', (2, 3))]
        >>> stream.class_texts
        ('a photo of a cat.', 'a photo of a dog.', 'soup, a kind of food', 'pie, a kind of food')
    """

    modality = "image-text"
    open_vocabulary = True
    prefix = "x-tail"

    def __init__(
        self,
        domains: Sequence[Any],
        names: Sequence[str] | None = None,
        *,
        templates: str | Sequence[str] | None = None,
        shots: int | None = None,
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
            raise ValueError(f"`domains` must hold one data set per domain, got {domains!r}")
        for name, given in (("names", names), ("templates", templates if not isinstance(templates, str) else None)):
            if given is not None and len(given) != len(domains):
                raise ValueError(f"`{name}` must hold {len(domains)} texts, one per domain, got {len(given)}")
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"`validation_fraction` must be in [0, 1), got {validation_fraction!r}")
        if shots is not None and (isinstance(shots, bool) or not isinstance(shots, int) or shots < 1):
            raise ValueError(f"`shots` must be an integer of 1 or more, got {shots!r}")
        check_seed("split_seed", split_seed)
        order_seed, data_seed = spread_seed(seed, order_seed, data_seed, fixed_order=domain_order is not None)
        order = learning_order(len(domains), domain_order, order_seed)
        found = [prepare(as_stream_data(d, None, root, False), labels) for d in domains]
        titles = [names[k] if names is not None else f.data.name or f"domain {k}" for k, f in enumerate(found)]
        for title, domain in zip(titles, found, strict=True):
            _check_domain(title, domain)
        starts = np.concatenate([[0], np.cumsum([len(f.names) for f in found])]).tolist()
        place = {k: task for task, k in enumerate(order)}
        train = _split([f.data.train for f in found], [f.train.values for f in found], starts, place)
        if shots is not None:
            train = train.only(_shots(train, split_seed) < shots)
        validation = None
        if all(f.validation is not None for f in found):
            values = [f.validation.values for f in found if f.validation is not None]
            validation = _split([f.data.validation for f in found], values, starts, place)
        elif validation_fraction:
            train, validation = train.hold_out(validation_fraction, split_seed)
        options.setdefault("name", self.prefix)
        options.setdefault("train_transform", _common("train_transform", found))
        options.setdefault("eval_transform", _common("eval_transform", found))
        super().__init__(
            [
                Task(
                    task,
                    tuple(starts[k] + c for c in found[k].present),
                    titles[k],
                    class_names=tuple(found[k].names[c] for c in found[k].present),
                )
                for task, k in enumerate(order)
            ],
            train,
            _split([f.data.test for f in found], [f.test.values for f in found], starts, place),
            validation,
            seeds={"order": order_seed, "data": 0 if data_seed is None else data_seed, "split": split_seed},
            **options,
        )
        self.n_classes = starts[-1]
        self.domain_order = tuple(order)
        self.templates = _templates(templates, found)
        self.class_names = tuple(n for f in found for n in f.names)
        self.class_texts = tuple(t.format(n) for t, f in zip(self.templates, found, strict=True) for n in f.names)
        _warn_of_equal_texts(self.name, self.class_texts)


class MTIL(XTAIL):
    """The same stream with the task known: an image is classified among the classes of its own domain.

    WHEN: nothing differs in training. Every evaluation counts both choices in one pass; :attr:`task_known` says which
    one is this stream's number, and Transfer, Average and Last are computed from it.

    Args:
        domains: as of :class:`XTAIL`.
        names: as there.
        options: as there.

    Raises:
        ValueError: as there.
    """

    task_known = True
    prefix = "mtil"

    def __init__(
        self, domains: Sequence[Any], names: Sequence[str] | None = None, **options: Unpack[DomainOptions]
    ) -> None:
        super().__init__(domains, names, **options)


def _check_domain(title: str, domain: Prepared) -> None:
    if not domain.names:
        raise ValueError(
            f"every domain must have class names, got {len(domain.train.names)} names for {max(domain.present) + 1}"
            f" labels in {title!r}; give it as StreamData(train, test, class_names=(...)), one name per label"
        )
    own = set(domain.present)
    for part, labels in (("test", domain.test), ("validation", domain.validation)):
        lost = [] if labels is None else sorted(set(np.unique(labels.values[labels.values >= 0]).tolist()) - own)
        if lost:
            raise ValueError(
                f"`{part}` of domain {title!r} must hold classes of its training data only, got class {lost[0]} as well"
            )


def _split(
    sources: Sequence[Any], values: Sequence[NDArray[np.int64]], starts: Sequence[int], place: dict[int, int]
) -> Split:
    """The domains' samples as one split; ``place`` says which task learns a domain."""
    labels = np.concatenate([np.where(v >= 0, v + starts[k], -1) for k, v in enumerate(values)])
    owner = np.concatenate([np.where(v >= 0, place[k], -1) for k, v in enumerate(values)])
    return Split.by_task(concatenated(sources), labels, owner, len(sources))


def _shots(train: Split, seed: int) -> NDArray[np.int64]:
    """Position of each used sample in a random order of its class."""
    return rank_in_class(train.labels[train.indices], words(SHOTS, seed, train.indices))


def _common(name: str, found: Sequence[Prepared]) -> Transform | None:
    own: list[Transform | None] = []
    for domain in found:
        transform = getattr(domain.data, name)
        if transform not in own:
            own.append(transform)
    if len(own) > 1:
        raise ValueError(f"`{name}` must be given, because the domains bring {len(own)} different ones")
    return own[0]


def _templates(given: str | Sequence[str] | None, found: Sequence[Prepared]) -> tuple[str, ...]:
    if given is None:
        chosen = [f.data.template or DEFAULT_TEMPLATE for f in found]
    else:
        chosen = [given] * len(found) if isinstance(given, str) else list(given)
    for template in chosen:
        if "{}" not in template:
            raise ValueError(f"`templates` must hold {{}} for the name of the class, got {template!r}")
    return tuple(chosen)


def _warn_of_equal_texts(name: str, texts: Sequence[str]) -> None:
    first: dict[str, int] = {}
    equal = [(first.setdefault(text, label), label) for label, text in enumerate(texts)]
    equal = [(a, b) for a, b in equal if a != b]
    if equal:
        a, b = equal[0]
        warnings.warn(
            f"stream {name!r}: {len(equal)} labels have the text of another, such as {a} and {b}, {texts[a]!r}; images"
            " of the later one are counted as errors, so give the domains different templates",
            stacklevel=3,
        )
