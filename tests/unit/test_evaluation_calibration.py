"""Calibration errors and the Brier score are what their definitions say, for any number of pairs and in any order."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import sqeuclidean
from scipy.stats import binned_statistic

from research_rl.errors import ConfigError, DataError
from research_rl.evaluation.calibration import Bin, calibrate

# Few distinct confidences, so that ties occur.
PAIRS = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.5, 0.75, 1.0]) | st.floats(0, 1), st.booleans()), min_size=1, max_size=60)


def test_worked_by_hand() -> None:
    # Two bins of two: confidence 0.2 and 0.4, one right: gap 0.5 - 0.3 = 0.2; confidence 0.7 and 0.9, one right: gap 0.5 - 0.8 = -0.3.
    # Expected error (0.2 + 0.3) / 2 = 0.25; rms sqrt((0.04 + 0.09) / 2) = sqrt(0.065).
    # Brier ((0.4 - 1)^2 + (0.9 - 1)^2 + 0.2^2 + 0.7^2) / 4 = (0.36 + 0.01 + 0.04 + 0.49) / 4 = 0.225.
    measured = calibrate([(0.4, True), (0.9, True), (0.2, False), (0.7, False)], bins=2)
    assert (measured.expected_error, measured.rms_error) == pytest.approx((0.25, 0.065**0.5))
    assert (measured.brier, measured.n) == (pytest.approx(0.225), 4)
    assert measured.bins == (Bin(pytest.approx(0.3), 0.5, 2), Bin(pytest.approx(0.8), 0.5, 2))
    assert json.loads(json.dumps(measured.to_json()))["bins"][1]["n"] == 2


@pytest.mark.parametrize(("count", "bins"), [(100, 10), (103, 10), (40, 7)])
def test_errors_and_brier_score_are_those_of_scipys_bins(count: int, bins: int) -> None:
    rng = np.random.default_rng(count)
    confidence = rng.permutation(np.linspace(0.02, 0.99, count))
    right = rng.random(count) < confidence**2
    # Edges in the middle between neighbours: the first count % bins bins hold one more, as numpy.array_split cuts.
    ends = np.cumsum([len(part) for part in np.array_split(np.arange(count), bins)])[:-1]
    ordered = np.sort(confidence)
    edges = [0.0, *((ordered[ends - 1] + ordered[ends]) / 2), 1.0]
    of = {name: binned_statistic(confidence, values, name, edges).statistic for name, values in (("count", right), ("mean", right))}
    gaps = of["mean"] - binned_statistic(confidence, confidence, "mean", edges).statistic
    measured = calibrate(list(zip(confidence.tolist(), right.tolist(), strict=True)), bins)
    assert measured.expected_error == pytest.approx(float(np.average(np.abs(gaps), weights=of["count"])))
    assert measured.rms_error == pytest.approx(float(np.average(gaps**2, weights=of["count"])) ** 0.5)
    assert measured.brier == pytest.approx(sqeuclidean(confidence, right.astype(float)) / count)


def test_the_last_bin_counts_and_few_pairs_too() -> None:
    # Twenty bins of one: all gaps are 0 but the last, |0 - 1| / 20.
    pairs = [(0.0, False)] * 19 + [(1.0, False)]
    assert calibrate(pairs, bins=20).expected_error == pytest.approx(1 / 20)
    # 25 pairs in 10 bins: five of three and five of two, none dropped.
    assert sorted(b.n for b in calibrate([(n / 25, True) for n in range(25)]).bins) == [2] * 5 + [3] * 5
    assert calibrate([(0.25, True)]).expected_error == 0.75


@pytest.mark.parametrize("right", [0, 9, 10])
def test_equal_confidences_are_judged_together(right: int) -> None:
    measured = calibrate([(0.9, n < right) for n in range(10)])
    assert (measured.expected_error, measured.rms_error) == pytest.approx((abs(right / 10 - 0.9),) * 2)


@given(PAIRS, st.integers(1, 30), st.randoms())
def test_the_order_of_pairs_decides_nothing(pairs: list[tuple[float, bool]], bins: int, order: random.Random) -> None:
    shuffled = order.sample(pairs, len(pairs))
    first, second = calibrate(pairs, bins), calibrate(shuffled, bins)
    assert (first.expected_error, first.rms_error, first.brier) == pytest.approx(
        (second.expected_error, second.rms_error, second.brier), abs=1e-9
    )


@given(PAIRS, st.integers(1, 30))
def test_every_pair_is_in_one_bin_of_nearly_equal_count(pairs: list[tuple[float, bool]], bins: int) -> None:
    measured = calibrate(pairs, bins)
    counts = [b.n for b in measured.bins]
    assert sum(counts) == measured.n == len(pairs) and len(counts) == min(bins, len(pairs)) and max(counts) - min(counts) <= 1
    confidences = [b.confidence for b in measured.bins]
    assert confidences == pytest.approx(sorted(confidences))
    assert sum(b.right * b.n for b in measured.bins) == pytest.approx(sum(right for _, right in pairs))


@given(PAIRS, st.integers(1, 30))
def test_the_scores_bound_each_other(pairs: list[tuple[float, bool]], bins: int) -> None:
    measured, whole = calibrate(pairs, bins), calibrate(pairs, 1)
    gap = abs(sum(c for c, _ in pairs) - sum(r for _, r in pairs)) / len(pairs)
    assert (whole.expected_error, whole.rms_error) == pytest.approx((gap, gap), abs=1e-9)
    assert whole.expected_error <= measured.expected_error + 1e-9 <= measured.rms_error + 2e-9 <= 1 + 3e-9
    assert measured.rms_error**2 <= measured.brier + 1e-9


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(DataError, match="confidence 95 of pair 2 is not between 0 and 1; divide percentages by 100"):
        calibrate([(0.5, True), (95, True)])
    with pytest.raises(DataError, match="confidence nan of pair 1"):
        calibrate([(float("nan"), True)])
    with pytest.raises(DataError, match="0 answers with a confidence"):
        calibrate([])
    with pytest.raises(ConfigError, match="bins=0, at least 1"):
        calibrate([(0.5, True)], bins=0)
