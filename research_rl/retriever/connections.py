"""Connections that send nothing whole: a deadline for the headers of a request, and a limit on connections. Knows no HTTP of ours.

Invariant: clients that open connections and never finish a request cannot keep others out: past the limit the oldest
unfinished connection gives way to a new one, and each is closed after `_HEADERS_S`.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["bounded", "file_limit"]

_HEADERS_S = 10.0
_OTHER_FILES = 128
"""Open files that are no connections: index files, logs, the listener."""
_FULL = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
_LATE = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


def file_limit() -> int:
    """Raise this process's limit of open files as far as it may; return how many connections it leaves room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The usual soft limit is 1,024 files; a process may raise it to the hard one by itself.
    if hard != resource.RLIM_INFINITY and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return max(soft - _OTHER_FILES, 16) if soft != resource.RLIM_INFINITY else 1 << 20


def bounded(limit: int, refused: Callable[[str], None], headers_s: float = _HEADERS_S) -> type[H11Protocol]:
    """Return uvicorn's protocol with at most `limit` connections, each with `headers_s` seconds to send a request's headers.

    `refused` is called with `headers` or `connections` for each connection that is closed.
    """

    class Bounded(_Bounded):
        bounds = _Bounds(limit, refused, headers_s)

    return Bounded


@dataclass(frozen=True)
class _Bounds:
    """What holds for all connections of one server, and those whose request is still awaited, the oldest first."""

    limit: int
    refused: Callable[[str], None]
    headers_s: float
    unfinished: dict[Any, asyncio.TimerHandle] = field(default_factory=dict[Any, asyncio.TimerHandle])


class _Bounded(H11Protocol):
    bounds: _Bounds

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
        # uvicorn's types deny that there is None between two requests.
        # A request whose headers came has a cycle; its body and its search have time limits elsewhere.
        if self.cycle is not None and not self.cycle.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            self._no_longer_waits()
        elif self not in self.bounds.unfinished:
            self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._no_longer_waits()
        super().connection_lost(exc)

    def _wait_for_headers(self) -> None:
        self.bounds.unfinished[self] = self.loop.call_later(self.bounds.headers_s, self._late)

    def _no_longer_waits(self) -> None:
        if timer := self.bounds.unfinished.pop(self, None):
            timer.cancel()

    def _late(self) -> None:
        self.bounds.refused("headers")
        self._end(_LATE)

    def _end(self, answer: bytes) -> None:
        self._no_longer_waits()
        # At once, since `connection_lost` comes later and the next connection is counted before it.
        self.connections.discard(self)
        self.transport.write(answer)
        self.transport.close()
