"""Describe question sets row by row, one dict a question: lengths, defects, repeats, leaks. Judges nothing.

Exact repeats have the same words in the same order (case and punctuation aside). Near repeats share at least a given share of
their words, function words aside, in any order; all such pairs are found, none by chance.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import pyarrow as pa

from research_rl.data.flashrag import Question, supporting_ids
from research_rl.reward.metrics import unreachable
from research_rl.reward.words import terms, words
from research_rl.validation.answers import Sought
from research_rl.validation.columns import encoding_defects
from research_rl.validation.corpus import CorpusStatistics, shorten

__all__ = ["COLUMNS", "Texts", "answer_kind", "opening", "rows"]

COLUMNS = (
    "line", "id", "text", "chars", "words", "answers", "longest_answer", "echo", "replacement", "control", "mojibake",
    "unnormalised", "unreachable", "repeated", "leaked", "near", "shared", "answered", "unknown_support", "note",
)  # fmt: skip
# With the `s` of a genitive, and with `name`, which opens a question as `which` does.
_FUNCTION_WORDS = frozenset(
    [
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "been",
        "being",
        "by",
        "did",
        "do",
        "does",
        "for",
        "from",
        "had",
        "has",
        "have",
        "he",
        "her",
        "his",
        "how",
        "in",
        "is",
        "it",
        "its",
        "of",
        "on",
        "or",
        "s",
        "she",
        "that",
        "the",
        "their",
        "they",
        "this",
        "those",
        "to",
        "was",
        "were",
        "what",
        "when",
        "where",
        "which",
        "who",
        "whom",
        "whose",
        "why",
        "will",
        "with",
        "name",
    ]
)
_OPENINGS = ("who", "whom", "whose", "what", "which", "when", "where", "why", "how", "is", "are", "was", "were", "do", "does", "did")
_YEAR = re.compile(r"\b1\d{3}\b|\b20\d{2}\b")


@dataclass
class Texts:
    """The questions of some sets, to look others up in: by their words in order, and by the words they share."""

    threshold: float

    def __post_init__(self) -> None:
        self._exact: dict[str, str] = {}
        self._sets: list[tuple[frozenset[str], str]] = []
        self._by_word: dict[str, list[int]] = {}
        self._frequency: Counter[str] = Counter()

    def add(self, split: str, questions: Sequence[Question]) -> None:
        """Take in a set; lines count from 1."""
        for line, question in enumerate(questions, 1):
            where = f"{split} line {line}"
            self._sets.append((content_words(question.question), where))
            self._exact.setdefault(" ".join(words(question.question)), where)
        # Anew: which words of a set are its rarest depends on all sets.
        self._index()

    def _index(self) -> None:
        self._frequency = Counter(word for content, _ in self._sets for word in content)
        self._by_word = {}
        for place, (content, _) in enumerate(self._sets):
            for word in self._prefix(content):
                self._by_word.setdefault(word, []).append(place)

    def _prefix(self, content: frozenset[str]) -> list[str]:
        """Return the rarest words of a set: two sets that share enough words share one of these (prefix filter)."""
        ordered = sorted(content, key=lambda word: (self._frequency[word], word))
        # Less a little, so that rounding loses no pair whose overlap is the threshold itself.
        return ordered[: len(content) - ceil(self.threshold * len(content) - 1e-9) + 1]

    def exact(self, question: str) -> str:
        """Return where a question with the same words in the same order stands, or nothing."""
        return self._exact.get(" ".join(words(question)), "")

    def near(self, question: str) -> str:
        """Return where a question stands whose content words overlap (Jaccard) by at least the threshold, or nothing."""
        content = content_words(question)
        # Questions that share their only content word need not be alike.
        if len(content) < 2:
            return ""
        seen: set[int] = set()
        for word in self._prefix(content):
            for place in self._by_word.get(word, ()):
                if place not in seen:
                    seen.add(place)
                    other, where = self._sets[place]
                    if len(content & other) >= self.threshold * len(content | other) - 1e-9:
                        return where
        return ""


def content_words(text: str) -> frozenset[str]:
    """Return the terms of a text (words, or character n-grams, see `words.terms`) that are no English function words."""
    return frozenset(terms(text)) - _FUNCTION_WORDS


def opening(question: str) -> str:
    """Return the word that says what is asked for, "other" when there is none among the first three."""
    return next((word for word in words(question)[:3] if word in _OPENINGS), "other")


def answer_kind(answer: str) -> str:
    """Return yes/no, year, number, name (capitalised), or phrase."""
    text = answer.strip()
    if text.lower() in ("yes", "no"):
        return "yes/no"
    if any(letter.isdigit() for letter in text):
        return "year" if _YEAR.search(text) else "number"
    return "name" if text[:1].isupper() else "phrase"


def rows(questions: Sequence[Question], earlier: Mapping[str, Texts], sought: Sought, corpus: CorpusStatistics) -> list[dict[str, Any]]:
    """Return one row a question with COLUMNS; `earlier` holds what counts as leaked and, under "dev", what is merely shared."""
    texts = pa.array([" ".join((item.question, *item.golden_answers)) for item in questions], pa.large_string())
    defects = encoding_defects(texts)
    first: dict[str, int] = {}
    described: list[dict[str, Any]] = []
    for line, item in enumerate(questions, 1):
        key = " ".join(words(item.question))
        before = first.setdefault(key, line)
        leak, near, shared = _leaks(item.question, earlier)
        notes = [f"repeats line {before}"] * (before < line) + [f"as {leak}"] * bool(leak) + [f"nearly {near}"] * bool(near)
        never_paid = unreachable(item.golden_answers)
        notes += [f"{len(never_paid)} gold answers are empty once normalised and never match: {shorten(repr(never_paid))}"] * bool(
            never_paid
        )
        absent = sought.missing(supporting_ids(item), corpus.known)
        notes += [f"no such passage: {shorten(', '.join(absent))}"] * bool(absent)
        described.append(
            {
                "line": line,
                "id": item.id,
                "text": shorten(f"{item.question} -> {' | '.join(item.golden_answers)}"),
                "chars": len(item.question),
                "words": len(words(item.question)),
                "answers": len(item.golden_answers),
                "longest_answer": max(map(len, item.golden_answers), default=0),
                "echo": int(any(" ".join(words(answer)) == key for answer in item.golden_answers)),
                **{name: int(mask[line - 1]) for name, mask in defects.items()},
                "unreachable": len(never_paid),
                "repeated": int(before < line),
                "leaked": int(bool(leak)),
                "near": int(bool(near)),
                "shared": int(bool(shared)),
                "answered": int(sought.answered(item.golden_answers, corpus.present)),
                "unknown_support": len(absent),
                "note": ", ".join(notes),
            }
        )
    return described


def _leaks(question: str, earlier: Mapping[str, Texts]) -> tuple[str, str, str]:
    """Return where the question stands in train, nearly stands in train, and stands in dev."""
    train, dev = earlier.get("train"), earlier.get("dev")
    exact = train.exact(question) if train else ""
    near = train.near(question) if train and not exact else ""
    return exact, near, dev.exact(question) if dev else ""
