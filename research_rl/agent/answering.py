"""Play one question and tell it in parts that a person can follow: thoughts, searches, the answer, why it ended. Knows no wire format.

Invariants: (1) `answer` ends with exactly one Finished, whatever happens to the engine or the searcher; (2) one who stops listening ends
the episode: nothing of it runs on; (3) the searches and the answer told are those of the trajectory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from research_rl.agent.citations import Citation, Search, cite, is_supported
from research_rl.agent.text import Kind, Writing
from research_rl.agent.unless import unless
from research_rl.episode.agent import Completion, Engine, Limits, Searcher, SearchFailure, StreamingEngine, Tokenizer, run_episode
from research_rl.episode.events import Ended, Event, SearchBegan, SearchEnded, TextDelta
from research_rl.episode.trajectory import Author, Passage, SearchRecord, Trajectory
from research_rl.errors import ServiceError
from research_rl.reward import rules

__all__ = ["Asked", "Backend", "Ending", "Finished", "Found", "Lease", "Part", "Thought", "Waiting", "Words", "answer", "title"]

_TITLE_CHARS = 120
T = TypeVar("T")


@dataclass(frozen=True)
class Backend:
    """What a question is answered with. `encode` makes the prompt of a question; `marks` are special tokens that are no text.

    `model` is the name under which the policy is served, `version` how a person named it.
    """

    engine: Engine
    searcher: Searcher
    tokenizer: Tokenizer
    encode: Callable[[str], Sequence[int]]
    model: str
    marks: tuple[str, ...] = ()
    version: str = ""


@dataclass(frozen=True)
class Lease:
    """A backend for one question: its model is kept until `end`, which is called once."""

    backend: Backend
    end: Callable[[], None]


@dataclass(frozen=True)
class Thought:
    """More of what the policy thinks."""

    text: str


@dataclass(frozen=True)
class Asked:
    """The policy searches; `query` may be empty."""

    query: str


@dataclass(frozen=True)
class Found:
    """What the search brought, best first; `record.error` says why nothing."""

    record: SearchRecord
    passages: tuple[Passage, ...]


@dataclass(frozen=True)
class Words:
    """More of the answer, without its box."""

    text: str


@dataclass(frozen=True)
class Waiting:
    """Nothing happened for a while; the episode goes on."""


@dataclass(frozen=True)
class Finished:
    """The whole: `answer` is what the box holds (the whole answer without one), None where the policy gave none.

    `supported` is whether a passage that was read holds it; None where that cannot be said. `answer_tokens` is the answer's length.
    """

    trajectory: Trajectory
    answer: str | None
    citations: tuple[Citation, ...]
    supported: bool | None
    answer_tokens: int

    @property
    def read_tokens(self) -> int:
        """Tokens that the policy read: the prompt and the passages."""
        shown = sum(len(segment.ids) for segment in self.trajectory.segments if segment.author is Author.SEARCH)
        return len(self.trajectory.prompt_ids) + shown

    @property
    def written_tokens(self) -> int:
        """Tokens that the policy wrote."""
        return sum(len(segment.ids) for segment in self.trajectory.segments if segment.author is Author.MODEL)


Part = Thought | Asked | Found | Words | Waiting | Finished


class Ending:
    """A backend's engine and searcher until `end` is called: what they do then fails because of `why`, and with it the episode."""

    def __init__(self, backend: Backend, why: str) -> None:
        self._backend, self._why, self._over = backend, why, asyncio.Event()

    def backend(self) -> Backend:
        """Return the backend whose engine and searcher this is."""
        return replace(self._backend, engine=self, searcher=self)

    def end(self) -> None:
        """Let the episode end now."""
        self._over.set()

    async def generate(self, prompt_ids: Sequence[int], stop: Sequence[str], max_tokens: int) -> Completion:
        """Continue as the engine does. Raises ServiceError once it has to end."""
        return await self._unless_over(self._backend.engine.generate(prompt_ids, stop, max_tokens))

    async def stream(
        self, prompt_ids: Sequence[int], stop: Sequence[str], max_tokens: int, on_ids: Callable[[Sequence[int]], None]
    ) -> Completion:
        """Continue as the engine does, told piece by piece where it streams. Raises ServiceError once it has to end."""
        engine = self._backend.engine
        if not isinstance(engine, StreamingEngine):
            return await self.generate(prompt_ids, stop, max_tokens)
        return await self._unless_over(engine.stream(prompt_ids, stop, max_tokens, on_ids))

    async def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]] | SearchFailure:
        """Search as the searcher does. Raises ServiceError once it has to end."""
        return await self._unless_over(self._backend.searcher.search(queries, top_k))

    async def _unless_over(self, work: Coroutine[Any, Any, T]) -> T:
        done = await unless(self._over.wait(), work)
        if done is None:
            raise ServiceError(self._why)
        return done


class _Whole:
    """An engine that gives each turn at once: the same text, without the cost of telling it token by token."""

    def __init__(self, engine: Engine) -> None:
        # Without `stream` it is no StreamingEngine, so `run_episode` asks it for whole turns.
        self.generate = engine.generate


async def answer(
    backend: Backend, prompt: Sequence[int], limits: Limits, waiting_s: float = 15.0, *, word_by_word: bool = True
) -> AsyncGenerator[Part]:
    """Play one episode and yield what happens; Waiting after each `waiting_s` seconds without anything. Close it to end the episode.

    Without `word_by_word` what the policy writes comes turn by turn.
    """
    happened: asyncio.Queue[Event | None] = asyncio.Queue()
    engine = backend.engine if word_by_word else _Whole(backend.engine)
    episode = asyncio.create_task(run_episode(prompt, engine, backend.searcher, backend.tokenizer, limits, observer=happened.put_nowait))
    # None comes behind Ended; alone it says that the episode was cut off by something that is no failure of an engine.
    episode.add_done_callback(lambda _: happened.put_nowait(None))
    telling = _Telling(backend, limits)
    try:
        while (event := await _next(happened, waiting_s)) is not None:
            for part in (event,) if isinstance(event, Waiting) else telling.parts(event):
                yield part
        # Raises what no failure of an engine or a searcher explains: a fault of this program.
        await episode
    finally:
        episode.cancel()
        await asyncio.gather(episode, return_exceptions=True)


async def _next(happened: asyncio.Queue[Event | None], waiting_s: float) -> Event | Waiting | None:
    try:
        async with asyncio.timeout(waiting_s):
            return await happened.get()
    except TimeoutError:
        return Waiting()


def title(passage: Passage) -> str:
    """Return the first line of a passage, which is its title in corpora of the usual form, without quotes and shortened."""
    return passage.contents.strip().partition("\n")[0].strip().strip('"')[:_TITLE_CHARS]


@dataclass
class _Telling:
    """From the events of an episode to the parts that are told."""

    backend: Backend
    limits: Limits
    searches: list[Search] = field(default_factory=list[Search])
    _trims: dict[Kind, _Trim] = field(init=False)
    _writing: Writing = field(init=False)

    def __post_init__(self) -> None:
        self._writing = Writing(self.backend.marks)
        self._trims = {"thought": _Trim(), "answer": _Trim()}

    def parts(self, event: Event) -> list[Part]:
        match event:
            case TextDelta():
                return self._written(self._writing.add(event.text))
            case SearchBegan():
                return [*self._end_turn(searches=True), Asked(event.query)]
            case SearchEnded():
                self.searches.append(Search(event.record.query, event.passages))
                return [Found(event.record, event.passages)]
            case Ended():
                return [*self._end_turn(searches=False), self._finished(event.trajectory)]
            case _:
                return []

    def _written(self, pieces: list[tuple[Kind, str]]) -> list[Part]:
        trimmed = [(kind, self._trims[kind].add(text)) for kind, text in pieces]
        return [Words(text) if kind == "answer" else Thought(text) for kind, text in trimmed if text]

    def _end_turn(self, *, searches: bool) -> list[Part]:
        parts = self._written(self._writing.end_turn(searches=searches))
        self._trims = {"thought": _Trim(), "answer": _Trim()}
        return parts

    def _finished(self, trajectory: Trajectory) -> Finished:
        # By the rules of the reward, so that the answer that is told is the one that training grades.
        block = rules.answer(rules.graded_text(trajectory.segments))
        boxed = rules.boxed(block)
        text = (block if boxed is None else boxed).strip() or None
        count = _counter(self.backend.tokenizer)
        citations = cite(text, self.searches, count, self.limits.max_result_tokens) if text else []
        return Finished(trajectory, text, tuple(citations), is_supported(text, citations), count(block) if block else 0)


def _counter(tokenizer: Tokenizer) -> Callable[[str], int]:
    return lambda text: len(tokenizer.encode(text))


@dataclass
class _Trim:
    """Text without the white space at its beginning and end."""

    _begun: bool = False
    _held: str = ""

    def add(self, text: str) -> str:
        """Return what can be shown; white space waits for what follows it."""
        text = self._held + text if self._begun else text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        self._begun = self._begun or bool(shown)
        return shown
