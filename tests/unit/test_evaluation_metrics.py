"""The metrics of the published evaluation, and what a result says about its searches."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from research_rl.episode.trajectory import StopReason
from research_rl.errors import DataError
from research_rl.evaluation.comparison import compare_results
from research_rl.evaluation.results import Result
from research_rl.evaluation.summary import BOUNDED, METRICS, SCORES, summarise
from research_rl.report.format import LABELS
from research_rl.reward.metrics import contains, cover_em, findable, shares_words, token_f1, token_precision, token_recall
from tasks.evaluation.to_mlflow import numbers
from tests.results import lost, played
from tests.unit.reward_reference import squad

TEXTS = st.lists(st.sampled_from(["ada", "Bob", "the", "no", "know", "yes", "21", "1", "a.", "noanswer"]), max_size=5).map(" ".join)


def metric(name: str, result: Result) -> float | None:
    return METRICS[name](result)


def test_a_cover_counts_letters_and_contains_counts_words() -> None:
    for prediction, gold in [("I know", "no"), ("21", "1"), ("cathedral", "cat"), ("Northern Ireland", "north")]:
        assert (cover_em(prediction, [gold]), contains(prediction, [gold])) == (1.0, 0.0)
    assert cover_em("It was Ada Lovelace.", ["Bob", "the Ada!"]) == contains("It was Ada Lovelace.", ["Bob", "the Ada!"]) == 1.0
    assert cover_em("Ada", ["Ada Lovelace"]) == 0.0, "the gold answer is in the prediction, not the prediction in the gold answer"
    assert cover_em("他生于北京市", ["北京"]) == 1.0
    assert cover_em("whatever", ["The", "!"]) == 0.0, "a gold answer that normalises to nothing is in no answer"


@given(TEXTS, st.lists(TEXTS, max_size=3))
def test_the_cover_is_the_published_one(prediction: str, golds: list[str]) -> None:
    expected = any(squad(gold) and " ".join(squad(gold)) in " ".join(squad(prediction)) for gold in golds)
    assert cover_em(prediction, golds) == float(expected) >= contains(prediction, golds)


def published(prediction: str, golds: list[str]) -> tuple[float, float, float]:
    """Precision, recall and F1 by their statement: each the largest over the gold answers that are not skipped."""
    best = (0.0, 0.0, 0.0)
    for gold in golds:
        predicted, expected = list(squad(prediction)), list(squad(gold))
        if predicted != expected and any(side in (["yes"], ["no"], ["noanswer"]) for side in (predicted, expected)):
            continue
        shared = sum(min(predicted.count(word), expected.count(word)) for word in set(predicted))
        if shared:
            precision, recall = shared / len(predicted), shared / len(expected)
            best = tuple(map(max, best, (precision, recall, 2 * precision * recall / (precision + recall))))  # type: ignore[assignment]
    return best


@given(TEXTS, st.lists(TEXTS, max_size=3))
def test_token_precision_and_recall_are_the_published_ones(prediction: str, golds: list[str]) -> None:
    measured = (token_precision(prediction, golds), token_recall(prediction, golds), token_f1(prediction, golds))
    assert measured == pytest.approx(published(prediction, golds))


def test_precision_and_recall_may_be_of_different_gold_answers() -> None:
    # Against "new york city hall": P = 2/2, R = 2/4. Against "york": P = 1/2, R = 1/1. F1 is 2/3 against either.
    golds = ["new york city hall", "york"]
    assert (token_precision("New York", golds), token_recall("New York", golds)) == (1.0, 1.0)
    assert token_f1("New York", golds) == pytest.approx(2 / 3)


def test_a_closed_answer_skips_its_gold_answer_alone() -> None:
    assert token_precision("yes it is", ["yes"]) == token_recall("yes it is", ["yes"]) == token_recall("no", ["no way"]) == 0.0
    assert token_precision("yes it is", ["yes", "it"]) == pytest.approx(1 / 3)
    assert token_precision("Yes.", ["yes"]) == token_recall("Yes.", ["yes"]) == 1.0
    assert token_precision("", [""]) == token_recall("", [""]) == token_recall("x", []) == 0.0


def test_words_side_by_side_are_found_and_others_are_not() -> None:
    words = ["b", "c", "d"]
    assert shares_words(words, 2, ["x", "A b, C."]) and shares_words(words, 3, ["the b c d e"])
    assert not shares_words(words, 2, ["b d c", "bb c"]) and not shares_words(words, 4, ["b c d"])


SEARCHES = [("Who wrote it?", "Bob wrote a book"), ("who wrote it", "The Adages of Bob"), ("the author", "Ada wrote it"), ("more", "x")]


def test_searches_are_counted_up_to_the_answer_and_after_it() -> None:
    result = played(0, "Ada", SEARCHES)
    assert (result.answer_search, result.redundant_queries) == (3, 0.25)
    assert metric("answer_in_results", result) == 1.0
    assert (metric("first_answer_search", result), metric("searches_after_answer", result)) == (3.0, 1.0)


def test_an_answer_that_no_search_showed_has_no_place() -> None:
    for result in (played(0, "Ada", SEARCHES[:2]), played(0, "Ada")):
        assert (result.answer_search, metric("answer_in_results", result)) == (0, 0.0)
        assert metric("first_answer_search", result) is None and metric("searches_after_answer", result) is None


def test_yes_and_no_are_looked_for_in_no_passage() -> None:
    assert findable(["yes", "No.", "the", "noanswer", "Norway"]) == ["Norway"]
    result = played(0, "no", [("q", "there is no such town, yes")], golds=["no", "yes"])
    assert result.answer_search is None and metric("answer_in_results", result) is None
    assert played(0, "no", [("q", "a town in Norway")], golds=["no", "Norway"]).answer_search == 1


def test_neither_tags_nor_our_own_words_show_an_answer() -> None:
    assert played(0, "Result", [("q", "nothing of it")], golds=["Result"]).answer_search == 0
    assert played(0, "passage", [("q", "")], golds=["passage"]).answer_search == 0
    assert played(0, "passage", [("q", ""), ("r", "a passage")], golds=["passage"]).answer_search == 2


@pytest.mark.parametrize(
    ("queries", "share"),
    [([], None), (["", "  "], None), (["a b"], 0.0), (["q", "Q!", "the q", "r"], 0.5), (["the", "a", "a"], 1 / 3), (["q", "", ""], 0.0)],
)
def test_queries_asked_before_are_a_share_of_all_queries(queries: list[str], share: float | None) -> None:
    assert played(0, "Ada", [(query, "x") for query in queries]).redundant_queries == pytest.approx(share)


@pytest.mark.parametrize(("answer", "searches", "expected"), [("Ada", 0, 1.0), ("Ada", 1, 0.0), ("Bob", 0, 0.0), ("Ada L", 0, 0.0)])
def test_right_without_a_search(answer: str, searches: int, expected: float) -> None:
    assert metric("right_without_search", played(0, answer, SEARCHES[:searches])) == expected


def test_a_result_holds_the_published_metrics_of_its_prediction() -> None:
    result = played(0, "Countess Ada Lovelace", golds=["Bob", "Ada King"])
    assert (result.em, result.acc, result.token_precision, result.token_recall) == (0.0, 0.0, pytest.approx(1 / 3), 0.5)
    assert played(0, "It was Adam").acc == 1.0
    cut = {empty: played(0, "Ada", stop=StopReason.TOKEN_LIMIT, cut_is_empty=empty) for empty in (False, True)}
    assert (cut[False].acc, cut[False].token_recall, cut[True].acc, cut[True].token_recall) == (1.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize("field", ["acc", "token_precision", "token_recall", "answer_search", "redundant_queries"])
def test_a_result_of_an_earlier_version_is_refused(field: str) -> None:
    record = played(0, "Ada", SEARCHES).to_json()
    assert Result.from_json(dict(record)).to_json() == record
    del record[field]
    with pytest.raises(DataError, match=f"a result of another version lacks or adds {field}; evaluate again"):
        Result.from_json(record)


def test_every_metric_runs_over_the_questions_that_define_it() -> None:
    results = [played(0, "Ada", SEARCHES), played(1, "Ada"), played(2, "yes", golds=["yes"]), played(3, "Bob", SEARCHES[:2]), lost(4)]
    metrics = summarise(results, 200, 1)
    means = {name: (metrics[name]["mean"], metrics[name]["n"]) for name in METRICS if name in metrics}
    assert (means["acc"], means["right_without_search"]) == ((0.6, 5), (0.4, 5))
    # One of the four answers other than yes and no was shown; 1 of 4 queries of the first and 1 of 2 of the fourth were asked before.
    assert (means["answer_in_results"], means["redundant_queries"]) == ((0.25, 4), (0.375, 2))
    assert (means["first_answer_search"], means["searches_after_answer"]) == ((3.0, 1), (1.0, 1))


def test_seconds_are_a_metric_of_every_table_and_comparison() -> None:
    before, after = ([replace(played(n, "Ada"), seconds=float(n + shift)) for n in range(12)] for shift in (0, 2))
    assert summarise(before, 200, 1)["seconds"]["mean"] == 5.5
    moved = next(metric for metric in compare_results(before, after, 200, 1).metrics if metric.name == "seconds")
    assert (moved.before, moved.after, moved.difference.mean) == (5.5, 7.5, 2.0)
    assert numbers(summarise(before, 200, 1))["detail/seconds"] == 5.5
    assert LABELS["seconds"] == "seconds" and "seconds" not in BOUNDED


def test_shares_have_the_exact_interval_also_where_less_is_better() -> None:
    metrics = summarise([played(n, "Ada", [("q", "Ada"), ("q", "x")]) for n in range(20)], 200, 1)
    none, half = binomtest(0, 20).proportion_ci(0.95, "exact"), binomtest(10, 20).proportion_ci(0.95, "exact")
    assert metrics["right_without_search"] == {"mean": 0.0, "low": 0.0, "high": round(none.high, 6), "n": 20}
    assert metrics["suspect"]["high"] == round(none.high, 6)
    assert metrics["redundant_queries"]["mean"] == 0.5 and metrics["redundant_queries"]["high"] <= half.high
    assert SCORES < BOUNDED < set(METRICS) | {"judge_failed"} == set(LABELS)
