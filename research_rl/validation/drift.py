"""Compare a snapshot's statistics with those of the last accepted one. Knows numbers; knows no file, no expectation.

Shares are compared by the population stability index, less what chance alone gives for samples of these sizes, so that small
sets raise no alarm by being small: 0 is no change, 0.1 a visible one, 0.25 a large one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from research_rl.data.flashrag import Question
from research_rl.reward.words import terms
from research_rl.validation.corpus import LONGEST, CorpusStatistics
from research_rl.validation.questions import answer_kind, opening

__all__ = ["compare", "corpus_profile", "quantiles", "question_profile", "stability"]

VOCABULARY = 500
QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)
# Half-octave bins of lengths: 1, 2, 3, 4, 6, 8, 11, 16, ...
_EDGES = np.unique(np.round(2.0 ** (np.arange(0, 33) / 2)).astype(int))
_WORD = re.compile(r"[^\W\d_]{2,}")

Profile = dict[str, Any]
"""Compact statistics of one set: rows, `lengths` (quantiles and bins a measure), `shares` (counts a kind), `vocabulary`."""


def corpus_profile(corpus: CorpusStatistics) -> Profile:
    """Return the profile of a corpus; the vocabulary is that of its sample."""
    vocabulary = Counter(word for _, _, text in corpus.sample for word in _WORD.findall(" ".join(terms(text))))
    return {
        "rows": corpus.rows,
        "lengths": {"chars": _lengths(corpus.chars), "words": _lengths(corpus.words)},
        "shares": {},
        # In order of the words: equal snapshots give equal files.
        "vocabulary": dict(sorted(vocabulary.most_common(VOCABULARY))),
    }


def question_profile(questions: Sequence[Question], rows: Sequence[Mapping[str, Any]]) -> Profile:
    """Return the profile of a question set; `rows` are those of `questions.rows`."""
    return {
        "rows": len(rows),
        "lengths": {
            name: _lengths(np.bincount([min(row[name], LONGEST) for row in rows], minlength=LONGEST + 1)) for name in ("chars", "words")
        },
        "shares": {
            "openings": _counts(opening(question.question) for question in questions),
            "answers": _counts(answer_kind(question.golden_answers[0]) for question in questions),
        },
        "vocabulary": {},
    }


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


def _lengths(histogram: Any) -> dict[str, Any]:
    bins = np.add.reduceat(histogram, np.append(0, _EDGES[len(histogram) > _EDGES]))
    return {**quantiles(histogram), "bins": np.trim_zeros(bins, "b").tolist()}


def quantiles(histogram: Any) -> dict[str, int]:
    """Return exact quantiles of lengths counted one by one."""
    upto = np.cumsum(histogram)
    return {f"q{round(100 * q):02d}": int(np.searchsorted(upto, q * upto[-1])) for q in QUANTILES}


def compare(old: Mapping[str, Profile], new: Mapping[str, Profile]) -> list[dict[str, Any]]:
    """Return one row a set and measure, with its value in the column of its kind: rows, shape or vocabulary."""
    moved: list[dict[str, Any]] = []
    for name in new:
        if name not in old:
            continue
        before, after = old[name], new[name]
        moved.append(_row(name, "rows", "rows", abs(after["rows"] / max(1, before["rows"]) - 1), before["rows"], after["rows"]))
        for measure, lengths in after["lengths"].items():
            earlier = before["lengths"][measure]
            shift = stability(dict(enumerate(earlier["bins"])), dict(enumerate(lengths["bins"])))
            moved.append(_row(name, measure, "shape", shift, _spread(earlier), _spread(lengths)))
        for measure, counts in after["shares"].items():
            shift = stability(before["shares"][measure], counts)
            moved.append(_row(name, measure, "shape", shift, _top(before["shares"][measure]), _top(counts)))
        if after["vocabulary"]:
            words = (before["vocabulary"], after["vocabulary"])
            moved.append(_row(name, "words used", "vocabulary", divergence(*words), *map(_top, words)))
    return moved


def _row(name: str, measure: str, kind: str, value: float, before: object, after: object) -> dict[str, Any]:
    empty = dict.fromkeys(("rows", "shape", "vocabulary"), math.nan)
    return {"set": name, "measure": measure, **empty, kind: round(value, 6), "before": str(before), "after": str(after)}


def _spread(lengths: Mapping[str, int]) -> str:
    return f"{lengths['q05']} / {lengths['q50']} / {lengths['q95']}"


def _top(counts: Mapping[str, int]) -> str:
    total = max(1, sum(counts.values()))
    best = sorted(counts, key=lambda name: (-counts[name], name))[:3]
    return ", ".join(f"{name} {counts[name] / total:.0%}" for name in best)


def stability(old: Mapping[Any, int], new: Mapping[Any, int]) -> float:
    """Return the population stability index of two counts, less its expectation for equal populations, at least 0."""
    names = sorted({*old, *new})
    before, after = (np.array([counts.get(name, 0) for name in names], float) for counts in (old, new))
    names_used = int(((before + after) > 0).sum())
    # The index of two samples of one population is this on average.
    chance = (names_used - 1) * (1 / max(1, before.sum()) + 1 / max(1, after.sum()))
    # Half a count more in each place: one that is empty on one side would make the logarithm infinite.
    p, q = ((counts + 0.5) / (counts + 0.5).sum() for counts in (before, after))
    return max(0.0, float(((q - p) * np.log(q / p)).sum()) - chance)


def divergence(old: Mapping[str, int], new: Mapping[str, int]) -> float:
    """Return the Jensen-Shannon divergence of two word counts in bits: 0 the same, 1 nothing in common."""
    names = sorted({*old, *new})
    p, q = (np.array([counts.get(name, 0) for name in names], float) for counts in (old, new))
    p, q = p / max(1.0, p.sum()), q / max(1.0, q.sum())
    middle = (p + q) / 2

    def part(shares: Any) -> float:
        # A word that does not occur adds nothing; its logarithm would be infinite.
        some = shares > 0
        return float((shares[some] * np.log2(shares[some] / middle[some])).sum())

    return (part(p) + part(q)) / 2
