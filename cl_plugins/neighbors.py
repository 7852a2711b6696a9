"""Distances to the K-th nearest neighbor: how dense a place is, without an index structure."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 2**21  # distances held at a time: 8 MB in float32


def full_precision(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def normalize_rows(features: Tensor) -> Tensor:
    """Rows ``(rows, dim)`` at length 1; a zero row stays zero."""
    norms: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / norms.clamp_min(1e-12)


def kth_smallest(values: Tensor, k: int) -> Tensor:
    """The ``k``-th smallest entry of each row ``(rows, columns)``."""
    nearest: Tensor = values.topk(k, dim=1, largest=False, sorted=False).values
    return nearest.amax(1)


def kth_neighbor_distance(queries: Tensor, points: Tensor, k: int) -> Tensor:
    """Squared L2 distance of each query to its ``k``-th nearest point, from chunked Gram products.

    Computed in float32 at least, also under autocast; never holds all pairs.

    Args:
        queries: ``(queries, dim)``.
        points: ``(points, dim)``.
        k: rank, from 1 for the nearest; a query that is itself a point counts as its own first neighbor.

    Returns:
        Distances ``(queries,)``.

    Raises:
        ValueError: if ``k`` is not in ``[1, points]``.
    """
    if not 1 <= k <= len(points):
        raise ValueError(f"`k` must be in [1, {len(points)}], the number of points, got {k!r}")
    with torch.autocast(queries.device.type, enabled=False), torch.no_grad():
        queries, points = full_precision(queries), full_precision(points)
        norms, result = points.square().sum(1), queries.square().sum(1)
        size = max(1, _CHUNK // len(points))
        for chunk, rows in zip(torch.split(queries, size), torch.split(result, size), strict=True):
            rows.add_(kth_smallest(torch.addmm(norms, chunk, points.T, alpha=-2.0), k))  # |p|^2 - 2 q.p
        return result.clamp_min_(0)


def boundary_samples(features: Tensor, neighbors: int, n_boundary: int) -> Tensor:
    """Indices of the ``n_boundary`` features whose direction lies in the least dense place, least dense first.

    Args:
        features: ``(samples, dim)``, at least one row.
        neighbors: rank of the neighbor that measures the density, the sample itself being the first.
        n_boundary: number of indices; all samples when there are fewer.
    """
    unit = normalize_rows(full_precision(features))
    distance = kth_neighbor_distance(unit, unit, min(neighbors, len(unit)))
    return distance.topk(min(n_boundary, len(unit))).indices
