"""What every request passes first: access, size, time. Counts and logs what comes out. Knows headers; knows no search.

Invariants: (1) a request that may not ask, or whose body is over the limit, is refused before the body is read in full;
(2) a body that does not arrive within `_BODY_S` costs its sender the request, nobody else anything; (3) an error nobody
foresaw is answered by 503 and told in the log.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from fastapi import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from research_rl.config import RetrieverConfig
from research_rl.process.access import Access, bearer
from research_rl.retriever import LOOPBACK, TOKEN, docs
from research_rl.retriever.observe import ROUTES, RequestLog, RetrieverMetrics, Seen

__all__ = ["Gateway", "access", "refusal"]

_BODY_S = 10.0
_LOG = logging.getLogger("research_rl.retriever")


def refusal(status: int, detail: str, headers: Mapping[str, str] | None = None, content: Any = None) -> Response:
    """Return an answer that says why not; 503 carries Retry-After. Any text is safe in it."""
    more = {"Retry-After": "1"} if status == 503 else {}
    body = json.dumps({"detail": detail} if content is None else content).encode()
    return Response(body, status, {**more, **(headers or {})}, media_type="application/json")


def access(config: RetrieverConfig, token: str | None) -> Access:
    """Return who may ask a retriever. `token` is what clients must send, unless `retriever.auth` is none.

    /health, /readyz and the page /docs need neither token nor network, and say nothing about what is served.
    """
    return Access(
        (config.host, *config.hosts),
        outside=config.host not in LOOPBACK,
        networks=[ipaddress.ip_network(network, strict=False) for network in config.allow],
        authorization=bearer(token) if token and config.auth == "token" else None,
        open_paths=("/health", "/readyz", *docs.OPEN),
        remedies={
            "host": "add it to retriever.hosts or use its address",
            "network": "add its network to retriever.allow",
            "token": f"set {TOKEN} to the service's",
        },
    )


class Gateway:
    """The outermost ASGI application; `active` counts the requests being answered.

    `closing`: the service ends, and what comes now is late. `leaving`: others serve in its place, and each answer ends its connection.
    """

    def __init__(self, app: ASGIApp, config: RetrieverConfig, token: str | None, metrics: RetrieverMetrics) -> None:
        self.active = 0
        self.closing = self.leaving = False
        self.request_log: RequestLog | None = None
        self._app, self._metrics = app, metrics
        self._access = access(config, token)
        self._most = config.max_body_mib << 20

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Messages of the lifespan, in which the application opens the index.
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        # All other paths share one label, or a client could make any number of metrics.
        seen = scope["seen"] = Seen(scope["path"] if scope["path"] in ROUTES else "other", late=self.closing)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # A draining server ends soon: a client must not send its next request on this connection.
                if self.closing or self.leaving:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        self.active += 1
        try:
            await self._answer(scope, receive, watched, lambda: status != 0)
        finally:
            self.active -= 1
            # nginx's number for a client that left before its answer began.
            self._tell(seen, status or 499, time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, begun: Any) -> None:
        if answer := self._refused(scope):
            await answer(scope, receive, send)
            return
        try:
            body = await self._body(scope, receive)
            if isinstance(body, Response):
                await body(scope, receive, send)
            else:
                await self._app(scope, body, _without_500(send))
        except Exception:
            _LOG.exception("an unforeseen error at %s", scope["path"])
            self._metrics.refused("error")
            # The status is on the wire already; uvicorn cuts the connection, by which the client sees that the answer is not whole.
            if begun():
                raise
            await refusal(503, "the request could not be answered; the service's log says why")(scope, receive, send)

    def _tell(self, seen: Seen, status: int, seconds: float) -> None:
        self._metrics.request(seen, status, seconds)
        if self.request_log:
            self.request_log.request(seen, status, seconds)

    def _refused(self, scope: Scope) -> Response | None:
        if denied := self._access.refused(scope):
            self._metrics.refused(denied.reason)
            return refusal(denied.status, denied.detail, {"WWW-Authenticate": self._access.challenge} if denied.status == 401 else None)
        # Cut before `int`: Python refuses thousands of digits with an error of its own, and 20 exceed every limit.
        length = dict(scope["headers"]).get(b"content-length", b"")
        return self._too_large(int(length[:20])) if length.isdigit() and int(length[:20]) > self._most else None

    def _too_large(self, size: int) -> Response:
        self._metrics.refused("size")
        limit = f"retriever.max_body_mib={self._most >> 20}"
        return refusal(413, f"the body has {size:,} bytes or more, the limit is {limit}; send fewer or shorter queries, or raise it")

    async def _body(self, scope: Scope, receive: Receive) -> Receive | Response:
        """Return a `receive` that hands out the body, read whole, or the refusal of one that is too large or too slow."""
        if scope["method"] != "POST":
            return receive
        chunks: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(_BODY_S):
                while more:
                    message = await receive()
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > self._most:
                        return self._too_large(size)
                    more = message["type"] != "http.disconnect" and bool(message.get("more_body"))
        except TimeoutError:
            return refusal(408, f"the body did not arrive within {_BODY_S:g} s")
        return _replay(b"".join(chunks), receive)


def _without_500(send: Send) -> Send:
    """Return a `send` that drops the 500 with which Starlette answers an exception before it raises it: ours is a 503."""
    failed = False

    async def sent(message: Message) -> None:
        nonlocal failed
        failed = failed or message.get("status") == 500
        if not failed:
            await send(message)

    return sent


def _replay(body: bytes, receive: Receive) -> Receive:
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay
