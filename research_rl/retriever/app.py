"""The HTTP application of the retriever. Knows requests, limits and replies; leaves searching to the batcher's thread, and the exchange
of the index to `edition`.

Invariants: (1) /health never waits for a search; (2) a request past a limit is refused with value, limit and remedy
before any work; (3) the only answer of 5xx is a deliberate 503 with Retry-After; (4) what was accepted before the service
drains is answered; (5) one blank or overlong query costs the others of its request nothing; (6) whatever keeps the index from
opening at the start, /health says that the service failed and why; (7) while the index is exchanged no request waits for it or is lost.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import unicodedata
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError

from research_rl import __version__
from research_rl.config import RetrieverConfig
from research_rl.episode.trajectory import Passage
from research_rl.errors import ManifestError, ResearchError, ServiceError
from research_rl.index.bounds import Kind
from research_rl.index.tiers import Certificate
from research_rl.pipeline.extras import missing_extras
from research_rl.retriever import wire
from research_rl.retriever.batching import Busy, Late, Search
from research_rl.retriever.docs import documented
from research_rl.retriever.edition import Edition, Follower
from research_rl.retriever.gateway import Gateway, refusal
from research_rl.retriever.observe import RetrieverMetrics, Seen
from research_rl.retriever.retriever import Retriever
from research_rl.retriever.whole import Whole
from research_rl.retriever.wire import BatchSearchRequest, RetrieveRequest, SearchRequest

__all__ = ["RetrieverService"]

_RETRY_AFTER_S = 1
Found = list[list[Passage]]
Asked = SearchRequest | BatchSearchRequest | RetrieveRequest


class RetrieverService:
    """The application and its state: opening, ready, draining. `app` is what a server runs.

    `standing` returns the hash of the index that `open_retriever` would open now, None where it could open none: when it is another
    than the one that is served, the service opens it and answers with it. Where this is one of several workers, `whole` tells of all.
    """

    def __init__(
        self,
        open_retriever: Callable[[], Retriever],
        config: RetrieverConfig,
        token: str | None = None,
        standing: Callable[[], str | None] = lambda: None,
        whole: Whole | None = None,
    ) -> None:
        self.config = config
        self.whole = whole
        self.edition: Edition | None = None
        self.failure: ResearchError | None = None
        self.draining = False
        self._open = open_retriever
        self.follower = Follower(config.follow_s, standing, lambda: self.edition and self.edition.index, self._opened, self._hand_over)
        self._exchange = whole or self.follower
        self.metrics = RetrieverMetrics(self._waiting, lambda: self.gateway.active, lambda: self.ready, whole)
        self.metrics.watch_switches(lambda: self._exchange.switches, lambda: self._exchange.failures)
        self.app = documented(title="research-rl retriever", version=__version__, lifespan=self._lifespan)
        self.app.exception_handler(RequestValidationError)(_invalid)
        self.gateway = Gateway(self.app, config, token, self.metrics)
        _add_status(self.app, self)
        _add_searches(self.app, self)

    @property
    def ready(self) -> bool:
        """Whether searches are answered: the canary was found and no end was asked for."""
        return self.state == "healthy"

    @property
    def idle(self) -> bool:
        """Whether no search runs or waits."""
        return self.edition is not None and self.edition.batcher.idle

    def searchable(self, text: str) -> bool:
        """Whether a text holds anything to search for."""
        return bool(self._query(text))

    def _waiting(self) -> int:
        return self.edition.batcher.waiting if self.edition else 0

    def open_now(self, within: Callable[[Callable[[], Edition]], Edition], since: str) -> None:
        """Open the index before the application starts, so that no request finds it closed; `since` is what /info says of when.

        `within` calls a function and returns what that returned. Raises whatever keeps the index from opening.
        """
        self.edition = within(self._opened)
        self.edition.since = since

    def leave(self) -> None:
        """Answer what comes, and let no connection last: others serve in this one's place."""
        self.gateway.leaving = True

    def close(self) -> None:
        """Finish what waits and end the search thread."""
        self.follower.end()
        if self.edition:
            self.edition.close()

    async def search(self, seen: Seen, texts: Sequence[str], top_k: int, timeout_s: float | None) -> Found:
        """Return passages for each text, held or searched; none for a text without anything to search for.

        Raises HTTPException for a request past a limit, a full queue, or one that waited too long.
        """
        edition, queries = self._accepted(seen, texts, top_k)
        # Equal texts of a request are searched once.
        distinct = dict.fromkeys(query for query in queries if query)
        results = {query: passages for query in distinct if (passages := edition.cache.get(query, top_k)) is not None}
        seen.cached = sum(query in results for query in queries)
        missing = [query for query in distinct if query not in results]
        results |= await self._searched(edition, seen, missing, top_k, timeout_s)
        # A text without anything to search for was not searched and has no entry.
        return [results.get(query, []) for query in queries]

    async def certified(
        self, seen: Seen, texts: Sequence[str], top_k: int, timeout_s: float | None, kind: Kind
    ) -> tuple[Found, list[Certificate]]:
        """Return what `search` returns and how sure each reply is; a text without anything to search for has a sure, empty one.

        Every text is searched: held results say nothing of how sure they are. Nor is any of these held, as they may be
        better than those of a search that was not asked to be sure.
        """
        edition, queries = self._accepted(seen, texts, top_k)
        sure = dict[str, Certificate]()

        def alone(some: Sequence[str], k: int) -> Found:
            passages, certificates = edition.retriever.certified(some, k, kind, self.config.certify_candidates)
            sure.update(zip(some, certificates, strict=True))
            return passages

        distinct = list(dict.fromkeys(query for query in queries if query))
        results = await self._searched(edition, seen, distinct, top_k, timeout_s, alone)
        return [results.get(query, []) for query in queries], [sure.get(query, Certificate(True, 0, 0)) for query in queries]

    def _accepted(self, seen: Seen, texts: Sequence[str], top_k: int) -> tuple[Edition, list[str]]:
        """Return in what is searched, and what is searched for each text. Raises HTTPException for a request that is refused."""
        _check(self.config, len(texts), top_k)
        queries = [self._query(text) for text in texts]
        seen.queries, seen.top_k = len(queries), top_k
        if self.config.log_queries:
            seen.texts = queries
        if seen.late:
            raise self._away("draining", "the service ends")
        if self.edition is None:
            raise self._away("starting", "the index is being opened")
        return self.edition, queries

    def _query(self, text: str) -> str:
        """Return what is searched for a text: one line, cut to the limit; empty when it holds nothing to search for."""
        limit = self.config.max_query_chars
        query = " ".join(text.split())
        if len(query) > limit:
            self.metrics.shortened()
            query = query[:limit].rstrip()
        # JSON can hold half a surrogate pair, which neither a tokenizer nor UTF-8 has a place for.
        if not query.isprintable():
            query = "".join(character for character in query if unicodedata.category(character) != "Cs")
        return query if query.isascii() or _searchable(query) else ""

    async def _searched(
        self, edition: Edition, seen: Seen, queries: Sequence[str], top_k: int, timeout_s: float | None, alone: Search | None = None
    ) -> dict[str, list[Passage]]:
        """Search `max_batch` queries at a time, so that the searches of others go between the pieces of a large request.

        What another function (`alone`) finds is not held.
        """
        with edition.held():
            return await self._pieces(edition, seen, queries, top_k, timeout_s, alone)

    async def _pieces(
        self, edition: Edition, seen: Seen, queries: Sequence[str], top_k: int, timeout_s: float | None, alone: Search | None
    ) -> dict[str, list[Passage]]:
        size = min(self.config.max_batch, self.config.max_queue)
        until = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
        results: dict[str, list[Passage]] = {}
        for start in range(0, len(queries), size):
            piece = queries[start : start + size]
            # Set for each piece: how long a piece may wait does not depend on how many pieces came before it.
            deadline = min(until, time.monotonic() + self.config.max_deadline_s)
            try:
                answers, seen.batch = await edition.batcher.search(piece, top_k, deadline, admitted=start > 0, alone=alone)
            except Busy as error:
                raise self._away("full", f"{error}, the limit is retriever.max_queue={self.config.max_queue}") from None
            except Late as error:
                raise self._away("deadline", f"the request waited {error}; ask for a later X-Deadline-Ms or add replicas") from None
            for query, passages in zip(piece, answers, strict=True):
                results[query] = passages
                if alone is None:
                    edition.cache.put(query, top_k, passages)
        return results

    def _away(self, reason: str, detail: str) -> HTTPException:
        self.metrics.refused(reason)
        detail = f"{detail}; try again in {_RETRY_AFTER_S} s"
        return HTTPException(503, detail, headers={"Retry-After": str(_RETRY_AFTER_S)})

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncGenerator[None]:
        """Open the index while the server already answers /health and /readyz."""
        self._loop = asyncio.get_running_loop()
        if self.edition is None:
            # A daemon: opening cannot be interrupted, and must not hold up an end that is asked for meanwhile.
            threading.Thread(target=self._start, name="opening", daemon=True).start()
        yield
        await asyncio.to_thread(self.close)

    def _start(self) -> None:
        try:
            # Last, because it is what makes `state` say that searches are answered.
            self.edition = self._opened()
        except ResearchError as error:
            self.failure = error
        except Exception as error:  # noqa: BLE001  (the boundary of this thread: the server ends with the reason, whatever it is)
            self.failure = ServiceError(f"the index cannot be opened ({type(error).__name__}: {error}); mend that and start again")
            self.failure.__cause__ = error
        else:
            self.follower.start()

    def _opened(self) -> Edition:
        with missing_extras():
            retriever = self._open()
        self.metrics.serves(retriever.facts["manifests"]["index"])
        return Edition(retriever, self.config, self.metrics.batch)

    def _hand_over(self, edition: Edition) -> None:
        """Answer with `edition` from the next request on."""

        def exchange() -> None:
            before, self.edition = self.edition, edition
            if before:
                before.retire()

        try:
            # In the loop's thread, between two requests' steps: none can take the old edition after it was retired.
            self._loop.call_soon_threadsafe(exchange)
        except RuntimeError:  # the service ended while the index was opened
            edition.close()

    def drain(self) -> None:
        """Refuse new searches from now on."""
        self.draining = self.gateway.closing = True

    def check_files(self) -> bool:
        """Return whether the service failed, which ends the server; so it does when a file that is served was cut short."""
        try:
            if self.edition is not None:
                self.edition.retriever.check_files()
        except ManifestError as error:
            # The first failure is the one to tell.
            self.failure = self.failure or error
        return self.failure is not None

    @property
    def state(self) -> str:
        """What /health and /readyz say: starting, healthy, draining or failed."""
        if self.failure is not None:
            return "failed"
        if self.draining:
            return "draining"
        return "starting" if self.edition is None else "healthy"

    @property
    def info(self) -> dict[str, Any] | None:
        """What /info says: the facts of what is served, since when, and how the exchange of the index goes; None before it is open."""
        if self.edition is None:
            return None
        follows = {"since": self.edition.since, "switches": self._exchange.switches, "failed": self._exchange.failed}
        return {**self.edition.retriever.facts, **follows}


def _check(config: RetrieverConfig, queries: int, top_k: int) -> None:
    if queries > config.max_queries:
        raise HTTPException(413, f"{queries} queries exceed retriever.max_queries={config.max_queries}; send fewer at once, or raise it")
    if top_k > config.max_top_k:
        raise HTTPException(422, f"top_n={top_k} exceeds retriever.max_top_k={config.max_top_k}; ask for fewer passages, or raise it")
    if queries * top_k > config.max_passages:
        limit = f"retriever.max_passages={config.max_passages}"
        raise HTTPException(413, f"{queries} queries of {top_k} passages exceed {limit}; send fewer queries at once, or raise it")


def _searchable(query: str) -> bool:
    """Whether a query has a letter, number, punctuation mark or symbol: not only blanks, zero-width or control characters."""
    return any(unicodedata.category(character)[0] in "LNPS" for character in query)


def _add_status(app: FastAPI, service: RetrieverService) -> None:
    @app.get("/health")
    async def health() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Whether the service runs, and whether its searcher is free; 503 until the index is open."""
        # While it drains the service is healthy all the same: a restart would lose what it still answers.
        serves = service.edition is not None and service.failure is None
        content: dict[str, Any] = {"status": "healthy" if serves else service.state}
        content["retrievers"] = service.whole.retrievers() if service.whole else {"total": 1, "available": int(service.idle)}
        if service.failure is not None:
            content["detail"] = str(service.failure)
        return _json(content) if serves else refusal(503, service.state, content=content)

    @app.get("/readyz")
    async def readyz() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Whether searches are answered: 200 from the moment the canary was found until the service drains, else 503."""
        if service.ready:
            return _json({"status": "ready"})
        return refusal(503, service.state)

    @app.get("/metrics")
    async def metrics() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Counters in Prometheus's text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/info")
    async def info() -> Response:  # pyright: ignore[reportUnusedFunction]
        """What is served and since when: rows, dimension, encoder and the hashes of corpus, embeddings and index."""
        return _json(info) if (info := service.info) else refusal(503, "starting")


def _add_searches(app: FastAPI, service: RetrieverService) -> None:
    async def answer(request: Request, queries: Sequence[str], body: Asked, reply: Callable[[Found], Any]) -> Response:
        timeout_s = _timeout(request.headers.get("x-deadline-ms"), body.timeout_s)
        seen = request.scope["seen"]
        if body.certify is None:
            return _json(reply(await service.search(seen, queries, body.passages, timeout_s)))
        results, certificates = await service.certified(seen, queries, body.passages, timeout_s, body.certify)
        return _json(wire.certified_reply(reply(results), certificates))

    @app.post("/search", responses=_ANSWERS)
    async def one(request: Request, body: SearchRequest) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Passages for one query."""
        if not service.searchable(body.query):
            raise HTTPException(400, f"the query is blank ({body.query[:80]!r}); send text to search for")
        return await answer(request, [body.query], body, lambda results: wire.search_reply(results[0], body.return_score))

    @app.post("/batch_search", responses=_ANSWERS)
    async def several(request: Request, body: BatchSearchRequest) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Passages for several queries; a blank one gets none."""
        return await answer(request, body.query, body, lambda results: wire.batch_reply(results, body.return_score))

    @app.post("/retrieve", responses=_ANSWERS)
    async def retrieve(request: Request, body: RetrieveRequest) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Passages for several queries, as Search-R1 asks; a blank one gets none."""
        return await answer(request, body.texts, body, lambda results: wire.retrieve_reply(results, body.return_score))


_ANSWERS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A blank query, or a body that is no JSON."},
    401: {"description": "The bearer token is missing or wrong."},
    408: {"description": "The body did not arrive in time."},
    403: {"description": "A web page of another origin, or a network that is not allowed."},
    413: {"description": "More queries or bytes than allowed."},
    421: {"description": "Host is not a name of this service."},
    503: {"description": "Full, starting, draining, or past the deadline; Retry-After says when to try again."},
}


def _timeout(header: str | None, timeout_s: float | None) -> float | None:
    """Return how many seconds a request says it may wait; None when it does not. Raises HTTPException for a header that is no number."""
    if header is None:
        return timeout_s
    if not (header.isascii() and header.isdigit()):
        raise HTTPException(422, f"X-Deadline-Ms={header[:80]!r} is no whole number of milliseconds; send one, such as 2000")
    # Twelve digits are thirty years.
    seconds = int(header[:12]) / 1000
    return seconds if timeout_s is None else min(seconds, timeout_s)


async def _invalid(_: Request, error: Exception) -> Response:
    """Name the field, the value and the reason in one line."""
    problems = error.errors() if isinstance(error, RequestValidationError) else []
    lines = [
        f"{'.'.join(map(str, problem['loc'][1:])) or 'body'}={str(problem.get('input'))[:80]}: {problem['msg']}" for problem in problems
    ]
    return refusal(422, "; ".join(lines) + "; /openapi.json describes the format")


def _json(content: Any) -> Response:
    return Response(json.dumps(content, ensure_ascii=False).encode(), media_type="application/json")
