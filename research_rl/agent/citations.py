"""Which passages an answer stands in, found without the model. Knows strings; normalises as the metrics do.

Invariant: the cited text, normalised, equals the normalised answer. A passage that was found but cut off before the answer stands in it is
cited as not read, and supports nothing.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from research_rl.episode import protocol
from research_rl.episode.trajectory import Passage
from research_rl.reward import words
from research_rl.reward.metrics import findable, normalize

__all__ = ["Citation", "Search", "cite", "is_supported", "place"]


@dataclass(frozen=True)
class Search:
    """One search of an episode that brought passages, best first."""

    query: str
    passages: tuple[Passage, ...]


@dataclass(frozen=True)
class Citation:
    """Where an answer stands: characters `start` to `end` of the passage's contents, `search` and `rank` counted from 0.

    `read` is whether the model was shown the passage up to there.
    """

    passage_id: str
    search: int
    rank: int
    start: int
    end: int
    text: str
    read: bool


def cite(answer: str, searches: Sequence[Search], tokens: Callable[[str], int], max_result_tokens: int) -> list[Citation]:
    """Return the first place of `answer` in each passage that holds it, in the order of searching; a passage found again counts once.

    `tokens` counts the tokens of a text; a search showed the model `max_result_tokens` of its passages.
    """
    citations: dict[str, Citation] = {}
    for number, search in enumerate(searches):
        before = ""
        for rank, passage in enumerate(search.passages):
            if span := place(answer, passage.contents):
                shown = protocol.neutralise(before + passage.contents[: span[1]])
                read = tokens(shown.lstrip()) <= max_result_tokens
                known = citations.get(passage.id)
                if known is None or (read and not known.read):
                    citations[passage.id] = Citation(passage.id, number, rank, *span, passage.contents[span[0] : span[1]], read)
            # As the episode joins what it shows.
            before += passage.contents + "\n\n"
    return sorted(citations.values(), key=lambda citation: (citation.search, citation.rank))


def is_supported(answer: str | None, citations: Sequence[Citation]) -> bool | None:
    """Return whether a passage that was read holds the answer; None where that cannot be said: no answer, yes or no."""
    if answer is None or not findable([answer]):
        return None
    return any(citation.read for citation in citations)


def place(answer: str, text: str) -> tuple[int, int] | None:
    """Return where `answer` first stands in `text`, compared as normalised words; None when it does not."""
    answer_words = normalize(answer).split() if findable([answer]) else []
    if not answer_words:
        return None
    pieces = [(word, match.span()) for match in _pieces().finditer(text) for word in normalize(match[0]).split()]
    for first in range(len(pieces) - len(answer_words) + 1):
        run = pieces[first : first + len(answer_words)]
        # The first word is compared by itself: nearly every place fails there, before a list is made.
        if run[0][0] == answer_words[0] and [word for word, _ in run] == answer_words:
            start, end = _trimmed(text, run[0][1][0], run[-1][1][1])
            # A piece may hold more words than its share of the answer, and articles between words belong to neither.
            if normalize(text[start:end]).split() == answer_words:
                return start, end
    return None


@lru_cache(1)
def _pieces() -> re.Pattern[str]:
    """Words by white space; single characters, with their marks, of scripts that put none between words."""
    letters = words.UNSEGMENTED
    return re.compile(f"[{letters}][{words.marks()}]*|[^\\s{letters}]+")


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Return the span without punctuation at its ends, which normalisation drops."""
    while start < end and text[end - 1] in string.punctuation:
        end -= 1
    while start < end and text[start] in string.punctuation:
        start += 1
    return start, end
