"""The HTTP application of the retriever. Knows requests, limits and replies; leaves searching to the batcher's thread.

Invariants: (1) /health never waits for a search; (2) a request past a limit is refused with value, limit and remedy
before any work; (3) the only answer of 5xx under load is a deliberate 503 with Retry-After.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from research_rl import __version__
from research_rl.config import RetrieverConfig
from research_rl.retriever import wire
from research_rl.retriever.batching import Busy, MicroBatcher
from research_rl.retriever.engine import Retriever
from research_rl.retriever.wire import BatchSearchRequest, RetrieveRequest, SearchRequest
from research_rl.trajectory import Passage

__all__ = ["create_app"]

_RETRY_AFTER_S = 1
_BYTES_A_CHAR = 12
"""A character in JSON takes at most twelve bytes (an escaped surrogate pair)."""


def create_app(retriever: Retriever, config: RetrieverConfig, token: str | None = None) -> FastAPI:
    """Return the application: /health, /info, /search, /batch_search, /retrieve. With `token`, all but /health need it."""
    batcher = MicroBatcher(retriever.search, config.max_batch, config.max_queue)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        batcher.close()

    app = FastAPI(title="research-rl retriever", version=__version__, lifespan=lifespan)
    app.exception_handler(RequestValidationError)(_invalid)
    app.add_middleware(_Gate, config=config, token=token)
    _add_status(app, retriever, batcher)
    _add_searches(app, _Searches(batcher, config))
    return app


class _Searches:
    """Checks limits and hands queries to the batcher."""

    def __init__(self, batcher: MicroBatcher, config: RetrieverConfig) -> None:
        self._batcher, self._config = batcher, config

    async def __call__(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        self._check(queries, top_k)
        if not queries:
            return []
        try:
            return await self._batcher.search([query.strip() for query in queries], top_k)
        except Busy as error:
            detail = f"{error}, the limit is retriever.max_queue={self._config.max_queue}; try again in {_RETRY_AFTER_S} s"
            raise HTTPException(503, detail, headers={"Retry-After": str(_RETRY_AFTER_S)}) from None

    def _check(self, queries: Sequence[str], top_k: int) -> None:
        config = self._config
        if len(queries) > config.max_batch:
            raise HTTPException(413, f"{len(queries)} queries exceed retriever.max_batch={config.max_batch}; send fewer at once")
        if top_k > config.max_top_k:
            raise HTTPException(422, f"top_n={top_k} exceeds retriever.max_top_k={config.max_top_k}; ask for fewer passages")
        for place, query in enumerate(queries):
            if not query.strip():
                raise HTTPException(400, f"query {place} is blank ({query!r}); send text to search for")
            if len(query) > config.max_query_chars:
                limit = config.max_query_chars
                raise HTTPException(422, f"query {place} has {len(query)} characters, retriever.max_query_chars={limit}; shorten it")
            if not query.isprintable():
                _encodable(query, place)


def _encodable(query: str, place: int) -> None:
    try:
        query.encode()
    except UnicodeEncodeError:
        raise HTTPException(422, f"query {place} holds half a surrogate pair; send valid Unicode") from None


def _add_status(app: FastAPI, retriever: Retriever, batcher: MicroBatcher) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """Whether the service runs, and whether its searcher is free."""
        return {"status": "healthy", "retrievers": {"total": 1, "available": int(batcher.idle)}}

    @app.get("/info")
    async def info() -> dict[str, Any]:  # pyright: ignore[reportUnusedFunction]
        """What is served: rows, dimension, encoder and the hashes of corpus, embeddings and index."""
        return retriever.facts


def _add_searches(app: FastAPI, search: _Searches) -> None:
    @app.post("/search")
    async def one(request: SearchRequest) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Passages for one query."""
        found = await search([request.query], request.top_n)
        return _json(wire.search_reply(found[0], request.return_score))

    @app.post("/batch_search")
    async def several(request: BatchSearchRequest) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Passages for several queries."""
        found = await search(request.query, request.top_n)
        return _json(wire.batch_reply(found, request.return_score))

    @app.post("/retrieve")
    async def retrieve(request: RetrieveRequest) -> Response:  # pyright: ignore[reportUnusedFunction]
        """Passages for several queries, as Search-R1 asks."""
        found = await search(request.queries, request.topk or 3)
        return _json(wire.retrieve_reply(found, request.return_scores))


class _Gate:
    """Refuses a request without the token, or with a body no allowed request can have, before reading it."""

    def __init__(self, app: ASGIApp, config: RetrieverConfig, token: str | None) -> None:
        self._app = app
        self._most = config.max_batch * config.max_query_chars * _BYTES_A_CHAR + 4096
        self._wanted = f"Bearer {token}".encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> Response | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        if self._wanted and scope["path"] != "/health" and not secrets.compare_digest(given, self._wanted):
            detail = "the bearer token is missing or wrong; set RESEARCH_RETRIEVER_TOKEN to the service's"
            return JSONResponse({"detail": detail}, 401, headers={"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"")
        if scope["method"] == "POST" and not length.isdigit():
            return JSONResponse({"detail": "the request has no Content-Length; send the body in one piece"}, 411)
        if length.isdigit() and int(length) > self._most:
            detail = f"the body has {int(length)} bytes, the limit is {self._most}; send fewer or shorter queries"
            return JSONResponse({"detail": detail}, 413)
        return None


async def _invalid(_: Request, error: Exception) -> Response:
    """Name the field, the value and the reason in one line."""
    problems = error.errors() if isinstance(error, RequestValidationError) else []
    told = [
        f"{'.'.join(str(part) for part in item['loc'][1:]) or 'body'}={str(item.get('input'))[:80]}: {item['msg']}" for item in problems
    ]
    return JSONResponse({"detail": "; ".join(told) + "; see /docs for the format"}, 422)


def _json(content: Any) -> Response:
    return Response(json.dumps(content, ensure_ascii=False).encode(), media_type="application/json")
