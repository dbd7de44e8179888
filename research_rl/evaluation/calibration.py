"""Whether stated confidence is earned: calibration errors and the Brier score. Knows pairs of numbers; knows no result.

    expected error  sum over bins of n_bin / n * |right - confidence|              (ECE, arXiv 1706.04599)
    rms error       square root of the sum of n_bin / n * (right - confidence)^2   (as BrowseComp's calibration error)
    Brier score     mean of (confidence - right)^2                                 (Brier 1950)

`right` and `confidence` are a bin's means. Bins hold equal counts (Nguyen and O'Connor 2015), as nearly as the number allows, in the
order of confidence, and every bin counts, however few pairs there are. Bins of few pairs make both errors too large: compare values
of equal numbers of pairs and bins. The Brier score has no bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from research_rl.errors import ConfigError, DataError

__all__ = ["BINS", "Bin", "Calibration", "calibrate"]

BINS = 10

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Bin:
    """`n` pairs of neighbouring confidence: its mean, and the share of right answers."""

    confidence: float
    right: float
    n: int


@dataclass(frozen=True)
class Calibration:
    """Calibration of `n` answers; all three scores lie between 0 and 1, and 0 is best."""

    expected_error: float
    rms_error: float
    brier: float
    n: int
    bins: tuple[Bin, ...]

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return asdict(self)


def calibrate(pairs: Sequence[tuple[float, bool]], bins: int = BINS) -> Calibration:
    """Return the calibration of (confidence from 0 to 1, right) pairs over `bins` bins, one a pair where there are fewer pairs.

    Pairs of equal confidence share their right answers evenly, so that the order of `pairs` decides nothing. Raises DataError without
    a pair and for a confidence out of range, ConfigError for less than one bin.
    """
    _check(pairs, bins)
    confidence, right = np.array([c for c, _ in pairs], dtype=np.float64), np.array([r for _, r in pairs], dtype=np.float64)
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(np.stack([confidence, _shared(confidence, right)])[:, order], min(bins, len(pairs)), axis=1)
    counted = tuple(Bin(float(part[0].mean()), float(part[1].mean()), part.shape[1]) for part in parts)
    gaps, weights = np.array([b.right - b.confidence for b in counted]), np.array([b.n / len(pairs) for b in counted])
    return Calibration(
        expected_error=float((weights * np.abs(gaps)).sum()),
        rms_error=float(np.sqrt((weights * gaps**2).sum())),
        brier=float(((confidence - right) ** 2).mean()),
        n=len(pairs),
        bins=counted,
    )


def _shared(confidence: Values, right: Values) -> Values:
    """Return for each pair the share of right answers among those of its confidence."""
    _, group, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    return (np.bincount(group, weights=right) / counts)[group]


def _check(pairs: Sequence[tuple[float, bool]], bins: int) -> None:
    if bins < 1:
        raise ConfigError(f"bins={bins}, at least 1; raise it")
    if not pairs:
        # Zeros would read as a perfect calibration.
        raise DataError("0 answers with a confidence, at least 1 is needed; evaluate with a prompt that asks for one")
    for number, (confidence, _) in enumerate(pairs, 1):
        if not 0 <= confidence <= 1:
            raise DataError(f"confidence {confidence:g} of pair {number} is not between 0 and 1; divide percentages by 100")
