"""The intervals cover what they claim, are reproducible, and pairs are kept together."""

from __future__ import annotations

import numpy as np
import pytest

from research_rl.evaluation.statistics import interval, paired


def test_a_constant_has_no_width() -> None:
    found = interval([0.5] * 30, 500, 1)
    assert (found.mean, found.low, found.high, found.n) == (0.5, 0.5, 0.5, 30)


def test_nothing_gives_nothing() -> None:
    assert interval([], 500, 1).n == 0


def test_equal_seeds_give_equal_intervals() -> None:
    values = np.random.default_rng(0).random(50).tolist()
    assert interval(values, 500, 3) == interval(values, 500, 3)
    assert interval(values, 500, 3) != interval(values, 500, 4)


def test_the_interval_covers_the_true_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(7)
    hits = sum(
        found.low <= 0.3 <= found.high for found in (interval((rng.random(200) < 0.3).astype(float).tolist(), 400, s) for s in range(300))
    )
    assert 0.90 <= hits / 300 <= 0.985


def test_the_width_is_that_of_the_normal_approximation() -> None:
    values = np.random.default_rng(1).normal(0.0, 1.0, 2500)
    found = interval(values.tolist(), 4000, 1)
    assert found.high - found.low == pytest.approx(2 * 1.96 * values.std() / 50, rel=0.06)


def test_many_values_are_drawn_in_blocks_with_the_same_result_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random(1000).tolist()
    at_once = interval(values, 300, 1)
    monkeypatch.setattr("research_rl.evaluation.statistics._CELLS", 7000)
    assert interval(values, 300, 1) == at_once


def test_pairs_stay_together() -> None:
    before = np.random.default_rng(2).random(400)
    found = paired(before.tolist(), (before + 0.01).tolist(), 500, 1)
    assert found.low == pytest.approx(0.01) and found.high == pytest.approx(0.01)
    assert (found.wins, found.losses, found.ties, found.n) == (400, 0, 0, 400)
    assert found.significant


def test_wins_losses_and_ties_are_counted() -> None:
    found = paired([0, 0, 1, 1], [0, 1, 0, 1], 500, 1)
    assert (found.wins, found.losses, found.ties) == (1, 1, 2)
    assert not found.significant


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="2 values before, 1 after"):
        paired([0, 1], [1], 100, 1)
