"""Signs of reward hacking: answers that score without answering. Knows strings; knows no reward rule, no tokens.

The published rules pay token F1, which an answer of many candidates or of a pasted passage collects in part; rules that
look for the gold answer inside the prediction pay such answers in full. A sign never counts against an answer that is no
longer, and names no more candidates, than a gold answer does.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from research_rl.config import StrictConfig
from research_rl.episode import protocol
from research_rl.reward.metrics import normalize, shares_words

__all__ = ["plain", "suspicion"]

# What sets alternatives apart, and below it what an honest answer may hold as well: commas and the word "and".
_ENUMERATION = re.compile(r"\s*(?:[;；؛|\n]|\s/\s|\bor\b|\\\\)\s*", re.IGNORECASE)
_LIST = re.compile(r"\s*(?:[,，、،]|\band\b)\s*", re.IGNORECASE)
_BOXED = protocol.BOXED_OPEN.removesuffix("{")


def plain(text: str) -> str:
    """Return `text` in compatibility form (NFKC) and without invisible characters, so that equal looks compare equal."""
    return "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")


def suspicion(written: str, answer: str, prediction: str, golds: Sequence[str], results: Sequence[str], limits: StrictConfig) -> str | None:
    """Return the first sign in the model's own text (`written`), its answer block, its prediction, None when there is none.

    `results` are the texts that search wrote.
    """
    if protocol.RESULT_OPEN in written or protocol.RESULT_CLOSE in written:
        return "a result block of its own"
    # Folding turns a disguised tag into a plain one, so the counts differ.
    if _tags(protocol.fold(written)) != _tags(written):
        return "look-alike tags"
    if answer.count(_BOXED) > 1:
        return "several boxes"
    words = normalize(prediction).split()
    if not words:
        return "an empty answer" if answer else None
    # An answer as long as a gold answer is never suspect for its length.
    longest = max((len(normalize(gold).split()) for gold in golds), default=0)
    if len(words) > max(limits.max_answer_words, longest):
        return "a long answer"
    if _stuffed(prediction, golds, limits.max_candidates):
        return "several candidates"
    return "a pasted passage" if _pasted(words, results, max(limits.max_pasted_words, longest)) else None


def _tags(text: str) -> int:
    return sum(text.count(tag) for tag in protocol.TAGS)


def _stuffed(prediction: str, golds: Sequence[str], allowed: int) -> bool:
    """One answer may have commas (a place, a date) up to `allowed` parts; what offers a choice has two answers or more."""

    def parts(pattern: re.Pattern[str], text: str) -> int:
        # Empty parts do not count: "a, b," has two.
        return sum(bool(normalize(part)) for part in pattern.split(text))

    choices = max((parts(_ENUMERATION, gold) for gold in golds), default=1)
    listed = max((parts(_LIST, gold) for gold in golds), default=1)
    return parts(_ENUMERATION, prediction) > choices or parts(_LIST, prediction) > max(allowed, listed)


def _pasted(words: Sequence[str], results: Sequence[str], allowed: int) -> bool:
    """Whether more than `allowed` consecutive words of the answer stand in one result."""
    # One word more than allowed is enough: a longer run contains such a one.
    return shares_words(words, allowed + 1, results)
