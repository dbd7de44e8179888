"""The trace of an episode gives each passage its own id and each turn the tokens that its engine read, whichever method played it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from research_rl.episode.prompts import FolderTokenizer
from research_rl.episode.trajectory import Passage
from research_rl.evaluation.methods import Tools, find
from tasks.tracking.evaluations import _spread
from tasks.tracking.traces import TraceSpan, documents, pieces
from tests.results import played
from tests.unit.test_evaluation import tokenizer
from tests.unit.test_methods import ASK, DONE, LIMITS, PROMPT, QUESTION, Script, Shelf, passage

__all__ = ["tokenizer"]

A, B, C = 'Doc 1(Title: "a") about a', 'Doc 2(Title: "b") about b', 'Doc 1(Title: "c") about c'
Found = list[tuple[str, str]]


def spans(name: str, engine: Script, shelf: Shelf, limits: Any = LIMITS) -> list[TraceSpan]:
    """Return the spans of the question played by a method, as its stored record gives them."""
    tools = Tools(engine, shelf, engine.tokenizer, PROMPT, limits, lambda ids: [passage(i) for i in ids])
    played = asyncio.run(find(name).play(QUESTION, tools))
    return list(pieces(played.trajectory.to_json()))


def found(piece: TraceSpan) -> Found:
    made = documents(piece.text, piece.passage_ids, piece.places)
    assert all(each["metadata"] == {"doc_uri": each["id"]} for each in made)
    return [(each["id"], each["page_content"]) for each in made]


def retrieved(made: list[TraceSpan]) -> list[Found]:
    return [found(piece) for piece in made if piece.kind == "retrieve"]


def read(made: list[TraceSpan], engine: Script) -> None:
    """Require that each turn read its whole prompt and nothing else."""
    assert [piece.tokens[0] for piece in made if piece.tokens[0]] == [len(engine.tokenizer.encode(prompt)) for prompt in engine.prompts]


@pytest.mark.parametrize("name", ["research", "single-search", "oracle"])
def test_our_own_protocol(tokenizer: FolderTokenizer, name: str) -> None:
    engine, shelf = Script(tokenizer, ASK, DONE), Shelf([passage("p1"), passage("p2")])
    made = spans(name, engine, shelf)
    assert retrieved(made)[0] == [("p1", '"p1"\nabout p1'), ("p2", '"p2"\nabout p2')]
    read(made, engine)


def test_zero_shot_reads_its_instruction_and_the_question(tokenizer: FolderTokenizer) -> None:
    engine = Script(tokenizer, "Ada$")
    made = spans("zero-shot", engine, Shelf())
    assert [piece.kind for piece in made] == ["think"]
    read(made, engine)


def test_naive(tokenizer: FolderTokenizer) -> None:
    engine = Script(tokenizer, "Ada$")
    # An empty line within a passage divides nothing.
    made = spans("naive", engine, Shelf([passage("a"), passage("b"), Passage("c", "c\none\n\ntwo")]))
    assert retrieved(made) == [[("a", A), ("b", B), ("c", "Doc 3(Title: c) one\n\ntwo")]]
    read(made, engine)


def test_iter_retgen(tokenizer: FolderTokenizer) -> None:
    engine = Script(tokenizer, "first$", "second$", "third$")
    made = spans("iter-retgen", engine, Shelf([passage("a"), passage("b")], [passage("c")], []))
    assert retrieved(made) == [[("a", A), ("b", B)], [("c", C)], []]
    assert [piece.query for piece in made if piece.kind == "retrieve"] == ["Who wrote it?", "Who wrote it? first", "Who wrote it? second"]
    read(made, engine)


def test_ircot_names_the_merged_passages_in_the_order_in_which_they_are_shown(tokenizer: FolderTokenizer) -> None:
    engine = Script(tokenizer, " One thought.", " So the answer is: Ada.")
    shelf = Shelf([passage("a", 3.0), passage("b", 1.0)], [passage("b", 5.0), passage("c", 4.0)])
    made = spans("ircot", engine, shelf)
    texts = {name: f'Wikipedia Title: "{name}"\nabout {name}' for name in "abc"}
    assert retrieved(made) == [[("a", texts["a"]), ("b", texts["b"])], [("a", texts["a"]), ("c", texts["c"]), ("b", texts["b"])]]
    assert [piece.query for piece in made if piece.kind == "retrieve"] == ["Who wrote it?", "One thought."]
    read(made, engine)


def test_search_r1_after_a_turn_without_an_action(tokenizer: FolderTokenizer) -> None:
    engine = Script(tokenizer, "hm", "<search> q </search>", "<answer> Ada </answer>")
    made = spans("search-r1", engine, Shelf([passage("a"), passage("b")]))
    assert [piece.kind for piece in made] == ["think", "message", "search", "retrieve", "answer"]
    assert retrieved(made) == [[("a", A), ("b", B)]] and made[3].query == "q"
    assert "That action is invalid" in made[1].text and made[1].passage_ids == ()
    read(made, engine)


def test_a_passage_that_the_limit_on_a_result_cut_off_is_no_document(tokenizer: FolderTokenizer) -> None:
    # One token a byte: 25 of the first passage, its line's end, and 6 of the second.
    assert len(A) == 25
    limits = type(LIMITS)(**{**vars(LIMITS), "max_result_tokens": 32})
    made = spans(
        "search-r1",
        Script(tokenizer, "<search> q </search>", "<answer> Ada </answer>"),
        Shelf([passage("a"), passage("b"), passage("c")]),
        limits,
    )
    assert retrieved(made) == [[("a", A), ("b", "Doc 2(")]]


@pytest.mark.parametrize(("total", "count"), [(6, 8), (6, 6), (1, 8), (7, 3), (5, 1), (0, 4)])
def test_rows_are_spread_over_all_questions_and_none_is_shown_twice(total: int, count: int) -> None:
    results = [played(row, "Ada") for row in range(total)]
    rows = [result.row for result in _spread(results, count)]
    assert len(rows) == len(set(rows)) == min(total, count)
    assert count < 2 or total < 2 or (rows[0], rows[-1]) == (0, total - 1)


def test_a_stored_block_of_another_form_is_one_document_with_all_ids() -> None:
    """As records say of before places were noted."""
    segments = [{"author": "search", "text": f"{A}\n{B}\n", "tokens": 9}, {"author": "model", "text": "Ada", "tokens": 1}]
    record = {"segments": segments, "searches": [{"query": "q", "passage_ids": ["a", "b"], "seconds": 0.1, "error": None}]}
    assert retrieved(list(pieces(record))) == [[("a, b", f"{A}\n{B}")]]
