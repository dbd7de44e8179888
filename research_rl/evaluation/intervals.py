"""95 % intervals of means, of paired differences and of repeated samples. Knows arrays of numbers; knows no question, no metric.

Where values carry little information a bootstrap promises too much, so exact binomial intervals take its place: for values between 0
and 1 with fewer than `_FEW` successes or failures, and for pairs of which fewer than `_FEW` differ.
Sources: BCa bootstrap (Efron 1987), for any number of values; binomial interval (Clopper and Pearson 1934), with which few differing pairs
are judged as by McNemar's exact test. Equal values, resamples and seed give equal intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEWEST", "Difference", "Estimate", "binomial", "interval", "nested", "paired"]

FEWEST = 10
"""Pairs below which a difference decides nothing, however large it is."""
_LEVEL = 0.95
_FEW = 10
# Numbers of eight bytes: the 32 MB of `_resampled`.
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


def nested(samples: Sequence[Sequence[float]], resamples: int, seed: int, *, bounded: bool = False) -> Estimate:
    """Return the mean of the questions' means with its interval; `samples` holds the values of each question, at least one.

    Questions are drawn again, and within each drawn one its samples (two-level bootstrap, percentiles). The spread of the questions'
    means holds the noise of their samples already, the second level adds it once more: with few samples a question the interval is
    somewhat too wide, and not too narrow. `n` counts questions. `bounded` as in `interval`.

    Raises ValueError for a question without a value.
    """
    if not all(map(len, samples)):
        raise ValueError("a question has no sample; leave out questions without one")
    means = [float(np.mean(values)) for values in samples]
    estimate = interval(means, resamples, seed, bounded=bounded)
    few = bounded and min(sum(means), len(means) - sum(means)) < _FEW
    # Where samples of a question never differ, drawing them again changes nothing; of few successes questions alone are counted.
    if few or all(len(set(values)) == 1 for values in samples):
        return estimate
    low, high = np.quantile(_nested_means(samples, resamples, seed), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Estimate(estimate.mean, float(low), float(high), estimate.n)


def _nested_means(samples: Sequence[Sequence[float]], resamples: int, seed: int) -> Values:
    """Return one mean a resample. Axes: R resamples, Q questions, S samples of a question, padded to the most of any."""
    rng, counts_Q = np.random.default_rng(seed), np.array([len(values) for values in samples])
    most = int(counts_Q.max())
    values_QS = np.array([[*values, *[0.0] * (most - len(values))] for values in samples], dtype=np.float64)

    def drawn(size: int) -> Values:
        questions_RQ = rng.integers(len(samples), size=(size, len(samples)))
        counts_RQ1 = counts_Q[questions_RQ][..., None]
        places_RQS = (rng.random((size, len(samples), most)) * counts_RQ1).astype(np.intp)
        chosen_RQS = values_QS[questions_RQ[..., None], places_RQS] * (np.arange(most) < counts_RQ1)
        return (chosen_RQS.sum(axis=2) / counts_RQ1[..., 0]).mean(axis=1)

    block = max(1, _CELLS // values_QS.size)
    return np.concatenate([drawn(min(block, resamples - start)) for start in range(0, resamples, block)])


def _of_scores(values: Values, resamples: int, seed: int) -> Interval:
    """Scores that are all 0 or 1 have the binomial interval; of all scores with this mean and number, they vary most."""
    successes = float(values.sum())
    if bool(np.isin(values, (0.0, 1.0)).all()) or min(successes, values.size - successes) < _FEW:
        return binomial(successes, values.size)
    return _bootstrap(values, resamples, seed)


def _of_differences(delta: Values, resamples: int, seed: int, bounded: bool) -> Interval:
    moved = delta[delta != 0]
    if moved.size == 0:
        if not bounded:
            return 0.0, 0.0
        # That no pair moved does not prove that none ever does: up to this share may only have gone unseen.
        unseen = binomial(0.0, delta.size)[1]
        return -unseen, unseen
    # All pairs moved by as much: a bootstrap would find no width, as if nothing else could happen.
    if moved.size < _FEW or (bounded and np.ptp(delta) < _NOISE):
        return _of_few_differences(moved, delta.size)
    return _bootstrap(delta, resamples, seed)


def _of_few_differences(moved: Values, pairs: int) -> Interval:
    """Take the share of gains among the pairs that moved, weighted by how far, as binomial; then scale to all pairs."""
    distance = float(np.abs(moved).sum())
    gains = float(moved[moved > 0].sum()) / distance * moved.size
    low, high = binomial(gains, moved.size)
    return (2 * low - 1) * distance / pairs, (2 * high - 1) * distance / pairs


def binomial(successes: float, trials: int) -> Interval:
    """Return Clopper and Pearson's interval of a share; `successes` may be the sum of scores between 0 and 1."""
    betaincinv: Any = import_module("scipy.special").betaincinv  # by name: the type checker would read the whole of SciPy
    # By rounding, a sum of scores may exceed their number.
    tail, failures = (1 - _LEVEL) / 2, max(0.0, trials - successes)
    low = float(betaincinv(successes, failures + 1, tail)) if successes > 0 else 0.0
    high = float(betaincinv(successes + 1, failures, 1 - tail)) if failures > 0 else 1.0
    return low, high


def _bootstrap(values: Values, resamples: int, seed: int) -> Interval:
    """Return the BCa interval of the mean; equal values have none, and leave no width."""
    if np.ptp(values) < _NOISE:
        return float(values.mean()), float(values.mean())
    means = _resampled(values, resamples, seed)
    low, high = np.quantile(means, _corrected(values, means))
    return float(low), float(high)


def _corrected(values: Values, means: Values) -> Interval:
    """Return which quantiles of the resampled means are the ends: those of the percentile interval, corrected for bias and skewness.

    Efron's acceleration comes of the means that leave out each value once. Such a mean is off by the value's own distance from the mean,
    divided by n - 1, so nothing need be left out.
    """
    special: Any = import_module("scipy.special")
    tail, mean, distances = (1 - _LEVEL) / 2, values.mean(), values - values.mean()
    # Means equal to that of the values count half: where values take few levels, many are equal.
    bias = float(special.ndtri(((means < mean).mean() + (means <= mean).mean()) / 2))
    if not np.isfinite(bias):  # no resampled mean lies below that of the values, or none above
        return tail, 1 - tail
    acceleration = float((distances**3).sum() / (6 * (distances**2).sum() ** 1.5))

    def end(share: float) -> float:
        moved = bias + float(special.ndtri(share))
        return float(special.ndtr(bias + moved / (1 - acceleration * moved)))

    return end(tail), end(1 - tail)


def _resampled(values: Values, resamples: int, seed: int) -> Values:
    """Return one mean a resample, drawn in blocks, so that memory stays below 32 MB for any number of values."""
    rng, block = np.random.default_rng(seed), max(1, _CELLS // values.size)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    return np.concatenate([values[rng.integers(values.size, size=(size, values.size))].mean(axis=1) for size in sizes])
