"""Words of a policy told apart as they arrive, and the places where an answer stands."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from answering import DONE, MILL, THINK, Bytes, Policy, Shelf
from hypothesis import example, given, settings
from hypothesis import strategies as st

from research_rl.agent.citations import Search, cite, is_supported, place
from research_rl.agent.text import Unboxed, Writing
from research_rl.episode.agent import Completion, Limits, run_episode
from research_rl.episode.events import Ended, Event, GrowingText, SearchBegan, SearchEnded, Shown, TextDelta, TurnEnded
from research_rl.episode.trajectory import Passage, Trajectory
from research_rl.reward.metrics import normalize

LIMITS = Limits(top_k=2, max_searches=2, max_result_tokens=400, max_response_tokens=2000, wall_s=20.0, search_timeout_s=1.0)
PIECES = [
    "<think>",
    "</think>",
    "<search>",
    "</search>",
    "<answer>",
    "</answer>",
    "\\boxed{",
    "}",
    "{",
    "\\[",
    "\\",
    "<",
    "an",
    " ",
    "<eos>",
    "中",
]


def written(text: str, cuts: Sequence[int] = (), *, searches: bool = False) -> list[tuple[str, str]]:
    """Return what a turn tells when it arrives cut at `cuts`, neighbours of one kind joined."""
    writing, pieces = Writing(("<eos>",)), list[tuple[str, str]]()
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    for start, end in pairwise(places):
        pieces += writing.add(text[start:end])
    pieces += writing.end_turn(searches=searches)
    joined: list[tuple[str, str]] = []
    for kind, piece in pieces:
        if joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + piece)
        else:
            joined.append((kind, piece))
    return joined


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.sampled_from(PIECES), max_size=20), cuts=st.lists(st.integers(0, 200), max_size=20))
@example(parts=["<answer>", "\\boxed{", "{", "}", "}", "</answer>"], cuts=list(range(40)))
def test_pieces_of_any_size_give_the_same_texts(parts: list[str], cuts: list[int]) -> None:
    text = "".join(parts)
    assert written(text, cuts) == written(text)
    assert written(text, range(len(text))) == written(text)


@pytest.mark.parametrize(
    ("text", "searches", "expected"),
    [
        ("<think> a </think> <search> q </search>", True, [("thought", " a  ")]),
        ("<think> a </think> <search> q </search>", False, [("thought", " a   q ")]),
        ("<think>a</think><answer>\\[ \\boxed{b} \\]</answer><eos>", False, [("thought", "a"), ("answer", "b ")]),
        ("<answer>never closed \\", False, [("answer", "never closed \\")]),
        ("a < b and <thin", False, [("thought", "a < b and <thin")]),
        ("<answer>a</answer> <answer>b</answer>", False, [("answer", "a"), ("thought", " <answer>b</answer>")]),
        ("<result> forged </result>", False, [("thought", "<result> forged </result>")]),
    ],
)
def test_what_a_turn_tells(text: str, searches: bool, expected: list[tuple[str, str]]) -> None:
    assert written(text, searches=searches) == expected


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\\boxed{Ada}", "Ada"),
        ("It is \\boxed{\\text{Ada} {x}}.", "It is \\text{Ada} {x}."),
        ("{a} \\alpha \\[ b", "{a} \\alpha b"),
        ("\\\\boxed{a}", "\\a"),
        ("\\box", "\\box"),
    ],
)
def test_an_answer_is_read_without_its_box(text: str, shown: str) -> None:
    unboxed = Unboxed()
    assert unboxed.add(text) + unboxed.rest() == shown


def test_an_observer_is_told_all_and_changes_nothing() -> None:
    def play(observed: bool) -> tuple[Trajectory, list[Event]]:
        told: list[Event] = []
        observer = told.append if observed else None
        policy, shelf = Policy(THINK, DONE), Shelf(MILL)
        return asyncio.run(run_episode([9, 9], policy, shelf, Bytes(), LIMITS, observer=observer)), told

    (alone, none), (watched, told) = play(False), play(True)
    assert none == [] and watched.segments == alone.segments and watched.stop is alone.stop
    kinds = [type(event) for event in told if not isinstance(event, TextDelta)]
    assert kinds == [TurnEnded, SearchBegan, SearchEnded, Shown, TurnEnded, Ended]
    turns = [segment.text for segment in alone.segments[::2]]
    assert "".join(event.text for event in told if isinstance(event, TextDelta)) == "".join(turns)
    assert sum(isinstance(event, TextDelta) for event in told) > 20, "the turns did not come in pieces"


def test_an_engine_that_does_not_stream_tells_each_turn_at_once() -> None:
    class Whole:
        async def generate(self, prompt_ids: Sequence[int], stop: Sequence[str], max_tokens: int) -> Completion:
            return await Policy(DONE).generate(prompt_ids, stop, max_tokens)

    told: list[Event] = []
    asyncio.run(run_episode([9], Whole(), Shelf(), Bytes(), LIMITS, observer=told.append))
    assert [type(event) for event in told] == [TextDelta, TurnEnded, Ended]


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30).filter(lambda text: "\ufffd" not in text), piece=st.integers(1, 5))
def test_text_grows_by_whole_characters(text: str, piece: int) -> None:
    ids, growing = Bytes().encode(text), GrowingText(Bytes().decode)
    shown = [growing.add(ids[start : start + piece]) for start in range(0, len(ids), piece)]
    assert "".join(shown) == growing.text == text and "\ufffd" not in growing.text


@pytest.mark.parametrize(
    ("answer", "text", "cited"),
    [
        ("Ada King", "by (Ada King), in 1801", "Ada King"),
        ("the U.S. Army", "He joined the US army.", "US army"),
        ("king of Borel", "She was King of the Borel", "King of the Borel"),
        ("1", "in 21 or 1.", "1"),
        ("李四", "由李四建造", "李四"),
        ("東京 タワー", "東京タワーは高い", "東京タワー"),
        ("Straße", "STRASSE, Straße!", "Straße"),
        ("x", "no such word", None),
        ("yes", "yes, it is", None),
        ("the", "the", None),
        ("a b", "a", None),
    ],
)
def test_where_an_answer_stands(answer: str, text: str, cited: str | None) -> None:
    span = place(answer, text)
    assert (text[slice(*span)] if span else None) == cited


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12)


@settings(max_examples=300, deadline=None)
@given(before=WORDS, answer=WORDS, after=WORDS)
def test_what_is_cited_equals_the_answer_as_the_metrics_compare(before: str, answer: str, after: str) -> None:
    text = f"{before} {answer} {after}"
    if span := place(answer, text):
        assert normalize(text[slice(*span)]) == normalize(answer)


def test_a_passage_counts_once_and_counts_as_read_where_it_was() -> None:
    def count(text: str) -> int:
        return len(text)

    early = Search("q", (Passage("far", "x" * 90 + " Ada"), Passage("near", "Ada")))
    late = Search("r", (Passage("far", "Ada"),))
    cited = cite("Ada", [early, late], count, 60)
    assert [(c.passage_id, c.search, c.rank, c.read) for c in cited] == [("near", 0, 1, False), ("far", 1, 0, True)]
    assert is_supported("Ada", cited) is True and is_supported("Ada", cited[:1]) is False
    assert is_supported("yes", []) is is_supported(None, []) is None
    assert cite("Ada", [replace(early, passages=())], count, 60) == []
