"""A bounded record of the weights that an average used: quartiles over tensors at evenly spaced steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_COLUMNS = ("min", "q25", "median", "q75", "max", "fallback")


class WeightLog:
    """Keeps at most ``2 * max_points`` steps and never reads the device before it is asked.

    When the record is full, every second point goes and the spacing doubles, so a run of any length is covered evenly.

    Args:
        max_points: at least so many points remain of a long run.

    Raises:
        ValueError: for less than 2 points.

    Example:
        >>> log = WeightLog(max_points=2)
        >>> for step in range(10):
        ...     log.add(torch.full((3,), step / 10), torch.tensor([True, False, False]))
        >>> log.series()["step"], log.share_of_fallbacks()
        ([1, 5, 9], 0.3333333333333333)
    """

    def __init__(self, max_points: int = 256) -> None:
        if max_points < 2:
            raise ValueError(f"`max_points` must be 2 or more, got {max_points!r}")
        self.max_points = max_points
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._calls = 0
        self._stride = 1
        self._steps: list[int] = []
        self._points: list[Tensor] = []
        self._weights = 0
        self._replaced: Tensor | None = None

    def add(self, alpha: Tensor, replaced: Tensor) -> None:
        """Record one update.

        Args:
            alpha: weights ``(tensors,)``.
            replaced: bool ``(tensors,)``, True where the fallback was used.
        """
        count = replaced.sum()
        self._replaced = count if self._replaced is None else self._replaced.to(count.device) + count
        self._weights += len(alpha)
        self._calls += 1
        if (self._calls - 1) % self._stride == 0:
            if len(self._steps) >= 2 * self.max_points:
                self._steps, self._points, self._stride = self._steps[::2], self._points[::2], 2 * self._stride
                if (self._calls - 1) % self._stride:
                    return
            ordered = alpha.sort().values
            last = len(ordered) - 1
            picked = ordered[[0, round(last / 4), round(last / 2), round(3 * last / 4), last]]
            self._steps.append(self._calls)
            self._points.append(torch.cat([picked.float(), replaced.float().mean().reshape(1)]))

    def share_of_fallbacks(self) -> float | None:
        """Fraction of all weights so far that were the fallback; None before the first. Near 1 means a fixed decay."""
        return None if self._replaced is None else float(self._replaced) / self._weights

    def series(self) -> dict[str, list[Any]]:
        """The points as plain lists: ``step`` (from 1), order statistics over tensors, and the share of fallbacks."""
        table = torch.stack([p.cpu() for p in self._points]).tolist() if self._points else []
        columns = {name: [row[i] for row in table] for i, name in enumerate(_COLUMNS)}
        return {"step": list(self._steps), **columns}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        return {
            "calls": self._calls,
            "stride": self._stride,
            "steps": list(self._steps),
            "points": torch.stack([p.cpu() for p in self._points]) if self._points else torch.empty(0, len(_COLUMNS)),
            "weights": self._weights,
            "replaced": None if self._replaced is None else int(self._replaced),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        self._calls, self._stride, self._weights = state["calls"], state["stride"], state["weights"]
        self._steps, self._points = list(state["steps"]), list(state["points"].unbind())
        self._replaced = None if state["replaced"] is None else torch.tensor(state["replaced"])
