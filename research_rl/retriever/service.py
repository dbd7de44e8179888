"""The HTTP application of the retriever. Knows requests, limits and replies; leaves searching to the batcher's thread.

Invariants: (1) /health never waits for a search; (2) a request past a limit is refused with value, limit and remedy
before any work; (3) the only answer of 5xx is a deliberate 503 with Retry-After; (4) what was accepted before the service
drains is answered.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError

from research_rl import __version__
from research_rl.config import RetrieverConfig
from research_rl.episode.trajectory import Passage
from research_rl.errors import ResearchError
from research_rl.extras import missing_extras
from research_rl.retriever import wire
from research_rl.retriever.batching import Busy, Late, MicroBatcher
from research_rl.retriever.cache import ResultCache
from research_rl.retriever.engine import Retriever
from research_rl.retriever.gateway import Gateway, refusal
from research_rl.retriever.observe import Metrics, Seen
from research_rl.retriever.wire import BatchSearchRequest, RetrieveRequest, SearchRequest

__all__ = ["Service"]

_RETRY_AFTER_S = 1
Found = list[list[Passage]]


class Service:
    """The application and its state: opening, ready, draining. `app` is what a server runs."""

    def __init__(self, open_retriever: Callable[[], Retriever], config: RetrieverConfig, token: str | None = None) -> None:
        self.config = config
        self.retriever: Retriever | None = None
        self.failure: ResearchError | None = None
        self.draining = False
        self._open = open_retriever
        self._batcher: MicroBatcher | None = None
        self._cache = ResultCache(0, "")
        self.metrics = Metrics(lambda: self._batcher.waiting if self._batcher else 0, lambda: self.gateway.active, lambda: self.ready)
        self.app = FastAPI(title="research-rl retriever", version=__version__, lifespan=self._lifespan)
        self.app.exception_handler(RequestValidationError)(_invalid)
        self.gateway = Gateway(self.app, config, token, self.metrics)
        _add_status(self.app, self)
        _add_searches(self.app, self)

    @property
    def ready(self) -> bool:
        """Whether searches are answered: the canary was found and no end was asked for."""
        return self.retriever is not None and not self.draining

    @property
    def idle(self) -> bool:
        """Whether no search runs or waits."""
        return self._batcher is not None and self._batcher.idle

    def close(self) -> None:
        """Finish what waits and end the search thread."""
        if self._batcher:
            self._batcher.close()

    async def search(self, seen: Seen, texts: Sequence[str], top_k: int, deadline: float) -> Found:
        """Return passages for each query, kept or searched. Raises HTTPException for what is past a limit, full or late."""
        queries = [" ".join(text.split()) for text in texts]
        _check(self.config, queries, texts, top_k)
        seen.queries, seen.top_k = len(queries), top_k
        if self.config.log_queries:
            seen.texts = queries
        if seen.late:
            raise self._away("draining", "the service ends")
        if self._batcher is None:
            raise self._away("starting", "the index is being opened")
        found = {query: kept for query in dict.fromkeys(queries) if (kept := self._cache.get(query, top_k)) is not None}
        seen.cached = sum(query in found for query in queries)
        if missing := [query for query in dict.fromkeys(queries) if query not in found]:
            answers, seen.batch = await self._searched(self._batcher, missing, top_k, deadline)
            for query, passages in zip(missing, answers, strict=True):
                found[query] = passages
                self._cache.put(query, top_k, passages)
        return [found[query] for query in queries]

    async def _searched(self, batcher: MicroBatcher, queries: Sequence[str], top_k: int, deadline: float) -> tuple[Found, int]:
        try:
            return await batcher.search(queries, top_k, deadline)
        except Busy as error:
            raise self._away("full", f"{error}, the limit is retriever.max_queue={self.config.max_queue}") from None
        except Late as error:
            raise self._away("deadline", f"the request waited {error}; ask for a later X-Deadline-Ms or add replicas") from None

    def _away(self, reason: str, detail: str) -> HTTPException:
        self.metrics.refused(reason)
        detail = f"{detail}; try again in {_RETRY_AFTER_S} s"
        return HTTPException(503, detail, headers={"Retry-After": str(_RETRY_AFTER_S)})

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncGenerator[None]:
        """Open the index while the server already answers /health and /readyz."""
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
        self._cache = ResultCache(self.config.cache_entries, retriever.facts["manifests"]["index"])
        self._batcher = MicroBatcher(retriever.search, self.config.max_batch, self.config.max_queue, self.metrics.batch)
        self.retriever = retriever


def _check(config: RetrieverConfig, queries: Sequence[str], texts: Sequence[str], top_k: int) -> None:
    if len(queries) > config.max_batch:
        raise HTTPException(413, f"{len(queries)} queries exceed retriever.max_batch={config.max_batch}; send fewer at once")
    if top_k > config.max_top_k:
        raise HTTPException(422, f"top_n={top_k} exceeds retriever.max_top_k={config.max_top_k}; ask for fewer passages")
    for place, (query, text) in enumerate(zip(queries, texts, strict=True)):
        if not query:
            raise HTTPException(400, f"query {place} is blank ({text[:80]!r}); send text to search for")
        if len(text) > config.max_query_chars:
            limit = config.max_query_chars
            raise HTTPException(422, f"query {place} has {len(text)} characters, retriever.max_query_chars={limit}; shorten it")
        if not query.isprintable():
            _encodable(query, place)


def _encodable(query: str, place: int) -> None:
    try:
        query.encode()
    except UnicodeEncodeError:
        raise HTTPException(422, f"query {place} holds half a surrogate pair; send valid Unicode") from None


def _add_status(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Whether the service runs, and whether its searcher is free; 503 until the index is open."""
        started = service.retriever is not None
        content = {"status": "healthy" if started else "starting", "retrievers": {"total": 1, "available": int(service.idle)}}
        return _json(content) if started else refusal(503, "starting", content=content)

    @app.get("/readyz")
    async def readyz() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Whether searches are answered: 200 from the moment the canary was found until the service drains, else 503."""
        if service.ready:
            return _json({"status": "ready"})
        return refusal(503, "draining" if service.draining else "starting")

    @app.get("/metrics")
    async def metrics() -> Response:  # pyright: ignore[reportUnusedFunction]
        """Counters in Prometheus's text format."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/info")
    async def info() -> Response:  # pyright: ignore[reportUnusedFunction]
        """What is served: rows, dimension, encoder and the hashes of corpus, embeddings and index."""
        return _json(service.retriever.facts) if service.retriever else refusal(503, "starting")


def _add_searches(app: FastAPI, service: Service) -> None:
    async def search(request: Request, queries: Sequence[str], top_k: int, timeout_s: float | None) -> Found:
        deadline = _deadline(request.headers.get("x-deadline-ms"), timeout_s, service.config.max_deadline_s)
        return await service.search(request.scope["seen"], queries, top_k, deadline)

    @app.post("/search", responses=_ANSWERS)
    async def one(request: Request, body: SearchRequest) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Passages for one query."""
        found = await search(request, [body.query], body.top_n, body.timeout_s)
        return _json(wire.search_reply(found[0], body.return_score))

    @app.post("/batch_search", responses=_ANSWERS)
    async def several(request: Request, body: BatchSearchRequest) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Passages for several queries."""
        found = await search(request, body.query, body.top_n, body.timeout_s)
        return _json(wire.batch_reply(found, body.return_score))

    @app.post("/retrieve", responses=_ANSWERS)
    async def retrieve(request: Request, body: RetrieveRequest) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Passages for several queries, as Search-R1 asks."""
        found = await search(request, body.texts, body.topk or 3, body.timeout_s)
        return _json(wire.retrieve_reply(found, body.return_scores))


_ANSWERS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A blank query, or a body that is no JSON."},
    401: {"description": "The bearer token is missing or wrong."},
    408: {"description": "The body did not arrive in time."},
    411: {"description": "No Content-Length."},
    413: {"description": "More queries or bytes than allowed."},
    503: {"description": "Full, starting, draining, or past the deadline; Retry-After says when to try again."},
}


def _deadline(header: str | None, timeout_s: float | None, most_s: float) -> float:
    """Return until when, in `time.monotonic()`, a request may wait. Raises HTTPException for a header that is no number."""
    asked = [most_s] if timeout_s is None else [most_s, timeout_s]
    if header is not None:
        if not (header.isascii() and header.isdigit()):
            raise HTTPException(422, f"X-Deadline-Ms={header[:80]!r} is no whole number of milliseconds; send one, such as 2000")
        asked.append(int(header[:12]) / 1000)
    return time.monotonic() + min(asked)


async def _invalid(_: Request, error: Exception) -> Response:
    """Name the field, the value and the reason in one line."""
    problems = error.errors() if isinstance(error, RequestValidationError) else []
    told = [f"{'.'.join(map(str, item['loc'][1:])) or 'body'}={str(item.get('input'))[:80]}: {item['msg']}" for item in problems]
    return refusal(422, "; ".join(told) + "; see /docs for the format")


def _json(content: Any) -> Response:
    return Response(json.dumps(content, ensure_ascii=False).encode(), media_type="application/json")
