"""Both reward rules against tables worked out by hand from the paper's equation and the published rule."""

from __future__ import annotations

import random
import re

import pytest
import reward_reference as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from research_rl.episode import protocol
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
    # The first <result> after <search> must stand after </search>: a model's own result inside a search breaks the format.
    (f"{THINK} <search> a <result> b </search> <result>\n\n</result> {THINK} {answer('Paris')}", True, 1.0, 0.0),
    (f"{THINK} <search> a <result> b </result> </search> <result>\n</result> {answer('Paris')}", True, 1.0, 0.0),
    (f"{THINK} <search> a </search> </result> <result>\n</result> {answer('Paris')}", True, 1.0, 1.0),
    (f"{THINK} <search> a </search> <search> <result>\n</result> {answer('Paris')}", True, 1.0, 1.0),
    (f"{THINK} <result> x {SEARCH} {answer('Paris')}", True, 1.0, 1.0),
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


BOXES = ["\\boxed{%s}", "\\boxed{%s}", "\\boxed{{%s}}", "\\boxed %s$", "\\boxed%s", "\\boxed{%s", "%s}", "\\boxed{x} \\boxed{%s}"]
TAG = re.compile("|".join(protocol.TAGS))


class Responses:
    """Responses that are right, nearly right or a heap of parts, about a third each, and sets of gold answers; phrases repeat."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.phrases = [" ".join(self.chance.choices(WORDS, k=self.chance.randint(0, 4))) for _ in range(2000)]
        self.answers = [f"<answer> {box % phrase} </answer>" for box, phrase in zip(BOXES * 250, self.phrases, strict=True)]
        self.golds = [self.chance.sample(GOLDS, self.chance.randint(1, 3)) for _ in range(200)]

    def one(self) -> str:
        chance, pick = self.chance, self.chance.choice
        if chance.random() < 0.35:
            return "".join(chance.choices([*PARTS, pick(self.phrases)], k=int(15 * chance.random())))
        turn = f"<think> {pick(self.phrases)} </think> <search> {pick(self.phrases)} </search> <result>\n</result> "
        text = turn * int(3 * chance.random()) + f"<think>{pick(self.phrases)}</think> {pick(self.answers)}"
        for _ in range(pick([0, 0, 1, 2])):
            text = self.nested(text) if chance.random() < 0.3 else self.edited(text)
        return text

    def edited(self, text: str) -> str:
        """The text with a part put over up to nine of its characters."""
        cut, length = int(len(text) * self.chance.random()), int(10 * self.chance.random())
        return text[:cut] + self.chance.choice([*PARTS, self.chance.choice(self.phrases), ""]) + text[cut + length :]

    def nested(self, text: str) -> str:
        """The text with a tag put inside one of its tags, or behind it."""
        if not (tags := list(TAG.finditer(text))):
            return text
        tag = self.chance.choice(tags)
        place = tag.start() + int((len(tag[0]) + 3) * self.chance.random())
        return text[:place] + self.chance.choice(protocol.TAGS) + text[place:]


RESULT_IN_SEARCH = re.compile(r"<search>(?:(?!</search>)[\s\S])*<result>")


@pytest.mark.parametrize("count", [20_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_generated_responses_score_as_the_stated_rules_say(count: int) -> None:
    responses, outcomes, results_in_search = Responses(7), set[tuple[float, float]](), 0
    for _ in range(count):
        text, ended, golds = responses.one(), responses.chance.random() < 0.8, responses.chance.choice(responses.golds)
        paper = score_text(text, golds, "paper", ended_by_eos=ended)
        repository = score_text(text, golds, "repository", ended_by_eos=ended)
        stated = reference.both(text, golds, ended)
        assert abs(paper.score - stated[0]) + abs(repository.score - stated[1]) < 1e-9, (text, golds, ended, paper, repository, stated)
        outcomes.add((round(stated[0], 3), round(stated[1], 3)))
        results_in_search += RESULT_IN_SEARCH.search(text) is not None
    assert {(0.0, 0.0), (0.1, 0.1), (1.0, 0.0), (1.0, 1.0)} <= outcomes and len(outcomes) > 15, "the responses reach every branch"
    assert results_in_search > count / 100, "responses with a result inside a search are among them"
