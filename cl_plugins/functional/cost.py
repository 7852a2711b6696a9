"""Cost of a stream: parameters, stored samples, operations (Diaz-Rodriguez et al. 2018, arXiv:1810.13166).

The ratios saturate at 1, so log the raw numbers as well.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._matrix import as_double


def _series(name: str, values: Tensor | Sequence[float]) -> Tensor:
    series = as_double(values)
    if series.shape[-1:] in ((), (0,)) or bool((series < 0).any()):
        raise ValueError(f"`{name}` must hold a number of at least 0 per task, got {values!r}")
    return series


def model_size_efficiency(sizes: Tensor | Sequence[float]) -> Tensor:
    """``min(1, mean_i size_1 / size_i)`` (MS), in [0, 1], higher is better.

    Args:
        sizes: parameters after each task ``(..., tasks)``.

    Example:
        >>> model_size_efficiency([100, 200, 400])
        tensor(0.5833, dtype=torch.float64)
    """
    series = _series("sizes", sizes)
    return (series[..., :1] / series).mean(-1).clamp(max=1.0)


def sample_storage_efficiency(stored: Tensor | Sequence[float], total: float) -> Tensor:
    """``1 - min(1, mean_i stored_i / total)`` (SSS), in [0, 1], higher is better.

    Args:
        stored: samples in memory after each task ``(..., tasks)``.
        total: training samples of the whole stream, above 0.

    Example:
        >>> sample_storage_efficiency([10, 30], total=100)
        tensor(0.8000, dtype=torch.float64)
    """
    if total <= 0:
        raise ValueError(f"`total` must be above 0, got {total!r}")
    return 1.0 - (_series("stored", stored) / total).mean(-1).clamp(max=1.0)


def compute_efficiency(
    operations: Tensor | Sequence[float], pass_operations: Tensor | Sequence[float], eps: float = 1.0
) -> Tensor:
    """``min(1, mean_i eps * up_i / (1 + ops_i))`` (CE), in [0, 1], higher is better.

    Args:
        operations: operations to learn each task ``(..., tasks)``.
        pass_operations: operations of one forward and backward pass over the task's samples ``(..., tasks)``.
        eps: scale, above 1 to make small shares visible.

    Example:
        >>> compute_efficiency([99, 199], [50, 50])
        tensor(0.3750, dtype=torch.float64)
    """
    once, needed = _series("pass_operations", pass_operations), _series("operations", operations)
    return (eps * once / (1.0 + needed)).mean(-1).clamp(max=1.0)


def parameter_growth(sizes: Tensor | Sequence[float]) -> Tensor:
    """Parameters after the last task over those after the first, at least 0, lower is better.

    Example:
        >>> parameter_growth([100, 150, 250])
        tensor(2.5000, dtype=torch.float64)
    """
    series = _series("sizes", sizes)
    return series[..., -1] / series[..., 0]
