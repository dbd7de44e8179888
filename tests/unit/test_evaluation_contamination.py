"""Questions that stand in a passage or are answered in closed book are marked, and metrics given with and without them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from research_rl.errors import DataError
from research_rl.evaluation.contamination import Marks, in_passages, mark, with_and_without
from tests.results import lost, played

WORDS = [f"word{number}" for number in range(1, 16)]


def test_thirteen_words_in_a_row_mark_a_question_and_twelve_do_not() -> None:
    question = " ".join(WORDS)
    for start in (0, 1, 2):
        assert in_passages(question, ["nothing", "x " + " ".join(WORDS[start : start + 13]) + " y"])
    for start in (0, 1, 2, 3):
        assert not in_passages(question, ["x " + " ".join(WORDS[start : start + 12]) + " y"])
    assert not in_passages(question, [" ".join(WORDS[:7]), " ".join(WORDS[7:])]), "in one passage, not over several"


def test_case_punctuation_and_articles_decide_nothing() -> None:
    asked, written = f"The {' '.join(WORDS[:13])}?", f"({', '.join(WORDS[:6])}; the {' a '.join(WORDS[6:13])})".upper()
    assert in_passages(asked, [written])
    assert not in_passages(asked, [written.replace("WORD7", "WORD77")]), "whole words"


def test_all_words_of_a_shorter_question_mark_it() -> None:
    assert in_passages("Who wrote it?", ["I ask who wrote it, and why"])
    assert not in_passages("Who wrote it?", ["who wrote", "who ever wrote it"])
    assert not in_passages("The?", ["the", ""]) and not in_passages("Who?", [])


@given(st.lists(st.sampled_from("abcdxyz"), min_size=1, max_size=20), st.lists(st.sampled_from("bcdxyz"), max_size=40))
def test_it_is_the_search_for_every_run_of_words(question: list[str], passage: list[str]) -> None:
    words = [word for word in question if word != "a"]
    size = min(13, len(words))
    runs = [words[start : start + size] for start in range(len(words) - size + 1)] if words else []
    expected = any(passage[place : place + size] == run for run in runs for place in range(len(passage)))
    assert in_passages(" ".join(question), [" ".join(passage)]) == expected


def test_marks_come_from_what_search_showed_and_from_the_closed_book() -> None:
    asked = {"question": "Who wrote the book?"}
    results = [
        played(0, "Ada", [("q", "Quiz: who wrote the book? Ada")], **asked),
        played(1, "Ada", [("Who wrote the book", "Ada wrote it")], **asked),
        played(2, "Bob", **asked),
        played(3, "Ada", **asked),
        played(4, "Ada", **asked),
    ]
    closed = [played(0, "Bob", **asked), played(1, "Ada", **asked), played(2, "Ada", **asked), lost(3), played(4, "Ada", question="Else?")]
    assert mark(results, closed) == [Marks(True, False), Marks(False, True), Marks(False, True), Marks(False, None), Marks(False, None)]
    assert [marks.clean for marks in mark(results, closed)] == [False, False, False, True, True]
    assert {marks.closed_book for marks in mark(results)} == {None}


def test_a_closed_book_evaluation_of_other_questions_is_refused() -> None:
    with pytest.raises(DataError, match=r"\(1 questions, 1 of them played\) shares none of the 1 questions"):
        mark([played(0, "Ada")], [played(1, "Ada")])
    assert mark([], []) == []


def test_metrics_are_given_with_and_without_the_marked_questions() -> None:
    results = [played(n, answer) for n, answer in enumerate(["Ada", "Ada", "Ada", "Bob", "Bob"])]
    marks = [Marks(True, True), Marks(True, False), Marks(False, True), Marks(False, None), Marks(False, False)]
    summary = with_and_without(results, marks, 200, 1)
    assert summary["marked"] == {"in_passages": 2, "closed_book": 2, "any": 3, "closed_book_unknown": 1}
    # Right answers of those kept: 3 of 5, 1 of 3, 1 of 3, 0 of 2.
    kept = {name: (summary[name]["em"]["mean"], summary[name]["n"]) for name in summary if name != "marked"}
    third = pytest.approx(1 / 3, abs=1e-6)
    assert kept == {"all": (0.6, 5), "without_in_passages": (third, 3), "without_closed_book": (third, 3), "without_any": (0.0, 2)}
    with pytest.raises(ValueError, match="shorter"):
        with_and_without(results, marks[:4], 200, 1)


def test_nothing_is_left_where_all_are_marked() -> None:
    summary = with_and_without([played(0, "Ada")], [Marks(True, None)], 200, 1)
    assert summary["without_any"]["n"] == 0 and "em" not in summary["without_any"]
