"""Compare a prediction with gold answers. Knows strings only: no tokens of a model, no trajectories.

Source: the normalisation and token F1 of SQuAD as the published ReSearch code applies them
(verl/utils/reward_score/re_search.py); cover exact match, token precision and token recall as its evaluation does
(flashrag/evaluator/metrics.py), each its maximum over the gold answers, so that precision and recall may be of different ones.

Deviations: (1) text in a script without spaces between words (Chinese, Japanese, Thai and others, see `words`) is compared
character by character, as MLQA does by its mixed segmentation: the published code takes a whole sentence for one word. Text
without such letters is normalised exactly as published. (2) A gold answer that normalises to nothing is matched by no prediction;
SQuAD's exact match gives it to an empty answer, and the published cover exact match to every answer.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from research_rl.reward import words

__all__ = [
    "contains",
    "cover_em",
    "exact_match",
    "findable",
    "normalize",
    "recall",
    "shares_words",
    "token_f1",
    "token_precision",
    "token_recall",
    "unreachable",
]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# Longer texts are retrieved passages and runaway answers: they hardly occur twice and would fill the memory.
_SHORT = 256
# As in HotpotQA's evaluation: an answer of these kinds is right or wrong as a whole.
_CLOSED = frozenset({"yes", "no", "noanswer"})


def normalize(text: str) -> str:
    """Lower-case, drop punctuation and articles, squeeze white space; put spaces between the characters of unsegmented scripts."""
    return _remembered(text) if len(text) <= _SHORT else _normalize(text)


def _normalize(text: str) -> str:
    published = _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION))
    return " ".join(words.words(published) if words.unsegmented(published) else published.split())


# The rollouts of a group share their gold answers, and every metric of an answer its prediction.
_remembered = lru_cache(1 << 16)(_normalize)


def unreachable(golds: Sequence[str]) -> list[str]:
    """Return the gold answers that normalise to nothing, such as "A" or "!": no metric pays for them, whatever the prediction."""
    return [gold for gold in golds if not normalize(gold)]


def findable(golds: Sequence[str]) -> list[str]:
    """Return the gold answers that can be looked for in a passage: neither empty nor yes or no, which stand there and answer nothing."""
    return [gold for gold in golds if normalize(gold) not in {"", *_CLOSED}]


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """Return 1.0 when the normalised prediction equals a normalised gold answer, else 0.0."""
    answer = normalize(prediction)
    return float(any(answer == gold for gold in map(normalize, golds) if gold))


def contains(prediction: str, golds: Sequence[str]) -> float:
    """Return 1.0 when the words of a gold answer stand side by side in the prediction, else 0.0. Rewards stuffing.

    Whole words count: "1" is not in "21", as it is for `cover_em`. In unsegmented scripts each character is a word.
    """
    answer = f" {normalize(prediction)} "
    return float(any(f" {gold} " in answer for gold in map(normalize, golds) if gold))


def cover_em(prediction: str, golds: Sequence[str]) -> float:
    """Return 1.0 when a normalised gold answer is a part of the normalised prediction, else 0.0: "acc" of the published evaluation.

    Letters count, not words: "no" is in "know" and "1" in "21", as they are not for `contains`.
    """
    answer = normalize(prediction)
    return float(any(gold in answer for gold in map(normalize, golds) if gold))


def shares_words(words_in_order: Sequence[str], count: int, texts: Iterable[str]) -> bool:
    """Return whether `count` consecutive ones of the normalised words stand side by side in one of the texts, which are normalised here."""
    runs = {" ".join(words_in_order[start : start + count]) for start in range(len(words_in_order) - count + 1)}
    normalized = (f" {normalize(text)} " for text in texts) if runs else ()
    return any(f" {run} " in text for text in normalized for run in runs)


def token_f1(prediction: str, golds: Sequence[str]) -> float:
    """Return the best token F1 (2PR/(P+R) over token multisets) over the gold answers, 0.0 to 1.0.

    A gold answer scores 0 when it or the prediction is yes, no or noanswer and the two differ.
    """
    answer = normalize(prediction)
    return max((_f1(answer, normalize(gold)) for gold in golds), default=0.0)


def token_precision(prediction: str, golds: Sequence[str]) -> float:
    """Return the best share of the prediction's tokens that a gold answer has, 0.0 to 1.0; closed answers as in `token_f1`."""
    answer = normalize(prediction)
    return max((_overlap(answer, normalize(gold))[0] for gold in golds), default=0.0)


def token_recall(prediction: str, golds: Sequence[str]) -> float:
    """Return the best share of a gold answer's tokens that the prediction has, 0.0 to 1.0; closed answers as in `token_f1`.

    Of words; the share of the supporting passages that search found is `recall`.
    """
    answer = normalize(prediction)
    return max((_overlap(answer, normalize(gold))[1] for gold in golds), default=0.0)


def recall(retrieved: Sequence[str], relevant: Sequence[str]) -> float | None:
    """Return the share of the `relevant` ids among `retrieved`; None when there is no relevant one."""
    return len(set(retrieved) & set(relevant)) / len(set(relevant)) if relevant else None


def _f1(prediction: str, gold: str) -> float:
    precision, share = _overlap(prediction, gold)
    return 2 * precision * share / (precision + share) if precision else 0.0


def _overlap(prediction: str, gold: str) -> tuple[float, float]:
    """Return token precision and token recall against one gold answer; both texts are normalised."""
    if prediction != gold and (prediction in _CLOSED or gold in _CLOSED):
        return 0.0, 0.0
    if prediction == gold:
        return (1.0, 1.0) if gold else (0.0, 0.0)
    predicted, expected = prediction.split(), gold.split()
    common = _common(predicted, expected)
    return (common / len(predicted), common / len(expected)) if common else (0.0, 0.0)


def _common(predicted: Sequence[str], expected: Sequence[str]) -> int:
    """Return the size of the two multisets' intersection."""
    if len(expected) == 1:
        return int(expected[0] in predicted)
    expected_counts = Counter(expected)
    return sum((expected_counts & Counter(predicted)).values()) if not expected_counts.keys().isdisjoint(predicted) else 0
