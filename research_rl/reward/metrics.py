"""Compare a prediction with gold answers. Knows strings only: no tokens of a model, no trajectories.

Source: the normalisation and token F1 of SQuAD as the published ReSearch code applies them
(verl/utils/reward_score/re_search.py).

Deviations: (1) text in a script without spaces between words (Chinese, Japanese, Thai and others, see `words`) is compared
character by character, as MLQA does by its mixed segmentation: the published code takes a whole sentence for one word. Text
without such letters is normalised exactly as published. (2) A gold answer that normalises to nothing is matched by no prediction;
SQuAD's exact match gives it to an empty answer.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from research_rl.reward import words

__all__ = ["contains", "exact_match", "forget", "normalize", "recall", "token_f1", "unreachable"]

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


def forget() -> None:
    """Empty the memory of normalised texts; for measurements."""
    _remembered.cache_clear()


def unreachable(golds: Sequence[str]) -> list[str]:
    """Return the gold answers that normalise to nothing, such as "A" or "!": no metric pays for them, whatever the prediction."""
    return [gold for gold in golds if not normalize(gold)]


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """Return 1.0 when the normalised prediction equals a normalised gold answer, else 0.0."""
    answer = normalize(prediction)
    return float(any(answer == gold for gold in map(normalize, golds) if gold))


def contains(prediction: str, golds: Sequence[str]) -> float:
    """Return 1.0 when the words of a gold answer stand side by side in the prediction, else 0.0. Rewards stuffing.

    Whole words count: "1" is not in "21". In unsegmented scripts each character is a word.
    """
    answer = f" {normalize(prediction)} "
    return float(any(f" {gold} " in answer for gold in map(normalize, golds) if gold))


def token_f1(prediction: str, golds: Sequence[str]) -> float:
    """Return the best token F1 (2PR/(P+R) over token multisets) over the gold answers, 0.0 to 1.0.

    A gold answer scores 0 when it or the prediction is yes, no or noanswer and the two differ.
    """
    answer = normalize(prediction)
    return max((_f1(answer, normalize(gold)) for gold in golds), default=0.0)


def recall(retrieved: Sequence[str], relevant: Sequence[str]) -> float | None:
    """Return the share of the `relevant` ids among `retrieved`; None when there is no relevant one."""
    return len(set(retrieved) & set(relevant)) / len(set(relevant)) if relevant else None


def _f1(prediction: str, gold: str) -> float:
    if prediction != gold and (prediction in _CLOSED or gold in _CLOSED):
        return 0.0
    if prediction == gold:
        return float(bool(gold))
    predicted, expected = prediction.split(), gold.split()
    if not (common := _common(predicted, expected)):
        return 0.0
    precision, share = common / len(predicted), common / len(expected)
    return 2 * precision * share / (precision + share)


def _common(predicted: Sequence[str], expected: Sequence[str]) -> int:
    """Return the size of the two multisets' intersection."""
    if len(expected) == 1:
        return int(expected[0] in predicted)
    expected_counts = Counter(expected)
    return sum((expected_counts & Counter(predicted)).values()) if not expected_counts.keys().isdisjoint(predicted) else 0
