"""95 % intervals of means and of paired differences. Knows arrays of numbers; knows no question, no metric.

Where values carry little information a bootstrap promises too much, so exact binomial intervals take its place: for values between 0
and 1 with fewer than `_FEW` successes or failures, and for pairs of which fewer than `_FEW` differ.
Sources: BCa bootstrap (Efron 1987); binomial interval (Clopper and Pearson 1934), with which few differing pairs are judged as by
McNemar's exact test. Equal values, resamples and seed give equal intervals.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEWEST", "Difference", "Estimate", "interval", "paired"]

FEWEST = 10
"""Pairs below which a difference decides nothing, however large it is."""
_LEVEL = 0.95
_FEW = 10
_BCA_MOST = 500
"""Values above which the percentile bootstrap is used: BCa leaves out each value once, which takes time with the square of them,
and the two agree there."""
# Numbers of eight bytes: the 32 MB of `_scipy`.
_CELLS = 4_000_000
# Differences below it come from rounding.
_NOISE = 1e-12

Values = NDArray[np.float64]
Interval = tuple[float, float]


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
    def decides(self) -> bool:
        """Whether there are pairs enough to decide anything."""
        return self.n >= FEWEST

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 0, with pairs enough to decide."""
        return self.decides and (self.low > 0 or self.high < 0)

    def to_json(self) -> dict[str, float | int]:
        """Return the seven numbers, rounded to six places."""
        return {name: round(value, 6) for name, value in asdict(self).items()}


def interval(values: Sequence[float], resamples: int, seed: int, *, bounded: bool = False) -> Estimate:
    """Return the mean of `values` with its interval; `bounded` values lie between 0 and 1, as shares and scores do.

    Raises ValueError when bounded values leave that range.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return Estimate(0.0, 0.0, 0.0, 0)
    if bounded and (array.min() < 0 or array.max() > 1):
        raise ValueError(f"values from {array.min():g} to {array.max():g} are not all between 0 and 1")
    low, high = _of_scores(array, resamples, seed) if bounded else _bootstrap(array, resamples, seed)
    return Estimate(float(array.mean()), low, high, int(array.size))


def paired(before: Sequence[float], after: Sequence[float], resamples: int, seed: int, *, bounded: bool = False) -> Difference:
    """Return the mean difference of pairs with its interval; pairs, not values, are drawn again. `bounded` as in `interval`.

    Raises ValueError when the two differ in length.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} values before, {len(after)} after; a paired difference needs as many of each")
    delta = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if delta.size == 0:
        return Difference(0.0, 0.0, 0.0, 0, 0, 0, 0)
    low, high = _of_differences(delta, resamples, seed, bounded)
    wins, losses = int((delta > 0).sum()), int((delta < 0).sum())
    return Difference(float(delta.mean()), low, high, wins, losses, delta.size - wins - losses, delta.size)


def _of_scores(values: Values, resamples: int, seed: int) -> Interval:
    """Scores that are all 0 or 1 have the binomial interval; of all scores with this mean and number, they vary most."""
    successes = float(values.sum())
    if bool(np.isin(values, (0.0, 1.0)).all()) or min(successes, values.size - successes) < _FEW:
        return _binomial(successes, values.size)
    return _bootstrap(values, resamples, seed)


def _of_differences(delta: Values, resamples: int, seed: int, bounded: bool) -> Interval:
    moved = delta[delta != 0]
    if moved.size == 0:
        if not bounded:
            return 0.0, 0.0
        # That no pair moved does not prove that none ever does: up to this share may only have gone unseen.
        unseen = _binomial(0.0, delta.size)[1]
        return -unseen, unseen
    # All pairs moved by as much: a bootstrap would find no width, as if nothing else could happen.
    if moved.size < _FEW or (bounded and np.ptp(delta) < _NOISE):
        return _of_few_differences(moved, delta.size)
    return _bootstrap(delta, resamples, seed)


def _of_few_differences(moved: Values, pairs: int) -> Interval:
    """Take the share of gains among the pairs that moved, weighted by how far, as binomial; then scale to all pairs."""
    distance = float(np.abs(moved).sum())
    gains = float(moved[moved > 0].sum()) / distance * moved.size
    low, high = _binomial(gains, moved.size)
    return (2 * low - 1) * distance / pairs, (2 * high - 1) * distance / pairs


def _binomial(successes: float, trials: int) -> Interval:
    """Return Clopper and Pearson's interval; `successes` may be the sum of scores between 0 and 1."""
    betaincinv: Any = import_module("scipy.special").betaincinv  # by name: the type checker would read the whole of SciPy
    # By rounding, a sum of scores may exceed their number.
    tail, failures = (1 - _LEVEL) / 2, max(0.0, trials - successes)
    low = float(betaincinv(successes, failures + 1, tail)) if successes > 0 else 0.0
    high = float(betaincinv(successes + 1, failures, 1 - tail)) if failures > 0 else 1.0
    return low, high


def _bootstrap(values: Values, resamples: int, seed: int) -> Interval:
    """Return SciPy's bootstrap interval of the mean; equal values have none, and leave no width."""
    if np.ptp(values) < _NOISE:
        return float(values.mean()), float(values.mean())
    low, high = _scipy(values, resamples, seed, "BCa" if values.size <= _BCA_MOST else "percentile")
    if np.isnan(low) or np.isnan(high):  # BCa is undefined where no resampled mean lies below that of the values
        return _scipy(values, resamples, seed, "percentile")
    return low, high


def _scipy(values: Values, resamples: int, seed: int, method: str) -> Interval:
    """Draw in blocks, so that memory stays below 32 MB for any number of values."""
    stats: Any = import_module("scipy.stats")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # said again by a NaN, which the caller reads
        result = stats.bootstrap(
            (values,),
            np.mean,
            n_resamples=resamples,
            batch=max(1, _CELLS // values.size),
            confidence_level=_LEVEL,
            method=method,
            rng=np.random.default_rng(seed),
        )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)
