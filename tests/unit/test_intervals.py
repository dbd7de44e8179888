"""The intervals cover what they claim, are reproducible, and pairs are kept together."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap

from research_rl.evaluation.intervals import FEWEST, interval, paired


def test_a_constant_has_no_width() -> None:
    estimate = interval([0.5] * 30, 500, 1)
    assert (estimate.mean, estimate.low, estimate.high, estimate.n) == (0.5, 0.5, 0.5, 30)


def test_nothing_gives_nothing() -> None:
    assert interval([], 500, 1).n == paired([], [], 500, 1).n == 0


def test_equal_seeds_give_equal_intervals() -> None:
    values = np.random.default_rng(0).random(50).tolist()
    assert interval(values, 500, 3) == interval(values, 500, 3)
    assert interval(values, 500, 3) != interval(values, 500, 4)


def coverage(share: float, count: int, trials: int) -> float:
    """Return how often the interval of `count` answers, right with probability `share`, holds that share."""
    rng = np.random.default_rng(7)
    estimates = [interval((rng.random(count) < share).astype(float).tolist(), 200, seed, bounded=True) for seed in range(trials)]
    return sum(estimate.low <= share <= estimate.high for estimate in estimates) / trials


@pytest.mark.parametrize(("share", "count"), [(0.95, 20), (0.05, 20), (0.99, 40), (0.3, 200)])
def test_the_interval_of_a_share_covers_it_also_for_few_questions_and_near_1(share: float, count: int) -> None:
    assert 0.93 <= coverage(share, count, 400) <= 1.0


def test_the_interval_of_scores_covers_their_mean_when_most_are_perfect() -> None:
    rng = np.random.default_rng(3)
    drawn = [np.where(rng.random(20) < 0.95, 1.0, rng.random(20)).tolist() for _ in range(300)]
    estimates = [interval(values, 200, 1, bounded=True) for values in drawn]
    assert sum(estimate.low <= 0.975 <= estimate.high for estimate in estimates) / 300 >= 0.9


def test_twenty_right_answers_of_twenty_are_no_proof_of_perfection() -> None:
    estimate = interval([1.0] * 20, 500, 1, bounded=True)
    assert (estimate.mean, estimate.high) == (1.0, 1.0)
    assert estimate.low == pytest.approx(binomtest(20, 20).proportion_ci(0.95, "exact").low)


def test_scores_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="values from 0 to 2 are not all between 0 and 1"):
        interval([0.0, 2.0], 200, 1, bounded=True)


@pytest.mark.parametrize("count", [400, 2500])
def test_the_width_is_that_of_the_normal_approximation(count: int) -> None:
    values = np.random.default_rng(1).normal(0.0, 1.0, count)
    estimate = interval(values.tolist(), 3000, 1)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * values.std() / count**0.5, rel=0.08)


@pytest.mark.parametrize("count", [12, 60, 499, 501, 3000])
def test_a_mean_has_scipys_bca_interval_for_any_number_of_values(count: int) -> None:
    # Skewed, so that the percentile interval is another one.
    values = np.random.default_rng(count).exponential(size=count)
    settings: dict[str, Any] = {"n_resamples": 800, "batch": 1000}
    expected, percentile = (
        bootstrap((values,), np.mean, method=method, rng=np.random.default_rng(4), **settings).confidence_interval
        for method in ("BCa", "percentile")
    )
    estimate = interval(values.tolist(), 800, 4)
    assert (estimate.low, estimate.high) == pytest.approx(expected, rel=1e-12)
    assert abs(estimate.high - percentile.high) > 1e-6
    difference = paired([0.0] * count, values.tolist(), 800, 4)
    assert (difference.low, difference.high) == pytest.approx(expected, rel=1e-12)


def test_where_bca_is_undefined_the_interval_is_that_of_percentiles() -> None:
    # Three resamples of values of which one is far away: often all of their means lie on one side of that of the values.
    values = [0.0] * 40 + [1.0]
    undefined = [seed for seed in range(200) if np.isnan(scipys(values, seed, "BCa")).any()]
    assert undefined
    for seed in undefined[:5]:
        estimate = interval(values, 3, seed)
        assert (estimate.low, estimate.high) == pytest.approx(scipys(values, seed, "percentile"))


def scipys(values: list[float], seed: int, method: str) -> tuple[float, float]:
    """Return SciPy's interval of three resamples."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = bootstrap((values,), np.mean, n_resamples=3, method=method, rng=np.random.default_rng(seed))
    return found.confidence_interval.low, found.confidence_interval.high


def test_many_values_are_drawn_in_blocks_with_the_same_result_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random(1000).tolist()
    at_once = interval(values, 300, 1)
    monkeypatch.setattr("research_rl.evaluation.intervals._CELLS", 7000)
    assert interval(values, 300, 1) == at_once


def test_pairs_stay_together() -> None:
    before = np.random.default_rng(2).random(400)
    difference = paired(before.tolist(), (before + 0.01).tolist(), 500, 1)
    assert difference.low == pytest.approx(0.01) and difference.high == pytest.approx(0.01)
    assert (difference.wins, difference.losses, difference.ties, difference.n) == (400, 0, 0, 400)
    assert difference.significant


def test_wins_losses_and_ties_are_counted() -> None:
    difference = paired([0, 0, 1, 1], [0, 1, 0, 1], 500, 1)
    assert (difference.wins, difference.losses, difference.ties) == (1, 1, 2)
    assert not difference.significant


@pytest.mark.parametrize("count", [1, FEWEST - 1])
def test_fewer_than_ten_questions_decide_nothing(count: int) -> None:
    difference = paired([0.0] * count, [1.0] * count, 500, 1, bounded=True)
    assert not difference.decides and not difference.significant


def test_ten_questions_that_all_improve_decide() -> None:
    assert paired([0.0] * FEWEST, [1.0] * FEWEST, 500, 1, bounded=True).significant


@pytest.mark.parametrize(("wins", "losses", "pairs"), [(4, 0, 20), (4, 0, 1000), (5, 0, 50), (6, 0, 50), (8, 1, 10), (7, 2, 100)])
def test_few_differing_pairs_are_judged_as_by_mcnemars_exact_test(wins: int, losses: int, pairs: int) -> None:
    before = [0.0] * wins + [1.0] * (pairs - wins)
    after = [1.0] * wins + [0.0] * losses + [1.0] * (pairs - wins - losses)
    difference = paired(before, after, 500, 1, bounded=True)
    assert difference.mean == pytest.approx((wins - losses) / pairs)
    assert difference.low <= difference.mean <= difference.high
    assert difference.significant == (binomtest(wins, wins + losses).pvalue < 0.05)


def test_equal_answers_to_few_questions_do_not_prove_equal_policies() -> None:
    few, many = (paired([1.0] * count, [1.0] * count, 200, 1, bounded=True) for count in (20, 2000))
    assert few.low < -0.1 and few.high > 0.1 and many.high < 0.01


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 values before, 1 after"):
        paired([0, 1], [1], 100, 1)
