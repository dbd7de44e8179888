"""The one implementation of reason-with-search. Knows token ids, an engine and a searcher; knows no verl, no HTTP.

Training, evaluation and tests all drive `run_episode`; other ways of answering take the same steps through `recorded`.
Invariants: (1) ids the engine produced are never decoded and encoded again; (2) a failed search becomes an observation and a record,
never an exception; (3) every episode ends with exactly one StopReason; (4) the response never exceeds `max_response_tokens`; (5) time
before a closed gate counts against no limit, and a search that failed while the gate closed is asked again after it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Protocol, runtime_checkable

from research_rl.episode import protocol
from research_rl.episode.events import Ended, Event, GrowingText, Observer, SearchBegan, SearchEnded, Shown, TextDelta, TurnEnded
from research_rl.episode.trajectory import Author, Passage, Place, SearchFault, SearchRecord, Segment, StopReason, Trajectory

__all__ = [
    "Completion",
    "Engine",
    "Limits",
    "SearchFailure",
    "SearchGate",
    "Searcher",
    "Steps",
    "StreamingEngine",
    "Tokenizer",
    "recorded",
    "run_episode",
]

_OPEN = f" {protocol.RESULT_OPEN}\n"
_CLOSE = f"\n{protocol.RESULT_CLOSE}"
# In square brackets, as `neutralise` would write them: what is shown here must not count as a tag.
EMPTY_QUERY = "the query was empty; write it between <search> and </search>".replace("<", "[").replace(">", "]")
NOTHING_FOUND = "no passage was found"
_SEARCHER_GRACE = 2
"""A searcher may wait `search_timeout_s` for a connection and as long again for the answer; past both it is cut off here."""
_TRIES = 3
"""Most times one search is asked because the gate closed over it."""


@dataclass(frozen=True)
class Completion:
    """One turn of the engine. `ids` include the stop string's tokens; `logprobs` is as long as `ids`.

    `text` is what `ids` decode to, where the engine had to know it anyway.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished_by: Literal["stop", "eos", "length"]
    text: str | None = None


@dataclass(frozen=True)
class SearchFailure:
    """A search that got no answer; `reason` is told to the model, `fault` is counted."""

    reason: str
    fault: SearchFault = SearchFault.BROKEN


@dataclass(frozen=True)
class Limits:
    """Budget of one episode: counts, tokens, seconds."""

    top_k: int
    max_searches: int
    max_result_tokens: int
    max_response_tokens: int
    wall_s: float
    search_timeout_s: float


class Tokenizer(Protocol):
    """What the loop needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Return ids without adding special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return text with every token shown, special ones too."""
        ...


class Engine(Protocol):
    """Generates one turn, stopping after `stop` or at the end of the sequence."""

    async def generate(self, prompt_ids: Sequence[int], stop: Sequence[str], max_tokens: int) -> Completion:
        """Continue `prompt_ids` by at most `max_tokens` tokens."""
        ...


@runtime_checkable
class StreamingEngine(Protocol):
    """An engine that can also tell the ids of a turn while it generates them; the completion is that of `generate`."""

    async def stream(
        self, prompt_ids: Sequence[int], stop: Sequence[str], max_tokens: int, on_ids: Callable[[Sequence[int]], None]
    ) -> Completion:
        """Continue `prompt_ids` by at most `max_tokens` tokens; call `on_ids` with each new piece of the ids, in order."""
        ...


class Searcher(Protocol):
    """Finds passages; returns one list a query or a SearchFailure, and raises nothing on purpose."""

    async def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]] | SearchFailure:
        """Return `top_k` passages for each query, best first."""
        ...


class SearchGate(Protocol):
    """Stands before every search; closed while asking makes no sense, for a bounded time."""

    @property
    def closed(self) -> bool:
        """Whether a search would have to wait."""
        ...

    async def wait(self) -> None:
        """Return once the gate is open."""
        ...

    def report(self, fault: SearchFault | None) -> None:
        """Take note of how a search ended; None means that it was answered."""
        ...


class _Open:
    closed = False

    async def wait(self) -> None: ...

    def report(self, fault: SearchFault | None) -> None: ...


async def run_episode(
    prompt_ids: Sequence[int],
    engine: Engine,
    searcher: Searcher,
    tokenizer: Tokenizer,
    limits: Limits,
    gate: SearchGate | None = None,
    *,
    first_query: str | None = None,
    observer: Observer | None = None,
) -> Trajectory:
    """Let the model reason, search and answer; return what happened. Cancels cleanly, raises nothing of the engine's.

    The response begins with the result of `first_query` where one is given: the prompt then ends with that search. `observer` is told
    what happens as it happens, a turn word by word where the engine streams.
    """
    return await recorded(
        Trajectory(tuple(prompt_ids)),
        lambda steps: _Episode(steps).run(first_query),
        engine,
        searcher,
        tokenizer,
        limits,
        gate,
        observer,
    )


async def recorded(
    trajectory: Trajectory,
    body: Callable[[Steps], Awaitable[StopReason]],
    engine: Engine,
    searcher: Searcher,
    tokenizer: Tokenizer,
    limits: Limits,
    gate: SearchGate | None = None,
    observer: Observer | None = None,
) -> Trajectory:
    """Run `body`, which takes its steps through `Steps`, within `limits.wall_s`; return `trajectory`, filled, with one stop reason."""
    try:
        async with asyncio.timeout(limits.wall_s) as clock:
            trajectory.stop = await body(Steps(trajectory, engine, searcher, tokenizer, limits, gate or _Open(), clock, observer))
    except TimeoutError:
        trajectory.stop = StopReason.TIME_LIMIT
    except Exception as error:  # noqa: BLE001 - the boundary: whatever an engine raises costs this trajectory, not its group
        # Segments that were appended before stay: what the model wrote is logged, graded and counted.
        trajectory.stop, trajectory.error = StopReason.ENGINE_FAILURE, f"{type(error).__name__}: {error}"
    if observer is not None:
        observer(Ended(trajectory))
    return trajectory


# Encoded apart from the body and once: the brackets must keep their tokens whatever a passage begins or ends with.
@lru_cache(maxsize=8)
def _brackets(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    return tokenizer.encode(_OPEN), tokenizer.encode(_CLOSE)


@dataclass
class Steps:
    """What every way of answering is made of: turns of the engine, searches, and text that the model is shown. Each is recorded."""

    trajectory: Trajectory
    engine: Engine
    searcher: Searcher
    tokenizer: Tokenizer
    limits: Limits
    gate: SearchGate
    clock: asyncio.Timeout
    observer: Observer | None = None

    async def turn(self, context: Sequence[int], stop: Sequence[str], max_tokens: int) -> tuple[Completion, str]:
        """Let the engine continue `context`; return the completion and its text, special tokens shown."""
        started = time.perf_counter()
        streamed = GrowingText(self.tokenizer.decode)
        completion = await self._generate(context, stop, max_tokens, streamed)
        self.trajectory.engine_seconds += time.perf_counter() - started
        text = self.tokenizer.decode(completion.ids) if completion.text is None else completion.text
        self.trajectory.segments.append(Segment(Author.MODEL, completion.ids, completion.logprobs, text, len(context)))
        self.trajectory.ended_by_eos = completion.finished_by == "eos"
        # What was held back, or all of it where the engine does not stream.
        if text.startswith(streamed.text) and (rest := text[len(streamed.text) :]):
            self._tell(TextDelta(rest))
        self._tell(TurnEnded(text, len(completion.ids)))
        return completion, text

    async def _generate(self, context: Sequence[int], stop: Sequence[str], max_tokens: int, streamed: GrowingText) -> Completion:
        if self.observer is None or not isinstance(self.engine, StreamingEngine):
            return await self.engine.generate(context, stop, max_tokens)

        def on_ids(ids: Sequence[int]) -> None:
            if delta := streamed.add(ids):
                self._tell(TextDelta(delta))

        return await self.engine.stream(context, stop, max_tokens, on_ids)

    def _tell(self, event: Event) -> None:
        if self.observer is not None:
            self.observer(event)

    def show(self, ids: Sequence[int], text: str | None = None, passages: Sequence[Place] | None = None, *, message: bool = False) -> None:
        """Record tokens that the model reads and did not write: what the last search found, or a `message` that answers no search.

        `text` is what was encoded, for the caller that knows it; `passages` says which passage stands where in it.
        """
        text = self.tokenizer.decode(ids) if text is None else text
        search = None if message else len(self.trajectory.searches) - 1
        places = None if passages is None else tuple(passages)
        shown = Segment(Author.SEARCH, tuple(ids), (0.0,) * len(ids), text, search=search, message=message, passages=places)
        self.trajectory.segments.append(shown)
        self._tell(Shown(text, len(ids)))

    async def search(self, query: str | None) -> list[Passage]:
        """Return what is found, best first; nothing when the search failed. The last of `trajectory.searches` says what happened."""
        self._tell(SearchBegan(query or ""))
        passages = await self._recorded(query)
        self._tell(SearchEnded(self.trajectory.searches[-1], tuple(passages)))
        return passages

    async def _recorded(self, query: str | None) -> list[Passage]:
        if not query:
            self.trajectory.searches.append(SearchRecord("", (), 0.0, "empty query", SearchFault.EMPTY_QUERY))
            return []
        before = self.trajectory.search_seconds
        reply = await self._find(query)
        seconds = self.trajectory.search_seconds - before
        if isinstance(reply, SearchFailure):
            self.trajectory.searches.append(SearchRecord(query, (), seconds, reply.reason, reply.fault))
            return []
        fault = None if any(passage.contents.strip() for passage in reply) else SearchFault.NOTHING
        self.trajectory.searches.append(SearchRecord(query, tuple(passage.id for passage in reply), seconds, None, fault))
        return reply

    async def _find(self, query: str) -> list[Passage] | SearchFailure:
        """Ask; ask again when the gate closed over a failure, so that an outage told nobody anything about the query."""
        reply: list[Passage] | SearchFailure = SearchFailure("not asked")
        for _ in range(_TRIES):
            if self.gate.closed:
                await self._pause()
            started = time.perf_counter()
            reply = await self._ask(query)
            self.trajectory.search_seconds += time.perf_counter() - started
            self.gate.report(reply.fault if isinstance(reply, SearchFailure) else None)
            # After the report, which may be what closed the gate.
            if not (isinstance(reply, SearchFailure) and self.gate.closed):
                break
        return reply

    async def _pause(self) -> None:
        """Wait before the gate with the episode's clock stopped."""
        now, due = asyncio.get_running_loop().time, self.clock.when()
        started = now()
        # An outage of the retriever is not the episode's time; the deadline moves by as long as it lasted.
        self.clock.reschedule(None)
        await self.gate.wait()
        waited = now() - started
        self.trajectory.paused_seconds += waited
        self.clock.reschedule(None if due is None else due + waited)

    async def _ask(self, query: str) -> list[Passage] | SearchFailure:
        try:
            async with asyncio.timeout(_SEARCHER_GRACE * self.limits.search_timeout_s):
                reply = await self.searcher.search([query], self.limits.top_k)
        except TimeoutError:
            return SearchFailure(f"no answer in {_SEARCHER_GRACE * self.limits.search_timeout_s:g} s", SearchFault.TIMEOUT)
        except Exception as error:  # noqa: BLE001 - the boundary: a broken searcher must not lose a trajectory
            return SearchFailure(type(error).__name__, SearchFault.BROKEN)
        if isinstance(reply, SearchFailure):
            return reply
        # One query was sent, so anything else than one list is a broken reply.
        return reply[0] if len(reply) == 1 else SearchFailure(f"{len(reply)} replies to 1 query", SearchFault.GARBAGE)


@dataclass
class _Episode:
    steps: Steps
    context: list[int] = field(default_factory=list[int])
    used: int = 0

    def __post_init__(self) -> None:
        self.context += self.steps.trajectory.prompt_ids

    async def run(self, first_query: str | None) -> StopReason:
        limits, trajectory = self.steps.limits, self.steps.trajectory
        if first_query is not None:
            self._observe(await self._search(first_query))
        while self.used < limits.max_response_tokens:
            # The stop string only closes a search. `</answer>` is no stop: the model has to end its turn itself, and that is rewarded.
            completion, text = await self.steps.turn(self.context, (protocol.SEARCH_CLOSE,), limits.max_response_tokens - self.used)
            self._take(completion.ids)
            if completion.finished_by == "eos":
                return StopReason.ANSWERED if self._answered() else StopReason.MALFORMED
            if completion.finished_by == "length":
                return StopReason.TOKEN_LIMIT
            # Counted before the search is sent; an empty query has used one up, too.
            if len(trajectory.searches) >= limits.max_searches:
                return StopReason.SEARCH_LIMIT
            self._observe(await self._search(protocol.last_query(text)))
        return StopReason.TOKEN_LIMIT

    async def _search(self, query: str | None) -> str:
        """Return what the model is told of a search."""
        passages = await self.steps.search(query)
        record = self.steps.trajectory.searches[-1]
        if record.fault is SearchFault.EMPTY_QUERY:
            return EMPTY_QUERY
        if record.error is not None:
            return f"search failed: {record.error}"
        return "\n\n".join(passage.contents for passage in passages).strip() or NOTHING_FOUND

    def _observe(self, body: str) -> None:
        """Append one result block, its body cut to `max_result_tokens`, the whole cut to the response budget."""
        limits, tokenizer = self.steps.limits, self.steps.tokenizer
        body_ids = tokenizer.encode(protocol.neutralise(body))
        # The body alone is cut to its limit, so that the block is closed; only the end of the response can cut the closing tag off.
        cut = body_ids[: limits.max_result_tokens]
        opened, closed = _brackets(tokenizer)
        ids = [*opened, *cut, *closed]
        ids = ids[: limits.max_response_tokens - self.used]
        self.steps.show(ids)
        self._take(ids)

    def _take(self, ids: Sequence[int]) -> None:
        self.context += ids
        self.used += len(ids)

    def _answered(self) -> bool:
        written = "".join(s.text for s in self.steps.trajectory.segments if s.author is Author.MODEL)
        _, opened, answer = written.partition(protocol.ANSWER_OPEN)
        return bool(opened) and protocol.ANSWER_CLOSE in answer
