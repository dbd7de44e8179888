"""The HTTP application of the retriever. Knows requests, limits and replies; leaves searching to the batcher's thread.

Invariants: (1) /health never waits for a search; (2) a request past a limit is refused with value, limit and remedy
before any work; (3) the only answer of 5xx is a deliberate 503 with Retry-After; (4) what was accepted before the service
drains is answered; (5) one blank or overlong query costs the others of its request nothing; (6) whatever keeps the index from
opening, /health says that the service failed and why.
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
from research_rl.pipeline.extras import missing_extras
from research_rl.retriever import wire
from research_rl.retriever.batching import Busy, Late, MicroBatcher
from research_rl.retriever.cache import ResultCache
from research_rl.retriever.gateway import Gateway, refusal
from research_rl.retriever.observe import Metrics, Seen
from research_rl.retriever.retriever import Retriever
from research_rl.retriever.wire import BatchSearchRequest, RetrieveRequest, SearchRequest

__all__ = ["Service"]

_RETRY_AFTER_S = 1
Found = list[list[Passage]]
Asked = SearchRequest | BatchSearchRequest | RetrieveRequest


class Service:
    """The application and its state: opening, ready, draining. `app` is what a server runs."""

    def __init__(self, open_retriever: Callable[[], Retriever], config: RetrieverConfig, token: str | None = None) -> None:
        self.config = config
        self.retriever: Retriever | None = None
        self.failure: ResearchError | None = None
        self.draining = False
        self._open = open_retriever
        self._batcher: MicroBatcher | None = None
        self._cache = ResultCache(0)
        self.metrics = Metrics(lambda: self._batcher.waiting if self._batcher else 0, lambda: self.gateway.active, lambda: self.ready)
        self.app = FastAPI(title="research-rl retriever", version=__version__, lifespan=self._lifespan, docs_url=None, redoc_url=None)
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
        return self._batcher is not None and self._batcher.idle

    def searchable(self, text: str) -> bool:
        """Whether a text holds anything to search for."""
        return bool(self._query(text))

    def close(self) -> None:
        """Finish what waits and end the search thread."""
        if self._batcher:
            self._batcher.close()

    async def search(self, seen: Seen, texts: Sequence[str], top_k: int, timeout_s: float | None) -> Found:
        """Return passages for each text, held or searched; none for a text without anything to search for.

        Raises HTTPException for a request past a limit, a full queue, or one that waited too long.
        """
        _check(self.config, len(texts), top_k)
        queries = [self._query(text) for text in texts]
        seen.queries, seen.top_k = len(queries), top_k
        if self.config.log_queries:
            seen.texts = queries
        if seen.late:
            raise self._away("draining", "the service ends")
        if self._batcher is None:
            raise self._away("starting", "the index is being opened")
        # Equal texts of a request are searched once.
        distinct = dict.fromkeys(query for query in queries if query)
        results = {query: passages for query in distinct if (passages := self._cache.get(query, top_k)) is not None}
        seen.cached = sum(query in results for query in queries)
        missing = [query for query in distinct if query not in results]
        results |= await self._searched(self._batcher, seen, missing, top_k, timeout_s)
        # A text without anything to search for was not searched and has no entry.
        return [results.get(query, []) for query in queries]

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
        self, batcher: MicroBatcher, seen: Seen, queries: Sequence[str], top_k: int, timeout_s: float | None
    ) -> dict[str, list[Passage]]:
        """Search `max_batch` queries at a time, so that the searches of others go between the pieces of a large request."""
        size = min(self.config.max_batch, self.config.max_queue)
        until = time.monotonic() + timeout_s if timeout_s is not None else float("inf")
        results: dict[str, list[Passage]] = {}
        for start in range(0, len(queries), size):
            piece = queries[start : start + size]
            # Set for each piece: how long a piece may wait does not depend on how many pieces came before it.
            deadline = min(until, time.monotonic() + self.config.max_deadline_s)
            try:
                answers, seen.batch = await batcher.search(piece, top_k, deadline, admitted=start > 0)
            except Busy as error:
                raise self._away("full", f"{error}, the limit is retriever.max_queue={self.config.max_queue}") from None
            except Late as error:
                raise self._away("deadline", f"the request waited {error}; ask for a later X-Deadline-Ms or add replicas") from None
            for query, passages in zip(piece, answers, strict=True):
                results[query] = passages
                self._cache.put(query, top_k, passages)
        return results

    def _away(self, reason: str, detail: str) -> HTTPException:
        self.metrics.refused(reason)
        detail = f"{detail}; try again in {_RETRY_AFTER_S} s"
        return HTTPException(503, detail, headers={"Retry-After": str(_RETRY_AFTER_S)})

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncGenerator[None]:
        """Open the index while the server already answers /health and /readyz."""
        # A daemon: opening cannot be interrupted, and must not hold up an end that is asked for meanwhile.
        threading.Thread(target=self._start, name="opening", daemon=True).start()
        yield
        await asyncio.to_thread(self.close)

    def _start(self) -> None:
        try:
            with missing_extras():
                retriever = self._open()
        except ResearchError as error:
            self.failure = error
            return
        except Exception as error:  # noqa: BLE001  (the boundary of this thread: the server ends with the reason, whatever it is)
            self.failure = ServiceError(f"the index cannot be opened ({type(error).__name__}: {error}); mend that and start again")
            self.failure.__cause__ = error
            return
        self._cache = ResultCache(self.config.cache_entries)
        self._batcher = MicroBatcher(retriever.search, self.config.max_batch, self.config.max_queue, self.metrics.batch)
        # Last, because it is what makes `state` say that searches are answered.
        self.retriever = retriever

    def check_files(self) -> None:
        """Note a failure, which ends the server, when a file that is served was cut short."""
        try:
            if self.retriever is not None:
                self.retriever.check_files()
        except ManifestError as error:
            # The first failure is the one to tell.
            self.failure = self.failure or error

    @property
    def state(self) -> str:
        """What /health and /readyz say: starting, healthy, draining or failed."""
        if self.failure is not None:
            return "failed"
        if self.draining:
            return "draining"
        return "starting" if self.retriever is None else "healthy"


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


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Whether the service runs, and whether its searcher is free; 503 until the index is open."""
        # While it drains the service is healthy all the same: a restart would lose what it still answers.
        serves = service.retriever is not None and service.failure is None
        content: dict[str, Any] = {"status": "healthy" if serves else service.state}
        content["retrievers"] = {"total": 1, "available": int(service.idle)}
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
        """What is served: rows, dimension, encoder and the hashes of corpus, embeddings and index."""
        return _json(service.retriever.facts) if service.retriever else refusal(503, "starting")


def _add_searches(app: FastAPI, service: Service) -> None:
    async def search(request: Request, queries: Sequence[str], body: Asked) -> Found:
        timeout_s = _timeout(request.headers.get("x-deadline-ms"), body.timeout_s)
        return await service.search(request.scope["seen"], queries, body.passages, timeout_s)

    @app.post("/search", responses=_ANSWERS)
    async def one(request: Request, body: SearchRequest) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Passages for one query."""
        if not service.searchable(body.query):
            raise HTTPException(400, f"the query is blank ({body.query[:80]!r}); send text to search for")
        results = await search(request, [body.query], body)
        return _json(wire.search_reply(results[0], body.return_score))

    @app.post("/batch_search", responses=_ANSWERS)
    async def several(request: Request, body: BatchSearchRequest) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Passages for several queries; a blank one gets none."""
        results = await search(request, body.query, body)
        return _json(wire.batch_reply(results, body.return_score))

    @app.post("/retrieve", responses=_ANSWERS)
    async def retrieve(request: Request, body: RetrieveRequest) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Passages for several queries, as Search-R1 asks; a blank one gets none."""
        results = await search(request, body.texts, body)
        return _json(wire.retrieve_reply(results, body.return_score))


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
