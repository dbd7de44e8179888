"""Which retrievers to ask, in which order, and when a second one. Knows addresses, their health and latency; knows no query.

A fleet is written as one address: `,` between replicas of one part, `;` between the parts of an index cut by rows.
Invariants: (1) a part is answered by one replica or not at all; (2) a replica that keeps failing is left alone until a probe
and then one search succeed; (3) resting replicas are asked all the same when no other is left.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Generic, Literal, TypeVar

__all__ = ["Part", "Replica", "address", "parts"]

_OPEN_AFTER = 3
_FIRST_REST_S, _LONGEST_REST_S = 1.0, 30.0
_HEDGE_SHARE = 0.95
_HEDGE_FROM, _HEDGE_BEFORE_S, _HEDGE_LEAST_S = 20, 1.0, 0.02
"""Latencies needed for a quantile; the delay of a second request before there are so many; the shortest delay."""

T = TypeVar("T")
State = Literal["closed", "open", "half_open"]


def address(urls: Sequence[str | Sequence[str]]) -> str:
    """Return replicas `[a, b]` or parts `[[a, b], [c]]` as one address."""
    if all(isinstance(item, str) for item in urls):
        return ",".join(str(item) for item in urls)
    return ";".join(item if isinstance(item, str) else ",".join(item) for item in urls)


def parts(address: str) -> list[list[str]]:
    """Return the replicas of each part of an address."""
    return [[url.strip().rstrip("/") for url in part.split(",") if url.strip()] for part in address.split(";") if part.strip(" ,")]


class Replica:
    """One retriever: a circuit breaker and the newest latencies."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.state: State = "closed"
        self.flying = 0
        self.seconds: deque[float] = deque(maxlen=200)
        self._failures = 0
        self._rest = _FIRST_REST_S
        self._until = 0.0

    @property
    def usable(self) -> bool:
        """Whether a search may go there: closed and not told to wait, or half open with no trial under way."""
        if self.state == "half_open":
            return self.flying == 0
        return self.state == "closed" and time.monotonic() >= self._until

    @property
    def due(self) -> bool:
        """Whether an open breaker has rested long enough for a probe."""
        return self.state == "open" and time.monotonic() >= self._until

    def succeeded(self, seconds: float) -> None:
        """Close the breaker and remember the latency."""
        self.state, self._failures, self._rest, self._until = "closed", 0, _FIRST_REST_S, 0.0
        self.seconds.append(seconds)

    def failed(self) -> None:
        """Count a failure; open after three in a row, or at once when half open, each time for longer."""
        self._failures += 1
        if self.state == "half_open" or self._failures >= _OPEN_AFTER:
            self.state = "open"
            self._until = time.monotonic() + random.uniform(self._rest / 2, self._rest)
            self._rest = min(2 * self._rest, _LONGEST_REST_S)

    def busy(self, seconds: float) -> None:
        """Leave a replica alone for as long as it asked; being full is no illness."""
        self._until = max(self._until, time.monotonic() + seconds)

    def probed(self, well: bool) -> None:
        """Take the result of a probe: half open when it answers, else back to rest."""
        if well:
            self.state = "half_open"
        else:
            self.state = "half_open"
            self.failed()


class Part(Generic[T]):
    """The replicas that hold one part of the index. `ask(url)` searches there and raises what `again` names on failure."""

    def __init__(self, urls: Sequence[str], probe: Callable[[str], Awaitable[bool]]) -> None:
        self.replicas = [Replica(url) for url in urls]
        self._probe = probe
        self._probes: set[asyncio.Task[None]] = set()

    async def ask(self, ask: Callable[[str], Coroutine[Any, Any, T]], again: type[Exception]) -> T:
        """Return the first good answer: another replica is asked when one fails, or answers later than nearly always.

        Raises the last failure when every replica failed.
        """
        self._look_after()
        waiting: dict[asyncio.Task[T], Replica] = {}
        order = self._order()
        last: Exception | None = None
        try:
            while order or waiting:
                if order:
                    replica = order.pop(0)
                    waiting[asyncio.create_task(self._asked(replica, ask, again))] = replica
                delay = self._delay(list(waiting.values())) if order else None
                done, _ = await asyncio.wait(waiting, timeout=delay, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    del waiting[task]
                    try:
                        return task.result()
                    except again as error:
                        last = error
            raise last or RuntimeError("a part of the index has no replica")
        finally:
            for task in waiting:
                task.cancel()

    def close(self) -> None:
        """Stop the probes."""
        for task in self._probes:
            task.cancel()

    def _order(self) -> list[Replica]:
        """Return the usable replicas, the least loaded first; the one that rested longest when none is usable."""
        usable = [replica for replica in self.replicas if replica.usable]
        random.shuffle(usable)
        return sorted(usable, key=lambda replica: replica.flying) or [min(self.replicas, key=lambda replica: replica._until)]

    def _delay(self, asked: Sequence[Replica]) -> float:
        """Return after how many seconds an answer is later than nearly all before it."""
        known = sorted(second for replica in asked for second in replica.seconds)
        return max(known[int(_HEDGE_SHARE * len(known))], _HEDGE_LEAST_S) if len(known) >= _HEDGE_FROM else _HEDGE_BEFORE_S

    async def _asked(self, replica: Replica, ask: Callable[[str], Coroutine[Any, Any, T]], again: type[Exception]) -> T:
        started = time.monotonic()
        replica.flying += 1
        try:
            found = await ask(replica.url)
        except again as error:
            pause = float(getattr(error, "pause", 0.0))
            if pause:
                replica.busy(pause)
            else:
                replica.failed()
            raise
        else:
            replica.succeeded(time.monotonic() - started)
            return found
        finally:
            replica.flying -= 1

    def _look_after(self) -> None:
        """Probe, beside the searches, replicas whose rest is over."""
        for replica in self.replicas:
            if replica.due:
                replica.busy(_LONGEST_REST_S)
                task = asyncio.create_task(self._probed(replica))
                self._probes.add(task)
                task.add_done_callback(self._probes.discard)

    async def _probed(self, replica: Replica) -> None:
        replica.probed(await self._probe(replica.url))
