"""What a feature cache is filled from: a loader's samples in order, and a digest that tells other ones."""

from __future__ import annotations

from dataclasses import is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cl_plugins.evaluation import split_batch
from cl_plugins.feature_cache import tensor_digest

_PROBE = 8


def count_samples(images: DataLoader[Any]) -> int:
    """Samples of a loader's data."""
    data: Any = images.dataset  # torch's Dataset declares no length
    return len(data)


def in_order(images: DataLoader[Any], view: int, limit: int | None = None) -> DataLoader[Any]:
    """All samples of a loader's data in order, as the epoch ``view`` sees them."""
    n = count_samples(images)
    size = images.batch_size or 64
    starts = range(0, n if limit is None else min(limit, n), size if limit is None else limit)
    batches = [[view * n + p for p in range(s, min(s + (limit or size), n))] for s in starts]
    workers = 0 if limit is not None else images.num_workers
    collate = partial(_collated, images.dataset) if images.batch_size is None else images.collate_fn
    generator = torch.Generator().manual_seed(0)  # worker seeds would be drawn from the global one
    return DataLoader(
        images.dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate, generator=generator
    )


def _collated(dataset: Any, samples: Any) -> Any:
    return dataset.collate(samples)


def same_samples(a: DataLoader[Any], b: DataLoader[Any]) -> bool:
    """Whether two loaders read the same data through the same transform; told by what they hold, not by samples.

    A few samples would not do: an augmentation that is drawn for one image in ten leaves them as they are.
    """
    if not (isinstance(a, DataLoader) and isinstance(b, DataLoader)):
        return False
    return _same(a.collate_fn, b.collate_fn) and (
        a.dataset is b.dataset or (type(a.dataset) is type(b.dataset) and _same(vars(a.dataset), vars(b.dataset)))
    )


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if is_dataclass(a):
        return _same(vars(a), vars(b))
    return isinstance(a, int | float | str) and a == b


def fingerprint(images: DataLoader[Any], view: int) -> str:
    """Digest of the first inputs and of the number of samples: tells another transform, order or data set."""
    inputs, labels = split_batch(next(iter(in_order(images, view, limit=_PROBE))))
    n = torch.tensor(count_samples(images))
    named = inputs if isinstance(inputs, dict) else {"inputs": inputs}
    tensors = [(k, v) for k, v in sorted(named.items()) if isinstance(v, Tensor)]
    return tensor_digest([*tensors, ("labels", labels), ("n", n)])
