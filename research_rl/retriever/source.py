"""Where evaluation and training get their searches answered: by a retriever, with or without a tape that keeps what it says, or by the
tape of an earlier run alone.

Knows `retriever.tape`; leaves files to `tape` and HTTP to `client`. Invariants: (1) what the episodes of a process are shown while a
tape is recorded is what a replay shows them, unless another process recorded another reply to the same search first; (2) only passages
and refusals of a query are recorded, no outage; (3) a tape is published only after the retriever was compared, behind the last search,
with the workspace's index; (4) a search that a replayed tape lacks is a failed one and is noted, so that one error can name them all.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self
from uuid import uuid4

from research_rl.config import Config
from research_rl.episode.agent import SearchFailure
from research_rl.episode.trajectory import SearchFault
from research_rl.errors import DataError, ManifestError, ServiceError
from research_rl.pipeline import json_lines, taped
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import Endpoint
from research_rl.retriever.client import RetrieverClient
from research_rl.retriever.command import TAPE, require_same_index, running
from research_rl.retriever.replies import Passages
from research_rl.retriever.tape import FILE, Reply, Shelf, Tape, TapePart

__all__ = ["RetrieverSource", "SearchClient", "TapedClient", "Taping", "lacking", "opened", "searching"]

_EXAMPLES = 3


class SearchClient(Protocol):
    """A `Searcher` that is opened once for many episodes: a `RetrieverClient`, or one with a tape."""

    async def search(self, queries: Sequence[str], top_k: int) -> Passages | SearchFailure:
        """Return up to `top_k` passages for each query, best first, or a SearchFailure."""
        ...

    async def works(self) -> bool:
        """Whether a search is answered now."""
        ...

    def take_counts(self) -> dict[str, int]:
        """Return what was counted since the last call."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


@dataclass(frozen=True)
class Taping:
    """A tape in use: the database that is asked first (None while none stands), and the folder into which processes record what it lacks.

    Without `parts` the tape is replayed; what it lacks is noted in the folder `missing`.
    """

    tape: Path | None
    parts: Path | None
    missing: Path

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record, from which workers of a training read it back."""
        return {name: str(value) if value else None for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, record: dict[str, str | None]) -> Taping:
        """Read what `to_json` returned."""
        return cls(**{name: Path(value) if value else None for name, value in record.items()})  # type: ignore[arg-type]


class RetrieverSource:
    """A retriever, or where the tape in its place lies; `taping` is None where no tape is used. All its clients record into one part."""

    def __init__(self, endpoint: Endpoint, taping: Taping | None = None) -> None:
        self.endpoint, self.taping = endpoint, taping
        self._part: TapePart | None = None

    def client(self, timeout_s: float, connections: int) -> SearchClient:
        """Return a client with `connections` searches on the wire at once, each answered or given up within `timeout_s`."""
        if self.taping and self.taping.parts and self._part is None:
            self._part = TapePart(self.taping.parts)
        return opened(self.endpoint.url, self.endpoint.token, timeout_s, connections, self.taping, self._part)

    def require_complete(self) -> None:
        """Raise DataError when searches were asked that a replayed tape lacks."""
        if self.taping and (text := lacking(self.taping)):
            raise DataError(text)

    def close(self) -> None:
        """End the recording."""
        if self._part:
            self._part.close()
            self._part = None


def opened(
    url: str, token: str | None, timeout_s: float, connections: int, taping: Taping | None, part: TapePart | None = None
) -> SearchClient:
    """Return a client of the retriever at `url` with a tape, without one, or of a tape alone. Raises ManifestError.

    Without a `part` to record into a new one is begun, which ends with the process.
    """
    if taping is None:
        return RetrieverClient(url, token, timeout_s, connections=connections)
    if taping.parts is None:
        return TapedClient(taping, None, None)
    return TapedClient(taping, RetrieverClient(url, token, timeout_s, connections=connections), part or TapePart(taping.parts))


class TapedClient:
    """A `Searcher` that answers from a tape; what that lacks it asks `client` and records in `part`, or fails where there is none.

    For one event loop. Raises ManifestError for a tape that cannot be read.
    """

    def __init__(self, taping: Taping, client: RetrieverClient | None, part: TapePart | None) -> None:
        self._taping, self._client, self._part = taping, client, part
        self._tape = Tape.open(taping.tape) if taping.tape else None
        self._missing: set[tuple[str, int]] = set()
        self._from_tape = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._tape:
            self._tape.close()
        if self._client:
            await self._client.aclose()

    async def works(self) -> bool:
        """Whether the retriever answers a search now; a tape always does."""
        return self._client is None or await self._client.works()

    def take_counts(self) -> dict[str, int]:
        """Return the counts of the client, and of the queries that the tape answered (`from_tape`)."""
        counts = self._client.take_counts() if self._client else {}
        counts, self._from_tape = counts | ({"from_tape": self._from_tape} if self._from_tape else {}), 0
        return counts

    async def search(self, queries: Sequence[str], top_k: int) -> Passages | SearchFailure:
        """Return up to `top_k` passages for each query, best first, or a SearchFailure."""
        replies = {query: reply for query in queries if (reply := self._find(query, top_k)) is not None}
        self._from_tape += len(replies)
        if absent := [query for query in dict.fromkeys(queries) if query not in replies]:
            answer = await self._ask(absent, top_k)
            if isinstance(answer, SearchFailure):
                return answer
            replies |= answer
        passages: Passages = []
        for reply in (replies[query] for query in queries):
            if isinstance(reply, SearchFailure):
                return reply
            passages.append(reply)
        return passages

    def _find(self, query: str, top_k: int) -> Reply | None:
        reply = self._tape.find(query, top_k) if self._tape else None
        return self._part.find(query, top_k) if reply is None and self._part else reply

    async def _ask(self, queries: Sequence[str], top_k: int) -> dict[str, Reply] | SearchFailure:
        if self._client is None or self._part is None:
            return self._lacks(queries, top_k)
        answer = await self._client.search(queries, top_k)
        if isinstance(answer, SearchFailure):
            # A refusal of several queries does not say which of them was at fault.
            if answer.fault is not SearchFault.REFUSED or len(queries) > 1:
                return answer
            answer = [answer]
        try:
            for query, reply in zip(queries, answer, strict=True):
                self._part.add(query, top_k, reply)
            # Not the answer itself: of two equal searches in flight both are to get the one that was recorded.
            return {query: reply for query in queries if (reply := self._part.find(query, top_k)) is not None}
        except sqlite3.Error as error:
            return SearchFailure(f"the tape in {self._taping.parts} cannot be written ({error})", SearchFault.BROKEN)

    def _lacks(self, queries: Sequence[str], top_k: int) -> SearchFailure:
        for query in queries:
            if (query, top_k) not in self._missing:
                self._missing.add((query, top_k))
                json_lines.append(json_lines.own_file(self._taping.missing), {"query": query, "top_k": top_k})
        return SearchFailure("the tape that is replayed does not hold this search", SearchFault.NOT_ON_TAPE)


def lacking(taping: Taping) -> str | None:
    """Return in one sentence which searches a replayed tape was asked for and lacks, None when there is none."""
    notes = (note for path in sorted(taping.missing.glob("*.jsonl")) for _, note in json_lines.read(path))
    missing = dict.fromkeys((str(note["query"]), int(note["top_k"])) for note in notes)
    if not missing or taping.tape is None:
        return None
    shown = ", ".join(f"{query[:80]!r} ({top_k} passages)" for query, top_k in list(missing)[:_EXAMPLES])
    return (
        f"retriever.tape=replay: {len(missing):,} {'search is' if len(missing) == 1 else 'searches are'} not on the tape "
        f"{taping.tape.parent}, the first: {shown}; record them where the index is, by the same command with retriever.tape=record, "
        "and bring the tape back. What was finished is kept"
    )


@contextmanager
def searching(config: Config, workspace: Workspace) -> Generator[RetrieverSource]:
    """Yield where searches of the workspace's index are answered, as `retriever.tape` says.

    Raises as `command.running`, ManifestError where a tape is to be replayed and none stands, and StorageError when what was recorded
    cannot be published; it is kept for the next run then.
    """
    if config.retriever.tape == "replay":
        source, missing = _replayed(config, workspace)
        try:
            yield source
        finally:
            shutil.rmtree(missing, ignore_errors=True)
        return
    with running(config, workspace) as endpoint:
        if config.retriever.tape == "off":
            yield RetrieverSource(endpoint)
            return
        shelf = Shelf(workspace, taped.loaded("index", config, workspace))
        standing = shelf.gather()
        source = RetrieverSource(endpoint, Taping(shelf.folder / FILE if standing else None, shelf.parts, shelf.missing))
        try:
            yield source
        except BaseException:
            # What was recorded stays for the next run, unless it is of another index.
            with suppress(ServiceError):
                _compared(endpoint, workspace, shelf, source)
            raise
        _compared(endpoint, workspace, shelf, source)
        shelf.gather()


def _replayed(config: Config, workspace: Workspace) -> tuple[RetrieverSource, Path]:
    shelf = Shelf(workspace, taped.loaded("index", config, workspace))
    if shelf.standing() is None:
        raise ManifestError(
            f"retriever.tape=replay, and {shelf.folder} is no whole tape of the workspace's index; "
            "record one where the index is by retriever.tape=record, or copy that folder from there"
        )
    # A folder of its own: stages of a flow may replay the same tape at once.
    missing = shelf.missing / uuid4().hex
    return RetrieverSource(Endpoint(f"{TAPE}{shelf.folder}"), Taping(shelf.folder / FILE, None, missing)), missing


def _compared(endpoint: Endpoint, workspace: Workspace, shelf: Shelf, source: RetrieverSource) -> None:
    """End the recording, and forget it when the retriever serves another index by now. Raises ServiceError."""
    source.close()
    try:
        require_same_index(endpoint, workspace)
    except ServiceError:
        shelf.forget()
        raise
