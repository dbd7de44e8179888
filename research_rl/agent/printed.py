"""An answer in a terminal, as it arrives: one colour for each author. Knows the events of `responses`; knows no service.

Invariant: text of the policy and of passages reaches the terminal through `terminal.printable` alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TextIO, cast

from research_rl.terminal import printable

__all__ = ["Printed"]

_COLOURS = {"thought": "2", "search": "36", "passage": "33", "answer": "1;32", "trouble": "31", "fact": "2"}
_PASSAGE_CHARS = 400
_STANDING = {True: "the answer stands in {places}", False: "the answer stands in no passage that was read", None: ""}
_STOPS = {
    "malformed": "the policy ended without a complete answer",
    "search_limit": "the policy wanted more searches than episode.max_searches allows",
    "token_limit": "the response reached episode.max_response_tokens",
    "time_limit": "the time of episode.wall_s was used up",
}


class Printed:
    """Writes one answer to `stream`; in colours on a terminal, unless NO_COLOR is set."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._coloured = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._at_start = True
        self._kind = ""

    def take(self, event: Mapping[str, Any]) -> None:
        """Write what an event tells."""
        match event["type"]:
            case "response.reasoning_text.delta":
                self._write("thought", str(event["delta"]))
            case "response.output_text.delta":
                self._write("answer", str(event["delta"]), "answer: ")
            case "response.output_item.added" if event["item"]["type"] == "file_search_call":
                self._line("search", f"search: {event['item']['queries'][0] or '(no query)'}")
            case "response.output_item.done" if event["item"]["type"] == "file_search_call":
                self._passages(event["item"])
            case "response.completed" | "response.incomplete" | "response.failed":
                self._end(cast(dict[str, Any], event["response"]))
            case _:
                pass

    def stop(self) -> None:
        """End the line and the colour, when no more events will come."""
        if not self._at_start:
            self._put("\n")
        self._kind = ""

    def _passages(self, item: Mapping[str, Any]) -> None:
        if error := item.get("error"):
            self._line("trouble", f"search failed: {error}")
        for rank, result in enumerate(item.get("results") or ()):
            text = " ".join(str(result["text"]).split())
            shown = text if len(text) <= _PASSAGE_CHARS else f"{text[:_PASSAGE_CHARS]} ..."
            self._line("passage", f"  [{rank + 1}] {shown}")

    def _end(self, response: Mapping[str, Any]) -> None:
        facts: Mapping[str, Any] = response["research"]
        self.stop()
        if response["status"] == "failed":
            self._line("trouble", f"no answer: {response['error']['message']}")
            return
        if facts["answer"] is None:
            self._line("trouble", f"no answer: {_STOPS.get(facts['stop_reason'], facts['stop_reason'])}")
        elif response["status"] == "incomplete":
            self._line("trouble", f"cut off: {_STOPS.get(facts['stop_reason'], facts['stop_reason'])}")
        places = ", ".join(f"search {cited['search'] + 1} [{cited['rank'] + 1}]" for cited in facts["citations"] if cited["read"])
        standing = _STANDING[facts["supported"]].format(places=places)
        searches = f"{facts['searches']} search{'' if facts['searches'] == 1 else 'es'}"
        self._line("fact", "; ".join(filter(None, (standing, searches, f"{facts['seconds']['total']:.1f} s"))))

    def _line(self, kind: str, text: str) -> None:
        self.stop()
        self._write(kind, text)
        self.stop()

    def _write(self, kind: str, text: str, label: str = "") -> None:
        if kind != self._kind:
            self.stop()
            text, self._kind = label + text, kind
        safe = printable(text)
        self._put(f"\x1b[{_COLOURS[kind]}m{safe}\x1b[0m" if self._coloured else safe)

    def _put(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
        self._at_start = text.endswith("\n")
