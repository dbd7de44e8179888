"""What an observer of an episode is told while it is played. Knows no engine and no transport; changes nothing of the episode.

Order: in each turn of the model any number of TextDelta, then one TurnEnded; for each search SearchBegan, then SearchEnded; Shown for
text that the model is given to read; at last one Ended. An episode that is cancelled ends without Ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from research_rl.episode.trajectory import Passage, SearchRecord, Trajectory

__all__ = ["Ended", "Event", "GrowingText", "Observer", "SearchBegan", "SearchEnded", "Shown", "TextDelta", "TurnEnded"]

_UNDECODED = "\ufffd"


@dataclass(frozen=True)
class TextDelta:
    """The next piece of what the model writes, special tokens shown."""

    text: str


@dataclass(frozen=True)
class TurnEnded:
    """A turn is over; `text` is all of it and counts where the pieces should differ from it."""

    text: str
    tokens: int


@dataclass(frozen=True)
class SearchBegan:
    """A search is sent; `query` is empty where the model wrote none, and nothing is sent then."""

    query: str


@dataclass(frozen=True)
class SearchEnded:
    """What a search brought, best first, or why it brought nothing (`record.error`)."""

    record: SearchRecord
    passages: tuple[Passage, ...]


@dataclass(frozen=True)
class Shown:
    """What the model was given to read: the passages, cut to their limit."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Ended:
    """The episode is over."""

    trajectory: Trajectory


Event = TextDelta | TurnEnded | SearchBegan | SearchEnded | Shown | Ended
Observer = Callable[[Event], None]
"""Called in the event loop between two steps: it must return at once, and what it raises ends the episode as an engine's failure does."""


class GrowingText:
    """The text of ids that arrive a few at a time: `add` returns what is new. Reads each id a fixed number of times.

    Characters whose bytes are spread over several tokens are held back until they are whole.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.text = ""
        self._decode = decode
        self._ids: list[int] = []
        # The ids of the last piece are decoded once more with the next one: a decoder may write a word differently at the beginning.
        self._before = self._shown = 0

    def add(self, ids: Sequence[int]) -> str:
        """Return the text that `ids` add."""
        self._ids += ids
        known = self._decode(self._ids[self._before : self._shown])
        text = self._decode(self._ids[self._before :])
        if text.endswith(_UNDECODED) or len(text) <= len(known):
            return ""
        self._before, self._shown = self._shown, len(self._ids)
        self.text += text[len(known) :]
        return text[len(known) :]
