"""A client's connection: its body, and its leaving. Knows ASGI messages; knows no question.

Invariant: work for a client that left is cancelled at once, whether it streams or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from research_rl.agent.unless import unless

__all__ = ["EventStream", "body_of", "unless_gone"]

# A client that sends a byte now and then would hold its connection for as long as it likes.
_BODY_S = 10.0
_HEADERS = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no"))
"""The second keeps nginx from holding events back."""
T = TypeVar("T")


async def body_of(request: Request, most: int) -> bytes | None:
    """Return the body; None when it has more than `most` bytes or does not arrive, in time or at all."""
    chunks, size = list[bytes](), 0
    try:
        async with asyncio.timeout(_BODY_S):
            async for chunk in request.stream():
                chunks.append(chunk)
                size += len(chunk)
                if size > most:
                    return None
    except (TimeoutError, ClientDisconnect):
        return None
    return b"".join(chunks)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """Return what `work` returns; cancel it and return None when the client leaves first. The request's body must have been read."""
    return await unless(_left(receive), work)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """A stream of server-sent events; `over` is called once, however it ends, also when it never began."""

    def __init__(self, events: Callable[[], AsyncGenerator[bytes]], over: Callable[[], None]) -> None:
        super().__init__()
        self._events, self._over = events, over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the last one, or until the client leaves."""
        try:
            await unless_gone(receive, self._sent(send))
        finally:
            self._over()

    async def _sent(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": list(_HEADERS)})
        async with aclosing(self._events()) as events:
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
