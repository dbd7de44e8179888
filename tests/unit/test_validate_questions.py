"""What the validation says about question sets: exact and near repeats, openings, kinds of answers; and how drift is measured."""

from __future__ import annotations

import random

import numpy as np
import pytest

from research_rl.data.flashrag import Question
from research_rl.validation.drift import divergence, quantiles, stability
from research_rl.validation.questions import Texts, answer_kind, content_words, opening


def texts(questions: list[str], threshold: float = 0.8) -> Texts:
    found = Texts(threshold)
    found.add("train", [Question(str(n), text, ("x",), {}) for n, text in enumerate(questions)])
    return found


def test_an_exact_leak_is_seen_through_case_and_punctuation() -> None:
    found = texts(["Who wrote “Dune”?", "Where is Oslo?"])
    assert found.exact("who wrote Dune") == "train line 1"
    assert found.exact("Who wrote Dune Messiah?") == ""


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.85, 1.0])
def test_near_duplicates_are_all_found_and_no_others(threshold: float) -> None:
    draw = random.Random(3)
    vocabulary = [f"w{n}" for n in range(40)]

    def some() -> str:
        return " ".join(draw.choices(vocabulary, k=draw.randint(2, 12)))

    train, asked = [some() for _ in range(300)], [some() for _ in range(300)]
    asked += [" ".join(draw.sample(text.split(), len(text.split()))) for text in train[:50]]
    sets = [content_words(text) for text in train]
    found = texts(train, threshold)
    hits = 0
    for text in asked:
        words = content_words(text)
        best = max(len(words & other) / len(words | other) for other in sets)
        expected = len(words) > 1 and best >= threshold - 1e-9
        hits += expected
        assert bool(found.near(text)) == expected, (text, best)
    assert 40 <= hits < 350


@pytest.mark.parametrize(
    ("question", "expected"), [("Who is it?", "who"), ("In which town?", "which"), ("Name it.", "other"), ("Did he?", "did")]
)
def test_a_question_is_known_by_its_opening(question: str, expected: str) -> None:
    assert opening(question) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("Yes", "yes/no"), ("in 1984", "year"), ("12 km", "number"), ("Ada Lovelace", "name"), ("a small town", "phrase")],
)
def test_answers_have_kinds(answer: str, expected: str) -> None:
    assert answer_kind(answer) == expected


def test_small_samples_of_one_population_do_not_drift() -> None:
    draw = np.random.default_rng(0)
    shares = draw.dirichlet(np.ones(12))
    shifts = [stability(dict(enumerate(draw.multinomial(60, shares))), dict(enumerate(draw.multinomial(60, shares)))) for _ in range(200)]
    assert np.quantile(shifts, 0.99) < 0.5 and np.median(shifts) < 0.1
    assert stability({"a": 600, "b": 400}, {"a": 400, "b": 600}) == pytest.approx(0.162, abs=0.01)


def test_divergence_and_quantiles() -> None:
    assert divergence({"a": 1}, {"a": 9}) == 0 and divergence({"a": 1}, {"b": 1}) == pytest.approx(1)
    histogram = np.bincount([3] * 50 + [7] * 49 + [90])
    assert quantiles(histogram) == {"q01": 3, "q05": 3, "q50": 3, "q95": 7, "q99": 7}
