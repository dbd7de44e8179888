"""Compare a prediction with gold answers. Knows strings only: no tokens of a model, no trajectories.

Source: the normalisation and token F1 of SQuAD as the published ReSearch code applies them
(verl/utils/reward_score/re_search.py).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

__all__ = ["contains", "exact_match", "forget", "normalize", "recall", "token_f1"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SHORT = 256
_CLOSED = frozenset({"yes", "no", "noanswer"})


def normalize(text: str) -> str:
    """Lower-case, drop punctuation and articles, squeeze white space."""
    return _remembered(text) if len(text) <= _SHORT else _normalize(text)


def _normalize(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


# The rollouts of a group share their gold answers, and every metric of an answer its prediction.
_remembered = lru_cache(1 << 16)(_normalize)


def forget() -> None:
    """Empty the memory of normalised texts; for measurements."""
    _remembered.cache_clear()


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """Return 1.0 when the normalised prediction equals a normalised gold answer, else 0.0."""
    found = normalize(prediction)
    return float(any(found == normalize(gold) for gold in golds))


def contains(prediction: str, golds: Sequence[str]) -> float:
    """Return 1.0 when a normalised gold answer stands anywhere in the normalised prediction, else 0.0. Rewards stuffing."""
    found = normalize(prediction)
    return float(any(normalize(gold) in found for gold in golds))


def token_f1(prediction: str, golds: Sequence[str]) -> float:
    """Return the best token F1 (2PR/(P+R) over token multisets) over the gold answers, 0.0 to 1.0.

    A gold answer scores 0 when it or the prediction is yes, no or noanswer and the two differ.
    """
    found = normalize(prediction)
    return max((_f1(found, normalize(gold)) for gold in golds), default=0.0)


def recall(found: Sequence[str], wanted: Sequence[str]) -> float | None:
    """Return the share of `wanted` ids among `found`; None when nothing is wanted."""
    return len(set(found) & set(wanted)) / len(set(wanted)) if wanted else None


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
    left = Counter(expected)
    return sum((left & Counter(predicted)).values()) if not left.keys().isdisjoint(predicted) else 0
