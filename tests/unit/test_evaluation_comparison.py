"""Two evaluations are compared in pairs: lost questions leave both sides, tests are exact, and several sets are corrected for."""

from __future__ import annotations

import json
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from research_rl.evaluation.comparison import compare_results, compare_sets, holm, match, mcnemar
from research_rl.evaluation.intervals import paired
from research_rl.evaluation.results import Result
from tests.results import lost, played


def sides(gains: int, losses: int, both: int = 0, neither: int = 0, source: str = "made") -> tuple[list[Result], list[Result]]:
    """Return two evaluations in which so many questions change sides."""
    answers = [("Bob", "Ada")] * gains + [("Ada", "Bob")] * losses + [("Ada", "Ada")] * both + [("Bob", "Bob")] * neither
    before, after = ([played(row, pair[side], source=source) for row, pair in enumerate(answers)] for side in (0, 1))
    return before, after


def test_mcnemar_worked_by_hand() -> None:
    # 5 of 5 that changed: 2 * (1/2)^5 = 1/16. 5 of 6: 2 * (C(6,0) + C(6,1)) / 2^6 = 14/64. 3 of 6: more than 1, cut to 1.
    for gains, losses, p in [(5, 0, 1 / 16), (5, 1, 14 / 64), (1, 5, 14 / 64), (3, 3, 1.0), (0, 0, 1.0)]:
        test = mcnemar(match(*sides(gains, losses, both=2, neither=1)).pairs)
        assert (test.gains, test.losses, test.p, test.adjusted) == (gains, losses, pytest.approx(p), pytest.approx(p))


@pytest.mark.parametrize(("gains", "losses"), [*((n, 12 - n) for n in range(13)), (40, 20), (0, 40)])
def test_mcnemar_is_the_binomial_test_of_the_questions_that_changed(gains: int, losses: int) -> None:
    assert mcnemar(match(*sides(gains, losses)).pairs).p == pytest.approx(binomtest(gains, gains + losses).pvalue)


def test_thousands_of_changed_questions_neither_overflow_nor_take_long() -> None:
    right, wrong = played(0, "Ada"), played(0, "Bob")
    for gains, losses in [(2600, 2500), (4000, 0)]:
        test = mcnemar([(wrong, right)] * gains + [(right, wrong)] * losses)
        assert test.p == pytest.approx(binomtest(gains, gains + losses).pvalue, rel=1e-9)


@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_does_not_know_which_side_is_which(gains: int, losses: int) -> None:
    right, wrong = played(0, "Ada"), played(0, "Bob")
    test, turned = (mcnemar([(a, b)] * gains + [(b, a)] * losses) for a, b in ((wrong, right), (right, wrong)))
    assert (test.p, test.gains, test.losses) == (turned.p, turned.losses, turned.gains) and 0 < test.p <= 1


def test_holm_worked_by_hand() -> None:
    # In order 0.01 * 3 = 0.03, 0.03 * 2 = 0.06, 0.04 * 1 = 0.04, which may not be below 0.06.
    assert holm({"a": 0.04, "b": 0.01, "c": 0.03}) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert holm({"a": 0.5, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({"a": 0.2}) == {"a": 0.2} and holm({}) == {}


@pytest.mark.parametrize(
    ("values", "adjusted"),
    [
        ([0.01, 0.02, 0.03, 0.04, 0.05], [0.05, 0.08, 0.09, 0.09, 0.09]),
        ([0.04, 0.001, 0.03, 0.6, 0.008], [0.09, 0.005, 0.09, 0.6, 0.032]),
        ([0.2, 0.04, 0.04, 0.0004, 1.0, 0.012], [0.4, 0.16, 0.16, 0.0024, 1.0, 0.06]),
    ],
)
def test_holm_gives_the_values_of_statsmodels(values: list[float], adjusted: list[float]) -> None:
    """They are those of `multipletests(values, method="holm")` of statsmodels 0.15.0."""
    assert list(holm({str(n): value for n, value in enumerate(values)}).values()) == pytest.approx(adjusted)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_all_groups_by_bonferroni(values: list[float]) -> None:
    """A test holds if each group of tests that it is in holds, and a group holds by its smallest p times its size."""
    numbers = range(len(values))
    groups = [group for size in range(1, len(values) + 1) for group in combinations(numbers, size)]
    expected = {
        str(n): max(min(1.0, len(group) * min(values[other] for other in group)) for group in groups if n in group) for n in numbers
    }
    assert holm({str(n): values[n] for n in numbers}) == pytest.approx(expected)


def test_lost_questions_leave_both_sides_of_every_number_and_are_counted() -> None:
    before = [played(0, "Bob"), played(1, "Ada"), lost(2), played(3, "Ada", [("q", "Ada")]), lost(4), played(9, "Ada")]
    after = [played(0, "Ada"), played(1, "Ada"), played(2, "Ada"), lost(3), lost(4), played(8, "Ada")]
    compared = compare_results(before, after, 200, 1)
    assert [a.id for a, _ in compared.matched.pairs] == ["q0", "q1"] and [a.id for a, _ in compared.matched.lost] == ["q2", "q3", "q4"]
    assert compared.matched.lost_sides == (2, 2)
    assert {m.difference.n for m in compared.metrics} == {2}
    em = next(m for m in compared.metrics if m.name == "em")
    assert (em.before, em.after, em.difference) == (0.5, 1.0, paired([0.0, 1.0], [1.0, 1.0], 200, 1, bounded=True))
    assert (compared.exact_match.gains, compared.exact_match.losses) == (1, 0)
    record = json.loads(json.dumps(compared.to_json()))
    assert (record["pairs"], record["lost"]) == (2, {"questions": 3, "before": 2, "after": 2})
    assert record["metrics"]["em"]["mean"] == 0.5 and record["exact_match"] == {"gains": 1, "losses": 0, "p": 1.0, "adjusted": 1.0}


def test_question_sets_are_compared_apart_and_their_tests_corrected() -> None:
    parts = {"easy": sides(8, 0, both=4, source="easy"), "hard": sides(6, 0, neither=5, source="hard"), "same": sides(1, 1, source="same")}
    before, after = ([result for part in parts.values() for result in part[side]] for side in (0, 1))
    compared = compare_sets([*before, lost(50, "hard")], [*reversed(after), lost(50, "hard")], 200, 1)
    assert {name: len(c.matched.pairs) for name, c in compared.items()} == {"easy": 12, "hard": 11, "same": 2}
    assert {name: len(c.matched.lost) for name, c in compared.items()} == {"easy": 0, "hard": 1, "same": 0}
    # p = 2 / 2^8, 2 / 2^6 and 1; corrected 3 * 2 / 2^8, 2 * 2 / 2^6 and 1.
    assert [c.exact_match.p for c in compared.values()] == pytest.approx([2 / 256, 2 / 64, 1.0])
    assert [c.exact_match.adjusted for c in compared.values()] == pytest.approx([6 / 256, 4 / 64, 1.0])
    whole = compare_results(before, after, 200, 1).exact_match
    assert (whole.gains, whole.losses, whole.adjusted) == (15, 1, whole.p)
