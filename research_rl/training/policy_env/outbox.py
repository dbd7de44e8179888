"""Send what is ready together. Knows asyncio; knows not what is sent."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

__all__ = ["Outbox"]

T = TypeVar("T")


class Outbox(Generic[T]):
    """Items that arrive while one batch is being sent form the next batch, so that no item waits for a timer and few batches are sent."""

    def __init__(self, send: Callable[[list[T]], Awaitable[None]]) -> None:
        self._send = send
        self._one_at_a_time = asyncio.Lock()
        self._waiting: list[T] = []
        self._next: asyncio.Task[None] | None = None

    async def put(self, item: T) -> None:
        """Send `item` with whatever else waits; return when it was sent, or raise what the sending raised."""
        self._waiting.append(item)
        if self._next is None:
            self._next = asyncio.create_task(self._send_waiting())
        # Others wait for the same sending: whoever is cancelled leaves alone.
        await asyncio.shield(self._next)

    async def _send_waiting(self) -> None:
        async with self._one_at_a_time:
            # Taken when the line is free and not before: who came meanwhile is sent along.
            items, self._waiting, self._next = self._waiting, [], None
            await self._send(items)
