"""Compare a prediction with gold answers. Knows strings only: no tokens of a model, no trajectories.

Source: the normalisation and token F1 of SQuAD as the published ReSearch code applies them
(verl/utils/reward_score/re_search.py).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

__all__ = ["contains", "exact_match", "normalize", "recall", "token_f1"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED = frozenset({"yes", "no", "noanswer"})


def normalize(text: str) -> str:
    """Lower-case, drop punctuation and articles, squeeze white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


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
    return max((_f1(normalize(prediction), normalize(gold)) for gold in golds), default=0.0)


def recall(found: Sequence[str], wanted: Sequence[str]) -> float | None:
    """Return the share of `wanted` ids among `found`; None when nothing is wanted."""
    return len(set(found) & set(wanted)) / len(set(wanted)) if wanted else None


def _f1(prediction: str, gold: str) -> float:
    if prediction != gold and (prediction in _CLOSED or gold in _CLOSED):
        return 0.0
    predicted, expected = Counter(prediction.split()), Counter(gold.split())
    common = sum((predicted & expected).values())
    if common == 0:
        return 0.0
    precision, share = common / predicted.total(), common / expected.total()
    return 2 * precision * share / (precision + share)
