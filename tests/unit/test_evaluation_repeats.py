"""Averages, pass@k and pass^k over several samples a question are what their definitions say, and their intervals hold."""

from __future__ import annotations

from dataclasses import astuple
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, bootstrap

from research_rl.errors import ConfigError, DataError
from research_rl.evaluation import intervals
from research_rl.evaluation.intervals import interval, nested
from research_rl.evaluation.repeats import by_question, pass_all_k, pass_at_k, summarise_repeats
from tests.results import lost, played

COUNTS = st.integers(1, 8).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n), st.integers(1, n)))


def test_worked_by_hand() -> None:
    # n = 5, c = 2: C(3, 3) / C(5, 3) = 1 / 10 choices of three are all wrong, C(2, 2) / C(5, 2) = 1 / 10 choices of two all right.
    assert pass_at_k(2, 5, 3) == pytest.approx(0.9) and pass_all_k(2, 5, 2) == pytest.approx(0.1)
    assert pass_at_k(2, 5, 1) == pytest.approx(0.4) and pass_all_k(2, 5, 1) == pytest.approx(0.4)
    assert pass_at_k(2, 5, 4) == 1.0 and pass_all_k(2, 5, 3) == 0.0


@given(COUNTS)
def test_both_are_shares_among_all_choices_of_k_samples(counts: tuple[int, int, int]) -> None:
    right, samples, k = counts
    choices = list(combinations([True] * right + [False] * (samples - right), k))
    assert pass_at_k(right, samples, k) == pytest.approx(sum(map(any, choices)) / len(choices))
    assert pass_all_k(right, samples, k) == pytest.approx(sum(map(all, choices)) / len(choices))


@given(st.floats(0, 1), st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_both_are_unbiased(chance: float, sizes: tuple[int, int]) -> None:
    samples, k = sizes
    weights = [comb(samples, right) * chance**right * (1 - chance) ** (samples - right) for right in range(samples + 1)]
    expected = [sum(w * of(right, samples, k) for right, w in enumerate(weights)) for of in (pass_at_k, pass_all_k)]
    assert expected == pytest.approx([1 - (1 - chance) ** k, chance**k])


def test_a_k_that_the_samples_do_not_allow_is_refused() -> None:
    for k in (0, 5):
        with pytest.raises(ConfigError, match=f"k={k} is not between 1 and the 4 samples"):
            pass_at_k(1, 4, k)
    with pytest.raises(DataError, match="5 right samples of 4"):
        pass_all_k(5, 4, 1)


def test_the_samples_of_one_question_are_drawn_as_scipy_draws_them() -> None:
    values = np.random.default_rng(5).exponential(1.0, 40)
    ours = nested([values.tolist()], 6000, 1)
    theirs = bootstrap((values,), np.mean, n_resamples=6000, method="percentile", rng=np.random.default_rng(2)).confidence_interval
    width = theirs.high - theirs.low
    assert (ours.mean, ours.n) == (pytest.approx(values.mean()), 1)
    assert ours.low == pytest.approx(theirs.low, abs=0.07 * width) and ours.high == pytest.approx(theirs.high, abs=0.07 * width)


def test_the_width_adds_what_varies_between_questions_to_what_varies_within() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(0, 0.5, (300, 1)) + rng.normal(0, 1.0, (300, 4))
    # Var = (variance of the means + mean variance within / samples) / questions
    variance = (values.mean(axis=1).var() + values.var(axis=1).mean() / 4) / 300
    estimate = nested(values.tolist(), 4000, 1)
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.07)
    one_level = interval(values.mean(axis=1).tolist(), 4000, 1)
    assert estimate.high - estimate.low > 1.1 * (one_level.high - one_level.low)


def test_samples_that_never_differ_leave_the_interval_of_the_questions() -> None:
    values = np.random.default_rng(1).random(60).tolist()
    for samples in (1, 5):
        repeated, single = nested([[value] * samples for value in values], 500, 1, bounded=True), interval(values, 500, 1, bounded=True)
        # Sums in another order differ in the last digit.
        assert astuple(repeated) == pytest.approx(astuple(single), rel=1e-12)


def test_few_failures_have_the_exact_interval_of_the_questions() -> None:
    estimate = nested([[1.0, 1.0]] * 18 + [[1.0, 0.0]] * 2, 500, 1, bounded=True)
    exact = binomtest(19, 20).proportion_ci(0.95, "exact")
    assert (estimate.mean, estimate.low, estimate.high) == (0.95, pytest.approx(exact.low), pytest.approx(exact.high))


def test_questions_with_fewer_samples_are_drawn_from_their_own_alone() -> None:
    estimate = nested([[0.9, 1.0, 1.0], [1.0]] * 20, 500, 1)
    assert estimate.mean == pytest.approx((2.9 / 3 + 1) / 2)
    assert 0.9 <= estimate.low < estimate.mean < estimate.high <= 1.0
    with pytest.raises(ValueError, match="no sample"):
        nested([[1.0], []], 100, 1)
    assert nested([], 100, 1).n == 0


def test_equal_seeds_give_equal_intervals_and_blocks_every_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = np.random.default_rng(1).random((30, 3)).tolist()
    assert nested(samples, 500, 3) == nested(samples, 500, 3) != nested(samples, 500, 4)
    at_once = nested(samples, 3000, 3)
    monkeypatch.setattr(intervals, "_CELLS", 700)
    assert intervals._nested_means(samples, 501, 1).shape == (501,)
    assert nested(samples, 3000, 3).low == pytest.approx(at_once.low, abs=0.1 * (at_once.high - at_once.low))


def test_the_interval_covers_the_mean_of_a_policy() -> None:
    rng, held = np.random.default_rng(8), 0
    for _ in range(200):
        chances = rng.beta(2, 2, 60)
        samples = (rng.random((60, 4)) < chances[:, None]).astype(float)
        estimate = nested(samples.tolist(), 300, 1, bounded=True)
        held += estimate.low <= 0.5 <= estimate.high
    assert 0.93 <= held / 200 <= 1.0


def test_repeats_of_an_evaluation_are_summarised_by_question() -> None:
    answers = {0: ["Ada", "Ada", "Ada", "Ada"], 1: ["Ada", "Bob", "Bob", "Bob"], 2: ["Bob", "Bob", "Bob"]}
    results = [played(row, answer) for row, given_ in answers.items() for answer in given_]
    results = [*results[::2], *results[1::2], lost(2)]
    assert [len(samples) for samples in by_question(results)] == [4, 4, 4]
    summary = summarise_repeats(results, [1, 2, 4], 300, 1)
    assert (summary["questions"], summary["samples"]) == (3, {"fewest": 4, "most": 4})
    # By question c = 4, 1 and 0 of n = 4: the sample whose episode was lost counts as a wrong one.
    assert summary["average"]["em"]["mean"] == pytest.approx((1 + 1 / 4) / 3, abs=1e-6)
    assert [summary["pass@k"][k]["mean"] for k in (1, 2, 4)] == pytest.approx([1.25 / 3, 1.5 / 3, 2 / 3], abs=1e-6)
    assert [summary["pass^k"][k]["mean"] for k in (1, 2, 4)] == pytest.approx([1.25 / 3, 1 / 3, 1 / 3], abs=1e-6)
    assert "first_answer_search" not in summary["average"] and summary["average"]["searches"]["mean"] == 0.0
    with pytest.raises(ConfigError, match="k=5 is not between 1 and the 4 samples"):
        summarise_repeats(results, [5], 300, 1)
