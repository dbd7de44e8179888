"""What every request passes first: token, size, time. Counts and logs what comes out. Knows headers; knows no search.

Invariants: (1) a request without the token, or with a body no allowed request can have, is refused before it is read;
(2) a body that does not arrive within `_BODY_S` costs its sender the request, nobody else anything; (3) an error nobody
foresaw is answered by 503 and told in the log.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Mapping
from typing import Any

from fastapi import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from research_rl.config import RetrieverConfig
from research_rl.retriever.observe import ROUTES, Metrics, RequestLog, Seen

__all__ = ["Gateway", "refusal"]

_BYTES_A_CHAR = 12
"""A character in JSON takes at most twelve bytes (an escaped surrogate pair)."""
_MOST_BYTES = 8 << 20
_BODY_S = 10.0
_OPEN = ("/health", "/readyz")
"""Answered without a token: they say nothing about what is served, and probes carry none."""
_LOG = logging.getLogger("research_rl.retriever")


def refusal(status: int, detail: str, headers: Mapping[str, str] | None = None, content: Any = None) -> Response:
    """Return an answer that says why not; 503 carries Retry-After. Any text is safe in it."""
    more = {"Retry-After": "1"} if status == 503 else {}
    body = json.dumps({"detail": detail} if content is None else content).encode()
    return Response(body, status, {**more, **(headers or {})}, media_type="application/json")


class Gateway:
    """The outermost ASGI application; `active` counts the requests being answered."""

    def __init__(self, app: ASGIApp, config: RetrieverConfig, token: str | None, metrics: Metrics) -> None:
        self.active = 0
        self.closing = False
        self.request_log: RequestLog | None = None
        self._app, self._metrics = app, metrics
        self._most = min(_MOST_BYTES, config.max_batch * config.max_query_chars * _BYTES_A_CHAR + 4096)
        self._wanted = f"Bearer {token}".encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        seen = scope["seen"] = Seen(scope["path"] if scope["path"] in ROUTES else "other", late=self.closing)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self.closing:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        self.active += 1
        try:
            await self._answer(scope, receive, watched, lambda: status != 0)
        finally:
            self.active -= 1
            self._tell(seen, status or 499, time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, begun: Any) -> None:
        if answer := self._refused(scope):
            await answer(scope, receive, send)
            return
        try:
            body = await _body(scope, receive)
            await (
                self._app(scope, body, send)
                if body
                else refusal(408, f"the body did not arrive within {_BODY_S:g} s")(scope, receive, send)
            )
        except Exception:
            _LOG.exception("an unforeseen error at %s", scope["path"])
            self._metrics.refused("error")
            if begun():
                raise
            await refusal(503, "the request could not be answered; the service's log says why")(scope, receive, send)

    def _tell(self, seen: Seen, status: int, seconds: float) -> None:
        self._metrics.request(seen, status, seconds)
        if self.request_log:
            self.request_log.request(seen, status, seconds)

    def _refused(self, scope: Scope) -> Response | None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        if self._wanted and scope["path"] not in _OPEN and not secrets.compare_digest(given, self._wanted):
            self._metrics.refused("token")
            detail = "the bearer token is missing or wrong; set RESEARCH_RETRIEVER_TOKEN to the service's"
            return refusal(401, detail, {"WWW-Authenticate": "Bearer"})
        length = headers.get(b"content-length", b"")
        if scope["method"] == "POST" and not length.isdigit():
            return refusal(411, "the request has no Content-Length; send the body in one piece")
        if length.isdigit() and int(length[:20]) > self._most:
            self._metrics.refused("size")
            return refusal(413, f"the body has {int(length[:20])} bytes, the limit is {self._most}; send fewer or shorter queries")
        return None


async def _body(scope: Scope, receive: Receive) -> Receive | None:
    """Return a `receive` that hands out the body, read whole; None when it did not come in time."""
    if scope["method"] != "POST":
        return receive
    chunks: list[bytes] = []
    try:
        async with asyncio.timeout(_BODY_S):
            while True:
                message = await receive()
                chunks.append(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    break
    except TimeoutError:
        return None
    first: list[Message] = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
