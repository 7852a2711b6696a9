"""Seeds: every random choice of a stream is a function of a few named integers, never of a global generator."""

from __future__ import annotations

import random
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

# what a number is drawn for; part of every seed, so that equal seeds do not give related draws
CLASS_ORDER, SPLIT, SAMPLE_ORDER, IMAGE, SHOTS, MIXING, SCENE = range(1, 8)


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64: turns counters into independent random words, the same on every machine and for every batch."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.uint64] = values ^ (values >> np.uint64(31))
    return mixed


def words(*parts: int | NDArray[np.int64]) -> NDArray[np.uint64]:
    """One 64-bit word per row of the broadcast ``parts``; scalars give an array of length 1.

    Example:
        >>> bool(words(1, np.arange(3))[2] == words(1, 2)[0])
        True
    """
    word = np.zeros(1, np.uint64)
    for part in parts:
        word = mix(word ^ np.atleast_1d(np.asarray(part, np.int64)).astype(np.uint64))
    return word


def generator(*parts: int) -> np.random.Generator:
    """A NumPy generator that depends on ``parts`` alone."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(parts)))


def check_seed(name: str, seed: Any) -> int:
    """``seed`` as an int of 0 or more.

    Raises:
        ValueError: naming the argument.
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"`{name}` must be an integer of 0 or more, got {seed!r}")
    return int(seed)


def spread_seed(
    seed: int | None, order_seed: int | None, data_seed: int | None, *, fixed_order: bool
) -> tuple[int | None, int | None]:
    """Order seed and data seed: ``seed`` where they are not given; an order that is given itself takes none.

    Raises:
        ValueError: for a negative ``seed``, or another thing.

    Example:
        >>> spread_seed(3, None, 5, fixed_order=False), spread_seed(3, None, None, fixed_order=True)
        ((3, 5), (None, 3))
    """
    if seed is None:
        return order_seed, data_seed
    check_seed("seed", seed)
    if order_seed is None and not fixed_order:
        order_seed = seed
    return order_seed, seed if data_seed is None else data_seed


class ForkedRandomness:
    """Inside the block the CPU generators of torch, NumPy and Python may be seeded; after it they are as before."""

    def __enter__(self) -> ForkedRandomness:
        self._states = torch.get_rng_state(), np.random.get_state(), random.getstate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.set_rng_state(self._states[0])
        np.random.set_state(self._states[1])
        random.setstate(self._states[2])

    @staticmethod
    def seed(word: int) -> None:
        """Seed the three generators; ``word`` is an unsigned 64-bit integer."""
        torch.default_generator.manual_seed(word & 0x7FFFFFFFFFFFFFFF)  # torch.manual_seed would reseed CUDA as well
        np.random.seed(word & 0xFFFFFFFF)
        random.seed(word)
