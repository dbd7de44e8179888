"""What one episode leaves behind. Knows token ids, text and authors; knows no engine, no reward rule.

Invariants: (1) concatenated segment ids are the response exactly as the engine saw it; (2) every trajectory has one
StopReason; (3) `author` alone decides the loss mask: model 1, search 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain
from typing import Any

__all__ = ["Author", "Passage", "Place", "SearchFault", "SearchRecord", "Segment", "StopReason", "Trajectory"]


Place = tuple[str, int, int]
"""A passage's id, and from which to before which character it stands in a text."""


class Author(StrEnum):
    """Who wrote a segment."""

    MODEL = "model"
    SEARCH = "search"


class StopReason(StrEnum):
    """Why an episode ended; exactly one each, and each is a metric."""

    ANSWERED = "answered"
    """The model closed its turn (end of sequence) after `</answer>`."""
    MALFORMED = "malformed"
    """The model ended its turn without a complete answer."""
    SEARCH_LIMIT = "search_limit"
    """The model asked for one search more than allowed."""
    TOKEN_LIMIT = "token_limit"
    """The response budget was used up."""
    TIME_LIMIT = "time_limit"
    """The episode's wall time was used up."""
    ENGINE_FAILURE = "engine_failure"
    """The engine raised; what was written before is kept."""


class SearchFault(StrEnum):
    """Why a search brought no passage; at most one each, and each is a metric."""

    EMPTY_QUERY = "empty_query"
    """The model wrote no query."""
    NOTHING = "nothing"
    """The retriever answered, without a passage."""
    REFUSED = "refused"
    """The retriever refused this query (400, 413, 422)."""
    DENIED = "denied"
    """The retriever refuses every request of this client (another 4xx): token or address are wrong."""
    NO_CONNECTION = "no_connection"
    """The client had no free connection: the caller searches more at once than it said."""
    TIMEOUT = "timeout"
    """No answer within the search's deadline."""
    UNREACHABLE = "unreachable"
    """No connection, or one that broke."""
    BUSY = "busy"
    """The retriever turned the search away (503, 429)."""
    SERVER_ERROR = "server_error"
    """Another 5xx."""
    GARBAGE = "garbage"
    """An answer that is not understood."""
    BROKEN = "broken"
    """The searcher raised."""
    NOT_ON_TAPE = "not_on_tape"
    """A tape is replayed in the index's place, and this search was not recorded."""

    @property
    def is_service(self) -> bool:
        """Whether the retriever or the way to it failed; the other faults are of the query that the model wrote, and answers to it."""
        # Training pauses over a failing service; pausing over a bad query would wait for something that never gets better.
        return self not in (SearchFault.EMPTY_QUERY, SearchFault.NOTHING, SearchFault.REFUSED)


@dataclass(frozen=True)
class Passage:
    """One retrieved passage; `score` is the inner product, or what a hybrid index or a reranker gives."""

    id: str
    contents: str
    score: float = 0.0


@dataclass(frozen=True)
class SearchRecord:
    """One search: the model's query, what came back, how long it took; `error` tells a failure, `fault` names its kind."""

    query: str
    passage_ids: tuple[str, ...]
    seconds: float
    error: str | None = None
    fault: SearchFault | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return {**vars(self), "fault": self.fault.value if self.fault else None}


@dataclass(frozen=True)
class Segment:
    """Consecutive response tokens of one author. `logprobs` is as long as `ids`, 0.0 where unknown.

    `read` counts the tokens that the engine read for a turn of the model. `search` is the place, from 0, of the search whose result the
    environment shows; a `message` answers no search. `passages` says which passage stands where in `text`, as (id, start,
    end) in characters. None: not recorded.
    """

    author: Author
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    read: int | None = None
    search: int | None = None
    message: bool = False
    passages: tuple[Place, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record without token ids; what is not recorded is left out."""
        record: dict[str, Any] = {"author": self.author.value, "text": self.text, "tokens": len(self.ids)}
        for name in ("read", "search"):
            if getattr(self, name) is not None:
                record[name] = getattr(self, name)
        if self.message:
            record["message"] = True
        if self.passages is not None:
            record["passages"] = [list(place) for place in self.passages]
        return record


@dataclass
class Trajectory:
    """One episode: prompt, authored segments, stop reason and searches."""

    prompt_ids: tuple[int, ...]
    segments: list[Segment] = field(default_factory=list[Segment])
    searches: list[SearchRecord] = field(default_factory=list[SearchRecord])
    stop: StopReason = StopReason.MALFORMED
    # As the engine reported it: text that a tokenizer decodes can end like an end of sequence without being one.
    ended_by_eos: bool = False
    engine_seconds: float = 0.0
    search_seconds: float = 0.0
    paused_seconds: float = 0.0
    error: str | None = None

    @property
    def response_ids(self) -> list[int]:
        """All response token ids in order."""
        return list(chain.from_iterable(segment.ids for segment in self.segments))

    @property
    def response_mask(self) -> list[int]:
        """1 for tokens of the model, 0 for tokens of the environment; as long as `response_ids`."""
        return list(chain.from_iterable([int(segment.author is Author.MODEL)] * len(segment.ids) for segment in self.segments))

    @property
    def response_logprobs(self) -> list[float]:
        """Sampling log-probabilities, 0.0 for the environment's tokens; as long as `response_ids`."""
        return list(chain.from_iterable(segment.logprobs for segment in self.segments))

    @property
    def text(self) -> str:
        """The whole response as text, results included."""
        return "".join(segment.text for segment in self.segments)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record without token ids."""
        return {
            "stop": self.stop.value,
            "ended_by_eos": self.ended_by_eos,
            "prompt_tokens": len(self.prompt_ids),
            "segments": [segment.to_json() for segment in self.segments],
            "searches": [search.to_json() for search in self.searches],
            "engine_seconds": round(self.engine_seconds, 4),
            "search_seconds": round(self.search_seconds, 4),
            "paused_seconds": round(self.paused_seconds, 4),
            "error": self.error,
        }
