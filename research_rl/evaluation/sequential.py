"""Evidence about the mean of values between -1 and 1 that may be looked at after every value. Knows arrays; knows no question.

A player starts with a capital of 1 and stakes on every value, at odds that gain nothing on average as long as the mean of the next value,
given those before it, is at most `bound`. The capital is then an e-process: it reaches 1 / alpha, at whatever time, with probability at
most alpha (Ville 1939). Nothing is assumed but the range of the values.
Source: Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting (JRSS B 2024): the one-sided capitals whose pair is
the hedged capital of Theorem 3. Deviations: (1) values lie in [-1, 1] instead of [0, 1]; (2) the stakes are constant and their capitals are
averaged, instead of predictable plug-in stakes, so that the capital does not depend on the order of the values before it;
(3) the capital falls as `bound` rises, so the limits of the mean are found by halving instead of on a grid.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["NEVER", "first_shown", "largest_capital", "limits", "log_capital"]

Values = NDArray[np.float64]

NEVER = math.inf
"""In place of a number of values: the evidence was never enough."""
_STAKES = (0.03, 0.07, 0.16, 0.36, 0.8)
"""Shares of the largest stake that cannot lose all. The capital grows fastest near mean / variance; these cover 0.02 to 1 within a factor
of 1.6, from small gains among many changed answers to gains among few."""
_HALVINGS = 24
"""Leaves the limits exact to 1.2e-7, finer than they are reported."""
_LARGEST = 690.0
"""Logarithm of the largest capital that is reported; JSON has no number for much more."""


def log_capital(values: Values, bound: float) -> Values:
    """Return, after each value, the logarithm of the capital staked against a mean of at most `bound`; axes (..., values) as given.

    Evidence against a mean of at least `bound` is `log_capital(-values, -bound)`. Raises ValueError for a bound of -1 or less or above 1
    and for values out of range.
    """
    if not -1 < bound <= 1:
        raise ValueError(f"bound={bound:g} is not above -1 and at most 1; means outside that range need no evidence")
    if values.size and not (np.abs(values) <= 1).all():
        raise ValueError(f"values from {values.min():g} to {values.max():g} are not all between -1 and 1; scale them first")
    gains = (values - bound) / (1 + bound)
    # The mean of the stakes' capitals, by their logarithms: after some thousand gains the capitals themselves overflow.
    total = np.full(values.shape, -np.inf)
    for stake in _STAKES:
        total = np.logaddexp(total, np.cumsum(np.log1p(stake * gains), axis=-1))
    return total - math.log(len(_STAKES))


def first_shown(values: Values, bound: float, alpha: float) -> Any:
    """Return the number of values after which a mean above `bound` is shown, NEVER where it is not; axes (...) for values (..., values).

    Once shown, it stays so: where the mean is at most `bound`, this is ever finite with probability at most `alpha`.
    """
    shown = np.logical_or.accumulate(log_capital(values, bound) >= -math.log(alpha), axis=-1)
    # What is shown once stays shown, so the places where it is are the last ones, and their number tells the first.
    after = values.shape[-1] + 1 - shown.sum(axis=-1)
    return np.where(after <= values.shape[-1], after, NEVER)


def largest_capital(values: Values, bound: float) -> float:
    """Return the largest capital so far that was staked against a mean of at most `bound`; 1 is no evidence, 1 / alpha shows it."""
    return math.exp(min(_LARGEST, max(0.0, float(log_capital(values, bound).max(initial=0.0)))))


def limits(values: Values, alpha: float) -> tuple[float, float]:
    """Return limits of the mean, from `values` of one axis, that hold at every look at once.

    Each is wrong with probability at most `alpha`, so both hold with probability at least 1 - 2 alpha. They are the bounds that
    `first_shown` shows, and so never contradict a decision made by it.
    """
    return _lower(values, alpha), -_lower(-values, alpha)


def _lower(values: Values, alpha: float) -> float:
    low, high = -1.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if first_shown(values, middle, alpha) < NEVER:
            low = middle
        else:
            high = middle
    return low
