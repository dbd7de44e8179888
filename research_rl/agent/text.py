"""What a policy writes, told apart while it arrives: thoughts, and the answer without its box. Knows tags; knows no tokens.

Invariants: (1) pieces of any size give the same texts; (2) a tag is never shown, nor a part of one; (3) the answer is what stands in the
first <answer> block, as in `reward.rules`; whatever else the policy writes outside <search> counts as thought.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from research_rl.episode import protocol

__all__ = ["Kind", "Unboxed", "Writing"]

Kind = Literal["thought", "answer"]
_THINK = (protocol.THINK_OPEN, protocol.THINK_CLOSE)
_NO_TEXT = frozenset({"\\[", "\\]"})


class Unboxed:
    """An answer without LaTeX's display brackets and without the box around its words: `\\[ \\boxed{Ada} \\]` reads `Ada`."""

    def __init__(self) -> None:
        self._pending = ""
        self._depth = 0
        self._last = " "
        self._after_bracket = False

    def add(self, text: str) -> str:
        """Return what can be shown after `text`."""
        return "".join(self._spaced(self._next(character)) for character in text)

    def rest(self) -> str:
        """Return what was held back, at the end of the answer."""
        rest, self._pending = self._pending, ""
        return rest

    def _spaced(self, text: str) -> str:
        """Return `text` without the space that followed a bracket which is left out, where one stands before it already."""
        if text and self._after_bracket:
            self._after_bracket = False
            if text == self._last == " ":
                return ""
        self._last = text[-1:] or self._last
        return text

    def _next(self, character: str) -> str:
        if not self._pending:
            return self._plain(character)
        read = self._pending + character
        self._pending = ""
        if read in _NO_TEXT:
            self._after_bracket = True
            return ""
        if read == protocol.BOXED_OPEN:
            self._depth += 1
            return ""
        if protocol.BOXED_OPEN.startswith(read):
            self._pending = read
            return ""
        # No mark after all: what was held back is text, and this character may begin another mark.
        return read[:-1] + self._plain(character)

    def _plain(self, character: str) -> str:
        if character == "\\":
            self._pending = character
            return ""
        # Inside the box braces of the answer's own are counted, so that the box's last one is known.
        if self._depth and character in "{}":
            self._depth += 1 if character == "{" else -1
            return character if self._depth else ""
        return character


@dataclass
class Writing:
    """The running text of one episode's turns; `marks` are special tokens, which are left out."""

    marks: tuple[str, ...] = ()
    state: Literal["thought", "search", "answer", "done"] = "thought"
    answered: bool = False
    _held: str = ""
    _query: str = ""
    _unboxed: Unboxed = field(default_factory=Unboxed)

    def add(self, text: str) -> list[tuple[Kind, str]]:
        """Return what `text` adds, in order."""
        self._held += text
        shown: list[tuple[Kind, str]] = []
        while first := self._first_tag():
            place, tag = first
            before, self._held = self._held[:place], self._held[place + len(tag) :]
            shown += [*self._text(before), *self._enter(tag)]
        keep = self._beginning_of_a_tag()
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return _joined([*shown, *self._text(ready)])

    def end_turn(self, *, searches: bool) -> list[tuple[Kind, str]]:
        """Return what was held back. A query that no search was made of counts as thought."""
        shown = self._text(self._held)
        if self._query and not searches:
            shown.append(("thought", self._query))
        if self.state == "answer":
            shown.append(("answer", self._unboxed.rest()))
        self._held = self._query = ""
        # An answer that was not closed is none: the next turn thinks again.
        self.state = "thought"
        return _joined(shown)

    @property
    def _tags(self) -> tuple[str, ...]:
        """The tags that mean something where the text stands now."""
        if self.state == "search":
            return (protocol.SEARCH_CLOSE, *self.marks)
        if self.state == "answer":
            return (protocol.ANSWER_CLOSE, *self.marks)
        # The reward grades the first answer alone, so a second one counts as thought.
        opening = (protocol.SEARCH_OPEN,) if self.answered else (protocol.SEARCH_OPEN, protocol.ANSWER_OPEN)
        return (*opening, *_THINK, *self.marks)

    def _first_tag(self) -> tuple[int, str] | None:
        places = [(place, tag) for tag in self._tags if (place := self._held.find(tag)) >= 0]
        return min(places, default=None)

    def _beginning_of_a_tag(self) -> int:
        """Return how many characters at the end may be the beginning of a tag."""
        tags = self._tags
        # A whole tag would have been found before this, so at most all but its last character can stand at the end.
        longest = min(max(map(len, tags)) - 1, len(self._held))
        return next((size for size in range(longest, 0, -1) if any(tag.startswith(self._held[-size:]) for tag in tags)), 0)

    def _enter(self, tag: str) -> list[tuple[Kind, str]]:
        if tag == protocol.SEARCH_OPEN:
            self.state, self._query = "search", ""
        elif tag == protocol.ANSWER_OPEN:
            self.state, self.answered, self._unboxed = "answer", True, Unboxed()
        elif tag == protocol.ANSWER_CLOSE:
            self.state = "done"
            return [("answer", self._unboxed.rest())]
        return []

    def _text(self, text: str) -> list[tuple[Kind, str]]:
        if self.state == "search":
            self._query += text
            return []
        if self.state == "answer":
            return [("answer", self._unboxed.add(text))]
        return [("thought", text)]


def _joined(pieces: list[tuple[Kind, str]]) -> list[tuple[Kind, str]]:
    """Return the pieces with neighbours of one kind joined and without empty ones."""
    joined: list[tuple[Kind, str]] = []
    for kind, text in pieces:
        if joined and text and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + text)
        elif text:
            joined.append((kind, text))
    return joined
