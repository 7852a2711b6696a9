"""What a feature cache is filled from: a loader's samples in order, and a digest that tells other ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cl_plugins.feature_cache import tensor_digest

_PROBE = 8


def count_samples(images: DataLoader[Any]) -> int:
    """Samples of a loader's data."""
    data: Any = images.dataset  # torch's Dataset declares no length
    return len(data)


def in_order(images: DataLoader[Any], view: int, positions: Sequence[int] | None = None) -> DataLoader[Any]:
    """All samples of a loader's data in order, or one batch of ``positions``, as the epoch ``view`` sees them."""
    n = count_samples(images)
    size = images.batch_size or 64
    chosen = [range(s, min(s + size, n)) for s in range(0, n, size)] if positions is None else [positions]
    batches = [[view * n + p for p in batch] for batch in chosen]
    workers = images.num_workers if positions is None else 0
    collate = partial(_collated, images.dataset) if images.batch_sampler is None else images.collate_fn
    generator = torch.Generator().manual_seed(0)  # worker seeds would be drawn from the global one
    return DataLoader(
        images.dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate, generator=generator
    )


def _collated(dataset: Any, samples: Any) -> Any:
    if not hasattr(dataset, "collate"):
        raise TypeError(
            "the loader must make batches of samples to be cached, got `batch_size=None`, where the data set"
            f" {type(dataset).__name__} gives whole batches; give the DataLoader a batch size"
        )
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


def probed(images: DataLoader[Any]) -> list[int]:
    """Positions of a few samples from all over a loader's data."""
    last = count_samples(images) - 1
    return sorted({p * last // (_PROBE - 1) for p in range(_PROBE)})


def fingerprint(images: DataLoader[Any], view: int) -> str:
    """Digest of inputs from all over the data, of their number and of which ones they are where the data set tells.

    Tells another transform, order, choice of samples or data set; not a change of single samples between the probes.
    """
    batch = next(iter(in_order(images, view, probed(images))))
    if not (isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)):
        kinds = [type(part).__name__ for part in (batch.values() if isinstance(batch, dict) else batch)]
        raise TypeError(
            "batches must be two tensors, inputs and labels, to be cached: row ids take the inputs' place; got a"
            f" {type(batch).__name__} of {', '.join(kinds)}; leave CacheFeatures out of the callbacks, or give the"
            " stream a `collate_fn` that makes such pairs"
        )
    inputs, labels = batch
    n = count_samples(images)
    chosen = np.asarray(getattr(images.dataset, "indices", None))  # of a task's view, of torch's Subset
    known = [("indices", torch.from_numpy(chosen.astype(np.int64)))] if chosen.dtype.kind in "iu" else []
    return tensor_digest([("inputs", inputs), ("labels", labels), ("n", torch.tensor(n)), *known])
