"""A stream from any data in one line."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cl_plugins._text import did_you_mean

from ._seeds import SPLIT, check_seed, words
from .boundaries import Blurry, FewShot, Repetition
from .class_incremental import ClassIncremental, ClassOptions, TaskIncremental
from .data import TensorSource, rank_in_class
from .domains import DomainIncremental
from .image_files import class_folders
from .labels import FoundLabels, align_labels, find_labels
from .stream import LoaderOptions, TaskStream
from .stream_data import StreamData

_KINDS: dict[str, Any] = {
    "class-incremental": ClassIncremental,
    "task-incremental": TaskIncremental,
    "few-shot": FewShot,
    "blurry": Blurry,
    "repetition": Repetition,
    "online": ClassIncremental,
    "domain-incremental": DomainIncremental,
}
_INPUT_COLUMNS = ("image", "img", "pixel_values", "text", "sentence")
_VALIDATION_KEYS = ("validation", "valid", "val")
_TEST_KEYS = ("test", *_VALIDATION_KEYS)


class Column:
    """Samples ``(value, None)`` of one column of a table; the stream puts the label in.

    Args:
        table: a Hugging Face dataset, or any map dataset of dicts.
        name: the column.

    Raises:
        ValueError: when a sample is read that has no such column.
    """

    def __init__(self, table: Any, name: str) -> None:
        self.table = table
        self.name = name

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Any, None]:
        row = self.table[index]
        try:
            return row[self.name], None
        except (KeyError, IndexError, TypeError):
            found = f"a dict with {', '.join(map(str, row))}" if isinstance(row, Mapping) else f"a {type(row).__name__}"
            raise ValueError(
                f"`inputs` must be a key of every sample, got {self.name!r} for sample {index}, which is {found}"
            ) from None


class Records:
    """Lines of a jsonl file, one dict a sample.

    Args:
        path: the file.

    Raises:
        ValueError: for a line that is no JSON object, naming it.
    """

    def __init__(self, path: str | Path) -> None:
        self.rows: list[dict[str, Any]] = []
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {str(path)!r} must be JSON, got {error}") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} of {str(path)!r} must be a JSON object, got {type(row).__name__}")
            self.rows.append(row)
        self.column_names = sorted(set().union(*self.rows)) if self.rows else []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | str) -> Any:
        if isinstance(index, str):
            return [row.get(index) for row in self.rows]
        return self.rows[index]


def stream_from(
    data: Any,
    labels: Any = None,
    *,
    test: Any = None,
    validation: Any = None,
    test_fraction: float = 0.2,
    scenario: str = "class-incremental",
    inputs: str | None = None,
    split_seed: int = 0,
    **options: Any,
) -> TaskStream:
    """A stream over a user's own data.

    Args:
        data: a map dataset, a list of tuples ``(input, label)``, a pair ``(inputs, labels)`` of tensors or arrays,
            inputs alone with ``labels``, a Hugging Face ``Dataset`` or a dict of them with "train", "test" and
            "validation", a folder with one folder of images per class (or ``train``, ``test`` and ``validation`` with
            such), a jsonl file; for domains a list of any of these. Where "test" is missing, "validation" is the test
            data.
        labels: an attribute's or column's name, one value per sample, or a function of the index; with ``test`` or
            ``validation`` a tuple with one of these for each, in this order. None looks in the usual places. Text
            labels are numbered in alphabetical order; the stream's ``label_mapping`` says how.
        test: test data of the same kind, for domains a list with one per domain; None takes it from ``data``.
        validation: validation data, likewise; None takes what ``data`` names so, else ``validation_fraction`` of the
            training data.
        test_fraction: share of every class that becomes test data when there is none, drawn by ``split_seed``.
        scenario: "class-incremental", "task-incremental", "few-shot", "blurry", "repetition", "online" or
            "domain-incremental".
        inputs: column that is the input, for tables and for samples that are dicts; None takes "image", "img",
            "pixel_values", "text" or "sentence" of a table, else samples are whole rows.
        split_seed: draws test and validation samples.
        options: of the scenario's class, such as ``n_tasks``, ``shots``, ``order_seed``, ``batch_size``.

    Raises:
        ValueError: for an unknown scenario, labels that cannot be found, not one test data set per domain, or
            ``validation_fraction`` beside validation data.
        TypeError: for data that are none of these, or an option that the scenario does not have.

    Example:
        >>> stream = stream_from((torch.rand(60, 3), np.repeat(["ant", "bee", "cat"], 20)), n_tasks=3)
        >>> stream.tasks[1].class_names, stream.provenance()["sizes"]["test"]
        (('bee',), [4, 4, 4])
    """
    if scenario not in _KINDS:
        raise ValueError(f"`scenario` must be a known kind of stream, got {scenario!r}{did_you_mean(scenario, _KINDS)}")
    if not 0 < test_fraction < 1:
        raise ValueError(f"`test_fraction` must be in (0, 1), got {test_fraction!r}")
    check_seed("split_seed", split_seed)
    if scenario == "domain-incremental":
        if not isinstance(data, list):
            raise TypeError(f"`data` must be a list with one data set per domain, got {type(data).__name__}")
        _check_options(scenario, options)
        parts = zip(
            data,
            _one_per_domain("test", test, len(data)),
            _one_per_domain("validation", validation, len(data)),
            strict=True,
        )
        domains = [_resolve(*part, labels, test_fraction, inputs, split_seed) for part in parts]
        _check_validation(domains, options)
        return DomainIncremental(domains, split_seed=split_seed, **options)
    _check_options(scenario, options)
    if scenario == "online":
        options = {"single_pass": True, "batch_size": 10, **options}
    source = _resolve(data, test, validation, labels, test_fraction, inputs, split_seed)
    _check_validation([source], options)
    stream: TaskStream = _KINDS[scenario](source, split_seed=split_seed, **options)
    return stream


def _one_per_domain(name: str, value: Any, n: int) -> list[Any]:
    """The argument's data of each domain; nothing but None when it is not given."""
    if value is None:
        return [None] * n
    if not isinstance(value, list):
        kind = type(value).__name__
        raise TypeError(f"`{name}` must be a list with one data set per domain, as `data` is, got {kind}")
    if len(value) != n:
        raise ValueError(f"`{name}` must hold {n} data sets, one per domain in the order of `data`, got {len(value)}")
    return value


def _check_options(scenario: str, options: Mapping[str, Any]) -> None:
    kind = _KINDS[scenario]
    known = set(inspect.signature(kind).parameters) | set(LoaderOptions.__annotations__)
    if issubclass(kind, ClassIncremental):
        known |= {"n_tasks", *ClassOptions.__annotations__}
    known -= {"data", "domains", "options"}
    for name in options:
        if name not in known:
            told = known | set(inspect.signature(stream_from).parameters)
            raise TypeError(
                f"`{name}` must be an option of `stream_from` or of `{kind.__name__}`, got {options[name]!r}, which"
                f" neither takes{did_you_mean(name, told - {'data', 'options'})}"
            )


def _check_validation(sources: list[StreamData], options: Mapping[str, Any]) -> None:
    fraction = options.get("validation_fraction")
    if fraction and any(source.validation is not None for source in sources):
        raise ValueError(
            f"`validation_fraction` must be left out where there are validation data, got {fraction!r};"
            " leave out one of them"
        )


def _resolve(
    data: Any, test: Any, validation: Any, labels: Any, fraction: float, inputs: str | None, seed: int
) -> StreamData:
    name = "data" if isinstance(data, tuple | list | Mapping | Tensor | np.ndarray) else type(data).__name__.lower()
    if isinstance(data, str | Path):
        name = Path(data).stem.lower()
        data = _read_path(Path(data).expanduser())
    if isinstance(data, Mapping):
        if "train" not in data:
            raise ValueError(f"`data` must have the key 'train', got {', '.join(map(str, data))}")
        test_key = next((k for k in _TEST_KEYS if k in data), None) if test is None else None
        key = next((k for k in _VALIDATION_KEYS if k in data and k != test_key), None)
        if validation is None and key is not None:
            validation = data[key]
        data, test = data["train"], test if test_key is None else data[test_key]
    n_parts = 1 + (test is not None) + (validation is not None)
    each = list(labels) if isinstance(labels, tuple) and len(labels) == n_parts > 1 else [labels] * n_parts
    train_source, train = _source(data, each[0], inputs)
    valid_source, valid = None, None
    if validation is not None:
        valid_source, found = _source(validation, each[-1], inputs)
        valid = align_labels(train, found, "validation")
    if test is not None:
        test_source, found = _source(test, each[1], inputs)
        aligned = align_labels(train, found)
        return StreamData(train_source, test_source, valid_source, name=name, found=(train, aligned, valid))
    rank = rank_in_class(train.values, words(SPLIT, seed, 1, np.arange(len(train.values))))
    counts = np.bincount(train.values)
    held = rank < np.minimum(np.maximum(np.round(fraction * counts), 1), counts - 1)[train.values]
    halves = [FoundLabels(np.where(part, train.values, -1), train.names, train.mapping) for part in (~held, held)]
    return StreamData(train_source, train_source, valid_source, name=name, found=(halves[0], halves[1], valid))


def _read_path(path: Path) -> Any:
    if path.is_file() and path.suffix in (".jsonl", ".ndjson"):
        return Records(path)
    if path.is_dir():
        if (path / "train").is_dir():
            parts = {p.name: class_folders(p) for p in sorted(path.iterdir()) if p.name in ("train", *_TEST_KEYS)}
            return parts if len(parts) > 1 else parts["train"]
        return class_folders(path)
    raise TypeError(f"`data` must be a folder of class folders or a .jsonl file, got {str(path)!r}, which is neither")


def _is_sample(item: Any) -> bool:
    """Whether an item of a list is an input and its one label, and not a data set of inputs and labels."""
    if not (isinstance(item, tuple) and len(item) == 2):
        return False
    label = item[1]
    if isinstance(label, Tensor | np.ndarray | np.generic):
        return label.ndim == 0 and isinstance(label.item(), int | str)
    return isinstance(label, int | str)


def _source(data: Any, labels: Any, inputs: str | None) -> tuple[Any, FoundLabels]:
    if isinstance(data, tuple) and len(data) == 2:
        data, labels = data
    if labels is None and isinstance(data, list) and data and all(_is_sample(item) for item in data):
        return data, find_labels(data, [item[1] for item in data])
    if isinstance(data, Tensor | np.ndarray) or (isinstance(data, list) and data and isinstance(data[0], Sequence)):
        if labels is None:
            raise ValueError(
                "`labels` must be given for inputs without any, got None; pass one label per sample, or a list of"
                " tuples (input, label) with integers or text as labels; a list of data sets, one per domain, is for"
                " scenario='domain-incremental'"
            )
        values = data if isinstance(data, Tensor) else torch.from_numpy(np.asarray(data))
        found = find_labels(values, labels)
        return TensorSource(values, found.values), found
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(f"`data` must have a length and items by index, got {type(data).__name__}")
    found = find_labels(data, labels)
    columns = getattr(data, "column_names", None)
    if isinstance(columns, list | tuple):
        if inputs is not None and inputs not in columns:
            raise ValueError(f"`inputs` must be a column, got {inputs!r}; there are {', '.join(columns)}")
        chosen = inputs or next((c for c in _INPUT_COLUMNS if c in columns), None)
        return (data if chosen is None else Column(data, chosen)), found
    return (data if inputs is None else Column(data, inputs)), found
