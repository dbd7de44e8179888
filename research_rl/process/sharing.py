"""A uvicorn server that is one of several on one listening socket. Knows connections and its parent's orders; knows no application.

The parent sends over a channel what it wants: `drain`, as at SIGTERM; `retire`, to make room for others; a second `drain` ends at once.

Invariants: (1) a connection is taken by a process that has the fewest, unless those let it wait for a tenth of a second; (2) what waits
to be accepted is lost with no process, because all accept from one queue; (3) a server that retires takes no connection, answers those
that it has, and ends with the last of them; (4) when the parent is gone, it drains; (5) signals are the parent's business.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from research_rl.process.board import Board
from research_rl.process.channel import Channel
from research_rl.process.draining import DrainingServer

__all__ = ["ProcessShare", "SharingServer"]

_COURTESY_S, _LOOKS = 0.005, 20
"""One with more connections than another leaves the next to that one, and looks so often, so far apart, whether it is still so."""
_NO_FILES_S = 1.0
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessShare:
    """What a process has of the whole: the socket that listens, the board and its place there, and the way to its parent."""

    listener: socket.socket
    board: Board
    place: int
    channel: Channel


class SharingServer(DrainingServer):
    """Tells the parent `ready` once it takes connections; `retire` is called when it takes no more. Else as `DrainingServer`."""

    def __init__(
        self, options: uvicorn.Config, share: ProcessShare, *, retire: Callable[[], None], idle: Callable[[], bool], **draining: Any
    ) -> None:
        super().__init__(options, **draining)
        self._share, self._retire, self._idle = share, retire, idle
        self._joining: set[asyncio.Task[Any]] = set()
        self._taking: asyncio.Task[None] | None = None
        self._retired = False

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave signals alone: whoever ends a service ends all of its processes, and the parent says what that is to mean."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the application, take connections and say so."""
        # uvicorn's own way takes all connections that wait, whatever other processes have.
        await super().startup(sockets=[])
        loop = asyncio.get_running_loop()
        loop.add_reader(self._share.channel.fileno(), self._told)
        self._taking = loop.create_task(self._take())
        self._publish()
        self._share.channel.send(ready=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections and end those that are there."""
        self._leave()
        await super().shutdown(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end."""
        self._publish()
        over = self._retired and not (self._connections or self._active())
        return await super().on_tick(counter) or over

    @property
    def _connections(self) -> int:
        return len(self.server_state.connections) + len(self._joining)

    def _publish(self) -> None:
        if self._taking:
            self._share.board.write(self._share.place, self._connections, idle=self._idle())

    def _leave(self) -> None:
        if self._taking:
            self._taking.cancel()
            self._taking = None
            self._share.board.leave(self._share.place)

    def _told(self) -> None:
        order = self._share.channel.receive()
        if order is None:
            asyncio.get_running_loop().remove_reader(self._share.channel.fileno())
        if order is not None and "retire" in order[0]:
            self._retired = True
            self._leave()
            self._retire()
        else:
            self.handle_exit(signal.SIGTERM, None)

    async def _take(self) -> None:
        """Take one connection after the other."""
        while True:
            await self._waits()
            await self._give_way()
            try:
                self._join(self._share.listener.accept()[0])
            except (BlockingIOError, ConnectionAbortedError):  # another process took it, or its client left
                continue
            except OSError as error:
                _LOG.error("no connection is taken for %g s: %s", _NO_FILES_S, error)
                await asyncio.sleep(_NO_FILES_S)

    async def _give_way(self) -> None:
        for _ in range(_LOOKS):
            self._publish()
            if self._connections <= self._share.board.fewest():
                return
            await asyncio.sleep(_COURTESY_S)

    async def _waits(self) -> None:
        """Return once a connection waits to be taken."""
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._share.listener, arrived.set)
        try:
            await arrived.wait()
        finally:
            loop.remove_reader(self._share.listener)

    def _join(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        # A task of its own: what was accepted is to be served, even if no more is taken a moment later.
        task = asyncio.get_running_loop().create_task(self._joined(connection))
        self._joining.add(task)
        task.add_done_callback(self._joining.discard)

    async def _joined(self, connection: socket.socket) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, connection)
        except OSError:  # the client left already
            connection.close()

    def _protocol(self) -> asyncio.Protocol:
        options: Any = self.config
        return options.http_protocol_class(config=options, server_state=self.server_state, app_state=self.lifespan.state)
