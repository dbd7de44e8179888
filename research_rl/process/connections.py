"""Connections whose client does nothing: deadlines for the headers of a request and for reading a reply, and a limit on connections.

Knows no HTTP of ours. Invariants: (1) clients that open connections and never finish a request cannot keep others out: past the limit the
oldest unfinished connection gives way to a new one, and each is closed after `_HEADERS_S`; (2) a client that reads nothing of its reply
holds no place for longer than `_UNREAD_S`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

__all__ = ["bounded"]

_HEADERS_S = 10.0
_UNREAD_S = 30.0
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_LATE = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def bounded(limit: int, refused: Callable[[str], None], headers_s: float = _HEADERS_S, unread_s: float = _UNREAD_S) -> type[H11Protocol]:
    """Return uvicorn's protocol with at most `limit` connections, each with `headers_s` seconds to send a request's headers.

    A connection whose client took nothing of a waiting reply for `unread_s` seconds is cut off. `refused` is called with `headers`,
    `connections` or `unread` for each connection that is closed.
    """

    class Bounded(_Bounded):
        bounds = _Bounds(limit, refused, headers_s, unread_s)

    return Bounded


@dataclass(frozen=True)
class _Bounds:
    """What holds for all connections of one server, and those whose request is still awaited, the oldest first."""

    limit: int
    refused: Callable[[str], None]
    headers_s: float
    unread_s: float
    unfinished: dict[Any, asyncio.TimerHandle] = field(default_factory=dict[Any, asyncio.TimerHandle])


class _Bounded(H11Protocol):
    bounds: _Bounds
    upgraded = False
    unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait_for_headers()
        if len(self.connections) > self.bounds.limit:
            # There is one: this connection itself was entered just above.
            oldest = next(iter(self.bounds.unfinished))
            self.bounds.refused("connections")
            oldest._end(_FULL)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # A request whose headers came has a cycle; its body and its search have time limits elsewhere.
        # Between two requests there is none, which uvicorn's types deny.
        cycle = cast(RequestResponseCycle | None, self.cycle)
        if self.upgraded or (cycle is not None and not cycle.response_complete):
            self._no_longer_waits()
        elif self not in self.bounds.unfinished:
            self._wait_for_headers()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        # The connection goes to another protocol, which this one's timer would cut off in the middle.
        self.upgraded = True
        super().handle_websocket_upgrade(event)

    def pause_writing(self) -> None:
        # What was written waits here, since the client's and the system's buffers are full.
        self.unread = self.loop.call_later(self.bounds.unread_s, self._cut)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._is_read()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._no_longer_waits()
        self._is_read()
        super().connection_lost(exc)

    def _wait_for_headers(self) -> None:
        self.bounds.unfinished[self] = self.loop.call_later(self.bounds.headers_s, self._late)

    def _no_longer_waits(self) -> None:
        if timer := self.bounds.unfinished.pop(self, None):
            timer.cancel()

    def _is_read(self) -> None:
        if self.unread:
            self.unread.cancel()
            self.unread = None

    def _cut(self) -> None:
        self.bounds.refused("unread")
        # Closing would wait until what was written is read.
        self.transport.abort()

    def _late(self) -> None:
        self.bounds.refused("headers")
        self._end(_LATE)

    def _end(self, answer: bytes) -> None:
        self._no_longer_waits()
        # At once, since `connection_lost` comes later and the next connection is counted before it.
        self.connections.discard(self)
        self.transport.write(answer)
        self.transport.close()
