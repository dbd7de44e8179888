"""Bootstrap intervals of means and of paired differences. Knows arrays of numbers; knows no question, no metric.

Source: percentile bootstrap (Efron 1979). Equal values, resamples and seed give equal intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Difference", "Estimate", "interval", "paired"]

_LEVEL = 0.95
_CELLS = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` values with its 95 % interval; all NaN-free, and all 0.0 for n = 0."""

    mean: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int]:
        """Return the four numbers, rounded to six places."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Difference:
    """Mean of after minus before over `n` pairs, its 95 % interval, and in how many pairs it rose, fell or stood."""

    mean: float
    low: float
    high: float
    wins: int
    losses: int
    ties: int
    n: int

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def to_json(self) -> dict[str, float | int]:
        """Return the seven numbers, rounded to six places."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


def interval(values: Sequence[float], resamples: int, seed: int) -> Estimate:
    """Return the mean of `values` with its percentile bootstrap interval."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return Estimate(0.0, 0.0, 0.0, 0)
    low, high = _percentiles(array, resamples, seed)
    return Estimate(float(array.mean()), low, high, int(array.size))


def paired(before: Sequence[float], after: Sequence[float], resamples: int, seed: int) -> Difference:
    """Return the mean difference of pairs with its interval; pairs, not values, are drawn again.

    Raises ValueError when the two differ in length.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} values before, {len(after)} after; a paired difference needs as many of each")
    delta = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    estimate = interval(delta.tolist(), resamples, seed)
    wins, losses = int((delta > 0).sum()), int((delta < 0).sum())
    return Difference(estimate.mean, estimate.low, estimate.high, wins, losses, estimate.n - wins - losses, estimate.n)


def _percentiles(values: NDArray[np.float64], resamples: int, seed: int) -> tuple[float, float]:
    """Draw in blocks, so that memory stays below 32 MB for any number of values."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS // values.size)
    means: list[NDArray[np.float64]] = []
    for start in range(0, resamples, rows):
        drawn = rng.integers(0, values.size, size=(min(rows, resamples - start), values.size))
        means.append(values[drawn].mean(axis=1))
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)
