"""Which retriever to ask, in which order, and when a second one. Knows addresses, their health and latency; knows no query.

A fleet is written as one address: `,` between replicas of one part, `;` between the parts of an index cut by rows.
Invariants: (1) a part is answered by one replica or not at all; (2) a replica that keeps failing, or being overtaken, gets no
search until a probe succeeds, and then one trial search at a time until one succeeds; (3) where no replica is usable, one search
at a time is sent all the same, and those that wait for it share its outcome; (4) only time on the wire counts as a replica's latency.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

from research_rl.episode.trajectory import SearchFault

__all__ = ["IndexPart", "Replica", "ReplicaError", "address", "parts"]

_OPEN_AFTER = 3
_FIRST_REST_S, _LONGEST_REST_S = 1.0, 30.0
_HEDGE_SHARE = 0.95
_HEDGE_FROM, _HEDGE_BEFORE_S, _HEDGE_LEAST_S = 20, 1.0, 0.02
"""Latencies needed for a quantile; the delay of a second request before there are so many; the shortest delay."""
_HEDGE_BUDGET, _HEDGE_BURST = 0.1, 10.0
"""Second requests allowed per search, and how many of them may be saved up: a fleet that is slow as a whole gets no double load."""

T = TypeVar("T")
State = Literal["closed", "open", "half_open"]
Send = Callable[[str], Coroutine[Any, Any, T]]


class ReplicaError(Exception):
    """A replica failed in a way that another try may mend, after `pause_s` seconds where the server named them."""

    def __init__(self, reason: str, fault: SearchFault, pause_s: float = 0.0) -> None:
        super().__init__(reason)
        self.fault, self.pause_s = fault, pause_s

    def copy(self) -> ReplicaError:
        """Return an equal error, to be raised in another task."""
        return ReplicaError(str(self), self.fault, self.pause_s)


def address(urls: Sequence[str | Sequence[str]]) -> str:
    """Return replicas `[a, b]` or parts `[[a, b], [c]]` as one address."""
    if all(isinstance(item, str) for item in urls):
        return ",".join(str(item) for item in urls)
    return ";".join(item if isinstance(item, str) else ",".join(item) for item in urls)


def parts(address: str) -> list[list[str]]:
    """Return the replicas of each part of an address."""
    return [[url.strip().rstrip("/") for url in part.split(",") if url.strip()] for part in address.split(";") if part.strip(" ,")]


class Replica:
    """One retriever: a circuit breaker and the newest latencies in seconds."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.state: State = "closed"
        self.in_flight = 0
        self.until = 0.0
        """Before this time of `time.monotonic()` it rests."""
        self.trial: asyncio.Future[ReplicaError | None] | None = None
        """The one search under way while the breaker is not closed; its result is that search's failure, if any."""
        self.probing = False
        self._seconds: deque[float] = deque(maxlen=200)
        self._failures = 0
        self._rest = _FIRST_REST_S

    @property
    def usable(self) -> bool:
        """Whether a search may go there: not open, not told to wait, and no trial under way."""
        return self.state != "open" and self.trial is None and time.monotonic() >= self.until

    @property
    def due(self) -> bool:
        """Whether an open breaker has rested long enough for a probe."""
        return self.state == "open" and not self.probing and time.monotonic() >= self.until

    @property
    def usual_s(self) -> float | None:
        """Seconds within which nearly all its answers came; None before there are enough to say."""
        ordered = sorted(self._seconds)
        return ordered[int(_HEDGE_SHARE * len(ordered))] if len(ordered) >= _HEDGE_FROM else None

    def succeeded(self, seconds: float) -> None:
        """Close the breaker and remember the latency."""
        self.state, self._failures, self._rest, self.until = "closed", 0, _FIRST_REST_S, 0.0
        self._seconds.append(seconds)

    def failed(self, *, trial: bool) -> None:
        """Count a failure; open after three in a row or a failed trial, each time for longer.

        Failures of searches that were sent before the breaker opened say nothing new: hundreds may be in flight when a replica dies.
        """
        if self.state != "closed" and not trial:
            return
        self._failures += 1
        if trial or self._failures >= _OPEN_AFTER:
            self._open()

    def busy(self, seconds: float) -> None:
        """Leave a replica alone for as long as it asked; a full queue is no failure."""
        self.until = max(self.until, time.monotonic() + seconds)

    def probed(self, healthy: bool) -> None:
        """Take the result of a probe: half open when it answers, else another rest."""
        self.probing = False
        if self.state == "open":
            if healthy:
                self.state, self.until = "half_open", 0.0
            else:
                self._open()

    def _open(self) -> None:
        self.state = "open"
        # At random, so that clients that lost a replica together do not probe it together.
        self.until = time.monotonic() + random.uniform(self._rest / 2, self._rest)
        self._rest = min(2 * self._rest, _LONGEST_REST_S)


class IndexPart(Generic[T]):
    """The replicas that hold one part of the index. `probe(url)` says whether a replica that failed answers again."""

    def __init__(self, urls: Sequence[str], probe: Callable[[str], Awaitable[bool]]) -> None:
        self.replicas = [Replica(url) for url in urls]
        self.hedges = 0
        """Second requests sent because the first was late."""
        self._probe = probe
        self._probes: set[asyncio.Task[None]] = set()
        self._hedge_budget = _HEDGE_BURST

    async def ask(self, send: Send[T]) -> T:
        """Return the first good answer of `send(url)`: another replica is asked when one fails, or is later than nearly always.

        `send` raises ReplicaError for a failure worth another try. Raises the last of them when every replica failed.
        """
        self._start_probes()
        while not any(replica.usable for replica in self.replicas):
            resting = min(self.replicas, key=lambda replica: replica.until)
            if resting.trial is None:
                return await self._start(resting, send)
            # Shared by all that wait: one that is cancelled must not cancel the future of the others.
            failure = await asyncio.shield(resting.trial)
            if failure is not None:
                # One exception raised in several tasks would gather the tracebacks of all of them.
                raise failure.copy()
        return await self._race(send)

    def close(self) -> None:
        """Stop the probes."""
        for task in self._probes:
            task.cancel()

    async def _race(self, send: Send[T]) -> T:
        self._hedge_budget = min(self._hedge_budget + _HEDGE_BUDGET, _HEDGE_BURST)
        requests: set[asyncio.Task[T]] = set()
        asked: dict[asyncio.Task[T], Replica] = {}  # in the order in which they were asked
        failure: ReplicaError | None = None
        try:
            while True:
                if replica := self._next(asked.values()):
                    task = self._start(replica, send)
                    requests.add(task)
                    asked[task] = replica
                elif not requests:
                    raise failure or ReplicaError("a part of the index has no replica", SearchFault.UNREACHABLE)
                done, requests = await self._first(requests, asked.values())
                for task in done:
                    if not isinstance(error := task.exception(), ReplicaError):
                        _count_overtaken(asked, requests, task)
                        return task.result()
                    failure = error
        finally:
            for task in requests:
                task.cancel()
            # Until the cancelled requests have ended: they use the connection that the caller gives back next.
            await asyncio.gather(*requests, return_exceptions=True)

    async def _first(self, requests: set[asyncio.Task[T]], asked: Collection[Replica]) -> tuple[set[asyncio.Task[T]], set[asyncio.Task[T]]]:
        """Wait until a request ends, or until it is time for a second one: then nothing is done yet."""
        if self._next(asked) and self._hedge_budget >= 1:
            done, pending = await asyncio.wait(requests, timeout=self._hedge_delay(), return_when=asyncio.FIRST_COMPLETED)
            if done:
                return done, pending
            if self._next(asked) and self._hedge_budget >= 1:
                self._hedge_budget -= 1
                self.hedges += 1
                return done, pending
        return await asyncio.wait(requests, return_when=asyncio.FIRST_COMPLETED)

    def _next(self, asked: Collection[Replica]) -> Replica | None:
        """Return the least loaded usable replica that was not asked yet."""
        usable = [replica for replica in self.replicas if replica.usable and replica not in asked]
        # Chance decides between equals; by their order all clients would choose the same.
        return min(usable, key=lambda replica: (replica.in_flight, random.random()), default=None)

    def _hedge_delay(self) -> float:
        """Return after how many seconds an answer is late, by the quickest replica: a slow one must not define what is late."""
        usual = [seconds for replica in self.replicas if (seconds := replica.usual_s) is not None]
        return max(min(usual), _HEDGE_LEAST_S) if usual else _HEDGE_BEFORE_S

    def _start(self, replica: Replica, send: Send[T]) -> asyncio.Task[T]:
        """Send a search to a replica; whether it is the trial of an open breaker is settled here, before any other task runs."""
        trial = None
        if replica.state != "closed" or time.monotonic() < replica.until:
            trial = replica.trial = asyncio.get_running_loop().create_future()
        replica.in_flight += 1
        task = asyncio.create_task(self._asked(replica, send, trial is not None))
        task.add_done_callback(lambda ended: _ended(replica, trial, ended))
        return task

    async def _asked(self, replica: Replica, send: Send[T], trial: bool) -> T:
        started = time.monotonic()
        try:
            answer = await send(replica.url)
        except ReplicaError as error:
            # A replica that says when to come back works; only its queue is full.
            if error.pause_s:
                replica.busy(error.pause_s)
            else:
                replica.failed(trial=trial)
            raise
        replica.succeeded(time.monotonic() - started)
        return answer

    def _start_probes(self) -> None:
        """Probe, beside the searches, replicas whose rest is over."""
        for replica in self.replicas:
            if replica.due:
                replica.probing = True
                task = asyncio.create_task(self._probed(replica))
                self._probes.add(task)
                task.add_done_callback(self._probes.discard)

    async def _probed(self, replica: Replica) -> None:
        replica.probed(await self._probe(replica.url))


def _count_overtaken(asked: Mapping[asyncio.Task[T], Replica], waiting: Collection[asyncio.Task[T]], winner: asyncio.Task[T]) -> None:
    """Count a failure of each replica that was asked before the winner and has not answered yet."""
    # One that stands still answers nothing and fails nothing: it would be asked again and again, and cost a second request each
    # time, until there are none left and a search waits for it as long as it may.
    for task, replica in asked.items():
        if task is winner:
            return
        if task in waiting:
            replica.failed(trial=False)


def _ended(replica: Replica, trial: asyncio.Future[ReplicaError | None] | None, task: asyncio.Task[Any]) -> None:
    """Free a replica for the next search, however this one ended, one that was cancelled before it began included."""
    replica.in_flight -= 1
    error = None if task.cancelled() else task.exception()
    if trial is not None:
        replica.trial = None
        trial.set_result(error if isinstance(error, ReplicaError) else None)
