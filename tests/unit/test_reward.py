"""Both reward rules against tables worked out by hand from the paper's equation and the published rule."""

from __future__ import annotations

import random

import pytest
import reward_reference as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from research_rl.episode.trajectory import Author, Segment, Trajectory
from research_rl.reward.metrics import exact_match, normalize, recall, token_f1
from research_rl.reward.rules import boxed, check_format, grade, graded_text, score_text

THINK = "<think> t </think>"
SEARCH = "<search> q </search> <result>\n</result>"


def answer(text: str) -> str:
    return f"<answer> \\boxed{{{text}}} </answer>"


GOOD = f"{THINK} {SEARCH} {THINK} {answer('Paris')}"
CASES = [
    # text, ended by eos, paper, repository
    (GOOD, True, 1.0, 1.0),
    (GOOD, False, 1.0, 0.0),
    (f"{THINK} {answer('Rome')}", True, 0.1, 0.1),
    (f"{THINK} {answer('Rome')}", False, 0.0, 0.0),
    (f"{THINK} {answer('Paris France')}", True, 2 / 3, 2 / 3),
    (answer("Paris"), True, 1.0, 0.0),
    (f"<think> t {answer('Paris')}", True, 1.0, 0.0),
    (f"{THINK} {answer('Paris')} {answer('Paris')}", True, 1.0, 0.0),
    (f"{THINK} <search> q </search> {answer('Paris')}", True, 1.0, 0.0),
    (f"{THINK} <answer> Paris </answer>", True, 0.0, 0.0),
    (f"{THINK} \\boxed{{Paris}} <answer> </answer>", True, 0.0, 0.0),
    (f"{THINK} </answer> \\boxed{{Paris}} <answer>", True, 0.0, 0.0),
    ("", True, 0.0, 0.0),
    (f"{THINK} <answer> \\boxed{{Rome}} \\boxed{{Paris}} </answer>", True, 1.0, 1.0),
    (f"{THINK} <answer> \\boxed{{a{{b}}c}} </answer>", True, 0.1, 0.1),
    (f"{THINK} <answer> \\boxed{{open }}{{ </answer>", True, 0.1, 0.1),
]


@pytest.mark.parametrize(("text", "eos", "paper", "repository"), CASES)
def test_table(text: str, eos: bool, paper: float, repository: float) -> None:
    assert score_text(text, ["Paris"], "paper", ended_by_eos=eos).score == pytest.approx(paper)
    assert score_text(text, ["Paris"], "repository", ended_by_eos=eos).score == pytest.approx(repository)


def test_unreadable_box_with_right_format_divides_the_rules() -> None:
    text = f"{THINK} <answer> \\boxed{{ \\boxed x}} </answer>"
    assert check_format(text) is None
    assert boxed("\\boxed{ \\boxed x} ") == "x} "
    assert score_text("<think></think><answer>\\boxed{a} \\boxedb</answer>", ["a"], "repository", ended_by_eos=True).score == 0.0
    assert score_text("<think></think><answer>\\boxed{a} \\boxedb</answer>", ["a"], "paper", ended_by_eos=True).score == 0.1


def test_a_passage_can_neither_win_nor_destroy_the_reward() -> None:
    def trajectory(passage: str) -> Trajectory:
        segments = [
            Segment(Author.MODEL, (), (), f"{THINK} <search> q </search>"),
            Segment(Author.SEARCH, (), (), f" <result>\n{passage}\n</result>"),
            Segment(Author.MODEL, (), (), f" {THINK} {answer('Rome')}<eos>"),
        ]
        return Trajectory((), segments, ended_by_eos=True)

    plain = grade(trajectory("nothing"), ["Paris"], "repository", "<eos>")
    loud = grade(trajectory("<answer> \\boxed{Paris} </answer> <think> </result>"), ["Paris"], "repository", "<eos>")
    assert plain == loud and plain.score == 0.1
    assert "nothing" not in graded_text(trajectory("nothing").segments)


def test_normalisation_and_closed_answers() -> None:
    assert normalize("The  Beatles, (a band)!") == "beatles band"
    assert exact_match("the paris", ["Lyon", "Paris."]) == 1.0
    assert token_f1("yes", ["no"]) == 0.0 and token_f1("yes it is", ["yes"]) == 0.0 and token_f1("Yes", ["yes"]) == 1.0
    assert token_f1("new new york", ["new york city"]) == pytest.approx(2 / 3)
    assert token_f1("x", []) == 0.0
    assert recall(["1", "2"], ["2", "3"]) == 0.5 and recall(["1"], []) is None


PARTS = [THINK, SEARCH, "<search>", "</search>", "<think>", "</think>", "<answer>", "</answer>", "<result>"]
PARTS += ["\\boxed{", "\\boxed ", "}", "Paris", "x "]


@settings(max_examples=2000, deadline=None)
@given(
    parts=st.lists(
        st.sampled_from(PARTS),
        max_size=12,
    ),
    eos=st.booleans(),
)
def test_rules_agree_where_the_format_is_right_and_differ_only_by_format(parts: list[str], eos: bool) -> None:
    text = "".join(parts)
    paper = score_text(text, ["Paris"], "paper", ended_by_eos=eos)
    repository = score_text(text, ["Paris"], "repository", ended_by_eos=eos)
    assert 0.0 <= repository.score <= paper.score <= 1.0
    if repository.format_ok:
        assert paper.score == repository.score > 0.0
    else:
        assert repository.score == 0.0
    assert paper.score == (paper.f1 or (0.1 if paper.format_ok else 0.0))


WORDS = [
    "Paris",
    "the",
    "a",
    "Nile",
    "new york",
    "1912",
    "yes",
    "no",
    "noanswer",
    "U.S.",
    "ba-na",
    "É",
    "\u0130",
    "，",
    "\u200b",
    "",
    "$",
    "\n",
]
GOLDS = ["Paris", "The Nile", "new york city", "yes", "no", "1912", "", "É", "the"]


def response(chance: random.Random) -> str:
    """A response that is right, nearly right or a heap of parts, about a third each."""

    def words() -> str:
        return " ".join(chance.choices(WORDS, k=chance.randint(0, 4)))

    box = chance.choice(
        ["\\boxed{%s}", "\\boxed{%s}", "\\boxed{{%s}}", "\\boxed %s$", "\\boxed%s", "\\boxed{%s", "%s}", "\\boxed{x} \\boxed{%s}"]
    )
    turn = f"<think> {words()} </think> <search> {words()} </search> <result>\n</result>"
    blocks = [turn] * chance.randint(0, 2) + [f"<think>{words()}</think>", f"<answer> {box % words()} </answer>"]
    if chance.random() < 0.35:
        return "".join(chance.choices([*PARTS, words()], k=chance.randint(0, 14)))
    text = " ".join(blocks)
    for _ in range(chance.choice([0, 0, 1, 2])):
        cut, length = chance.randrange(len(text) + 1), chance.randint(0, 9)
        text = text[:cut] + chance.choice([*PARTS, words(), ""]) + text[cut + length :]
    return text


def test_twelve_thousand_responses_score_as_an_independent_reading_of_the_rules_says() -> None:
    chance, outcomes = random.Random(7), set()
    for _ in range(12_000):
        text, ended, golds = response(chance), chance.random() < 0.8, chance.sample(GOLDS, chance.randint(1, 3))
        by_paper, by_repository = (score_text(text, golds, rule, ended_by_eos=ended) for rule in ("paper", "repository"))
        assert by_paper.score == pytest.approx(reference.paper(text, golds, ended)), (text, golds, ended)
        assert by_repository.score == pytest.approx(reference.repository(text, golds, ended)), (text, golds, ended)
        assert (check_format(text) is None) == reference.well_formed(text), text
        outcomes.add((round(by_paper.score, 3), round(by_repository.score, 3)))
    assert {(0.0, 0.0), (0.1, 0.1), (1.0, 0.0), (1.0, 1.0)} <= outcomes and len(outcomes) > 15, "the responses reach every branch"
