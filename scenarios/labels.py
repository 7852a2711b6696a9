"""Labels of a data set, found without decoding an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Labels = str | Sequence[Any] | NDArray[Any] | Tensor | Callable[[int], Any]

MOST_CLASSES = 1_000_000
"""Labels must be below: tables and heads have a place for each number up to the largest label."""
_ATTRIBUTES = ("targets", "labels", "train_labels", "test_labels", "_labels", "y")
_FILE_LISTS = ("samples", "imgs", "_samples", "_image_files")
_COLUMNS = ("label", "labels", "fine_label", "target", "y")


@dataclass(frozen=True, eq=False)
class FoundLabels:
    """Labels of every sample, as integers.

    Attributes:
        values: ``(samples,)`` int64, 0 or more.
        names: text of each label by its number, or nothing when the data set has none.
        mapping: original value to integer, when the data set's labels are text.
    """

    values: NDArray[np.int64]
    names: tuple[str, ...] = ()
    mapping: dict[str, int] | None = None


def find_labels(data: Any, labels: Labels | None = None, names: Sequence[str] | None = None) -> FoundLabels:
    """The labels of a map dataset.

    Args:
        data: torchvision dataset, ``ImageFolder``, ``TensorDataset``, ``Subset``, ``ConcatDataset``, Hugging Face
            dataset, or anything with a length.
        labels: an attribute's or column's name, one value per sample, or a function of the sample's index; None looks
            in the usual places (``targets``, ``labels``, ``samples``, ``tensors[1]``, the column "label").
        names: text of each label; None takes the data set's own.

    Returns:
        Integers; labels that are text are numbered in alphabetical order, and the mapping is kept.

    Raises:
        ValueError: when there are no labels to be found, not one per sample, or negative, missing or huge ones.

    Example:
        >>> find_labels(range(4), labels=["cat", "ant", "cat", "dog"]).mapping
        {'ant': 0, 'cat': 1, 'dog': 2}
    """
    raw = _raw(data, labels)
    values = _as_array(raw)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1 or len(values) != len(data):
        raise ValueError(
            f"`labels` must be one value for each of the {len(data)} samples, got shape {values.shape};"
            " for several labels a sample use a multi-label scenario"
        )
    mapping = None
    if values.dtype.kind in "USO":
        if any(v is None or v != v for v in values.tolist()):
            raise ValueError("`labels` must be given for every sample, got None or NaN among them")
        texts, values = np.unique(values.astype(str), return_inverse=True)
        mapping = {str(t): i for i, t in enumerate(texts)}
        names = names or tuple(mapping)
    elif values.dtype.kind == "f":
        if not (np.isfinite(values).all() and np.array_equal(values, np.floor(values))):
            raise ValueError(f"`labels` must be integers or text, got {values.dtype} with fractions, infinity or NaN")
    elif values.dtype.kind not in "biu":
        raise ValueError(f"`labels` must be integers or text, got {values.dtype}")
    if len(values) and values.max() >= MOST_CLASSES:  # before the cast, which would wrap; 64-bit keys are no labels
        where = int(values.argmax())
        raise ValueError(
            f"`labels` must be below {MOST_CLASSES:,}, since every number up to the largest has a place,"
            f" got {values[where]} at sample {where}; pass np.unique(labels, return_inverse=True)[1]"
        )
    values = values.astype(np.int64)
    if len(values) and values.min() < 0:
        where = int(values.argmin())
        raise ValueError(f"`labels` must be 0 or more, got {values[where]} at sample {where}; remove unlabeled samples")
    found = names if names is not None else _own_names(data)
    return FoundLabels(values, tuple(str(n) for n in found), mapping)


def _as_array(raw: Any) -> NDArray[Any]:
    if isinstance(raw, Tensor):
        return raw.detach().cpu().numpy()
    return raw if isinstance(raw, np.ndarray) else np.asarray(list(raw))


def _columns(data: Any) -> list[str]:
    columns = getattr(data, "column_names", None)
    return list(columns) if isinstance(columns, list | tuple) else []


def _raw(data: Any, labels: Labels | None) -> Any:
    if labels is None:
        return _usual(data)
    if isinstance(labels, str):
        if labels in _columns(data):
            return data[labels]
        value = getattr(data, labels, None)
        if value is None:
            known = _columns(data) or sorted(k for k in vars(data) if not k.startswith("_"))
            raise ValueError(
                f"`labels` must name a column or attribute of the data set, got {labels!r}; it has {', '.join(known)}"
            )
        return value
    if callable(labels):
        return [labels(i) for i in range(len(data))]
    return labels


def _usual(data: Any) -> Any:
    parts = getattr(data, "datasets", None)  # ConcatDataset
    if isinstance(parts, list):
        return np.concatenate([_as_array(_usual(p)) for p in parts])
    inner, indices = getattr(data, "dataset", None), getattr(data, "indices", None)  # Subset
    if inner is not None and indices is not None:
        return _as_array(_usual(inner))[np.asarray(indices, np.int64)]
    for name in _ATTRIBUTES:
        value = getattr(data, name, None)
        if isinstance(value, Sequence | np.ndarray | Tensor) and not isinstance(value, str) and len(value) == len(data):
            return value
    for name in _FILE_LISTS:
        value = getattr(data, name, None)
        if isinstance(value, list) and len(value) == len(data) and value and isinstance(value[0], tuple):
            return [item[1] for item in value]
    tensors = getattr(data, "tensors", None)  # TensorDataset
    if isinstance(tensors, tuple) and len(tensors) > 1 and tensors[1].ndim == 1 and not tensors[1].is_floating_point():
        return tensors[1]
    for name in _COLUMNS:
        if name in _columns(data):
            return data[name]
    raise ValueError(
        f"the labels of `{type(data).__name__}` must be found without reading its samples, got none in"
        f" {', '.join((*_ATTRIBUTES, *_FILE_LISTS[:2]))}; pass `labels=` as a column's or attribute's name, as one"
        " label per sample, or as a function of the sample's index"
    )


def _own_names(data: Any) -> Sequence[str]:
    inner = getattr(data, "dataset", None)
    if inner is not None and hasattr(data, "indices"):
        return _own_names(inner)
    parts = getattr(data, "datasets", None)
    if isinstance(parts, list) and parts:
        return _own_names(parts[0])
    own = getattr(data, "classes", None)
    if isinstance(own, list | tuple) and all(isinstance(c, str) for c in own):
        return own
    features = getattr(data, "features", None)
    if isinstance(features, dict):
        for name in _COLUMNS:
            texts = getattr(features.get(name), "names", None)
            if isinstance(texts, list):
                return texts
    return ()


def align_labels(reference: FoundLabels, other: FoundLabels, part: str = "test") -> FoundLabels:
    """``other`` in the numbers of ``reference``: two folders number their classes alike only if they hold the same.

    Args:
        reference: labels of the training data.
        other: labels of other data.
        part: what the other data are, for the errors.

    Raises:
        ValueError: when ``other`` has samples of classes that ``reference`` does not name, or when one has text and the
            other has numbers without names.
    """
    if (reference.mapping is None) != (other.mapping is None) and not (reference.names and other.names):
        kinds = ["integers" if found.mapping is None else "text" for found in (reference, other)]
        raise ValueError(
            f"`labels` must be text in training and {part} data, or integers in both, got {kinds[0]} and {kinds[1]};"
            " number the text as the training data are numbered"
        )
    if not reference.names or not other.names or reference.names == other.names:
        return other
    number = {name: i for i, name in enumerate(reference.names)}
    table = np.array([number.get(name, -1) for name in other.names], np.int64)
    if len(other.values) and other.values.max() >= len(table):
        raise ValueError(f"`labels` must be below {len(table)}, the number of class names, got {other.values.max()}")
    used = other.values >= 0
    values = np.where(used, table[other.values], -1)
    if (values[used] < 0).any():
        lost = sorted({other.names[v] for v in np.unique(other.values[used & (values < 0)])})
        raise ValueError(
            f"`{part}` must hold classes of the training data only, got {', '.join(lost[:5])} as well;"
            " remove them, or add training samples"
        )
    return FoundLabels(values, reference.names, reference.mapping)
