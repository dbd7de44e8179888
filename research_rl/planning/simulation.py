"""How long a fleet of retrievers takes to answer: queries, parts, replicas, second requests, one event after the other.

Knows queues and clocks; knows no index and measures nothing. It follows `retriever.fleet` and `retriever.batching`: a query goes to the
least busy replica of every part and is answered when all parts are; a replica searches together whatever waits when it becomes free; a
second replica is asked when the first is later than 95 % of the newest answers of the quickest, within the same budget. Deviation: a
replica also finishes the requests that were overtaken, as the service does once it has begun them.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from research_rl.retriever import fleet

__all__ = ["Fleet", "Service", "SimulatedRun", "poisson", "simulate"]

Service = Callable[[int, random.Random], float]
"""Seconds that a joint search of so many queries takes; it may draw."""
_FROM, _BEFORE_S, _LEAST_S = fleet._HEDGE_FROM, fleet._HEDGE_BEFORE_S, fleet._HEDGE_LEAST_S  # pyright: ignore[reportPrivateUsage]
_SHARE, _BUDGET, _BURST = fleet._HEDGE_SHARE, fleet._HEDGE_BUDGET, fleet._HEDGE_BURST  # pyright: ignore[reportPrivateUsage]
_REMEASURED = 20
"""Answers after which a replica's usual latency is reckoned anew: sorting after every answer would take most of the time."""


@dataclass(frozen=True)
class Fleet:
    """Parts of an index with their replicas. `cores`: those that all replicas share, in turns as an operating system gives them, None:
    each replica has its own.

    `request_s` is what a request takes beside the search, without waiting for anything. With `lost` the first replica of the first part
    ends when that share of the queries has come, and what it was asked goes to another.
    """

    parts: int
    replicas: int
    service: Service
    max_batch: int = 512
    hedge: bool = True
    cores: int | None = None
    request_s: float = 0.0
    lost: float | None = None


@dataclass(frozen=True)
class SimulatedRun:
    """Seconds of every query, in order; seconds of every answer of a part, by part; second requests; share of time replicas searched."""

    latencies: list[float]
    of_parts: list[list[float]]
    hedges: int
    busy: float


@dataclass
class _Replica:
    alive: bool = True
    searching: bool = False
    in_flight: int = 0
    waiting: deque[_ReplicaRequest] = field(default_factory=deque["_ReplicaRequest"])
    batch: list[_ReplicaRequest] = field(default_factory=list["_ReplicaRequest"])
    newest: deque[float] = field(default_factory=lambda: deque[float](maxlen=200))
    answers: int = 0
    usual: float | None = None


@dataclass
class _ReplicaRequest:
    """A query at a replica; `counted` while it is among the replica's requests in flight."""

    ask: _Ask
    replica: _Replica
    sent: float
    counted: bool = True


@dataclass
class _Ask:
    """A query at a part: whom it was sent to, and whether it is answered."""

    query: int
    part: int
    requests: list[_ReplicaRequest] = field(default_factory=list[_ReplicaRequest])
    answered: bool = False


def poisson(qps: float, queries: int, seed: int = 0) -> list[float]:
    """Return the seconds at which queries come that do not know of each other."""
    draw, now, times = random.Random(seed), 0.0, list[float]()
    for _ in range(queries):
        now += draw.expovariate(qps)
        times.append(now)
    return times


def simulate(fleet_of: Fleet, arrivals: Sequence[float], seed: int = 0) -> SimulatedRun:
    """Play the queries that come at `arrivals` (ascending seconds) until all are answered; equal seeds give equal outcomes."""
    return _Simulation(fleet_of, arrivals, random.Random(seed)).run()


class _Simulation:
    def __init__(self, fleet_of: Fleet, arrivals: Sequence[float], draw: random.Random) -> None:
        self._fleet, self._arrivals, self._draw = fleet_of, arrivals, draw
        self._parts = [[_Replica() for _ in range(fleet_of.replicas)] for _ in range(fleet_of.parts)]
        self._budgets = [_BURST] * fleet_of.parts
        # Searches under way by the work at which each ends, and the work that one which began with the simulation would have had by now.
        self._searches: list[tuple[float, int, _Replica]] = []
        self._work, self._worked, self._plans = 0.0, 0.0, 0
        self._left = [fleet_of.parts] * len(arrivals)
        self._latencies = [0.0] * len(arrivals)
        self._of_parts: list[list[float]] = [[] for _ in range(fleet_of.parts)]
        self._now, self._hedges, self._searched = 0.0, 0, 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = count()

    def run(self) -> SimulatedRun:
        for query, when in enumerate(self._arrivals):
            self._at(when, self._come, query)
        if self._fleet.lost is not None:
            self._at(self._arrivals[int(self._fleet.lost * len(self._arrivals))], self._lose, self._parts[0][0])
        while self._events:
            self._now, _, happen, what = heapq.heappop(self._events)
            happen(*what)
        servers = self._fleet.parts * self._fleet.replicas
        return SimulatedRun(self._latencies, self._of_parts, self._hedges, self._searched / max(self._now * servers, 1e-12))

    def _at(self, when: float, happen: Callable[..., None], *what: Any) -> None:
        # Numbered, so that events of one time happen in the order in which they were planned.
        heapq.heappush(self._events, (when, next(self._numbers), happen, what))

    def _come(self, query: int) -> None:
        for part in range(self._fleet.parts):
            self._budgets[part] = min(self._budgets[part] + _BUDGET, _BURST)
            ask = _Ask(query, part)
            self._send(ask)
            if self._fleet.hedge and self._fleet.replicas > 1:
                self._at(self._now + self._late(part), self._hedge, ask)

    def _next(self, ask: _Ask) -> _Replica | None:
        asked = [id(request.replica) for request in ask.requests]
        usable = [replica for replica in self._parts[ask.part] if replica.alive and id(replica) not in asked]
        return min(usable, key=lambda replica: (replica.in_flight, self._draw.random()), default=None)

    def _send(self, ask: _Ask) -> bool:
        replica = self._next(ask)
        if replica is None:
            return False
        request = _ReplicaRequest(ask, replica, self._now)
        ask.requests.append(request)
        replica.in_flight += 1
        replica.waiting.append(request)
        self._begin(replica)
        return True

    def _hedge(self, ask: _Ask) -> None:
        if not ask.answered and self._budgets[ask.part] >= 1 and self._send(ask):
            self._budgets[ask.part] -= 1
            self._hedges += 1

    def _late(self, part: int) -> float:
        usual = [replica.usual for replica in self._parts[part] if replica.alive and replica.usual is not None]
        return max(min(usual), _LEAST_S) if usual else _BEFORE_S

    def _begin(self, replica: _Replica) -> None:
        """Search what waits at a replica that is free."""
        if replica.searching or not replica.waiting:
            return
        replica.searching = True
        replica.batch = [replica.waiting.popleft() for _ in range(min(len(replica.waiting), self._fleet.max_batch))]
        seconds = self._fleet.service(len(replica.batch), self._draw)
        self._searched += seconds
        self._advance()
        heapq.heappush(self._searches, (self._work + seconds, next(self._numbers), replica))
        # With cores of their own, others end when they would have: only one that ends before them changes the plan.
        if self._fleet.cores is not None or self._searches[0][-1] is replica:
            self._plan()

    def _speed(self) -> float:
        """Return the share of a core that each search under way has."""
        cores = self._fleet.cores
        return 1.0 if cores is None else min(1.0, cores / max(len(self._searches), 1))

    def _advance(self) -> None:
        self._work += (self._now - self._worked) * self._speed()
        self._worked = self._now

    def _plan(self) -> None:
        """Plan when the next search ends; how soon depends on those beside it, so a change makes the plan of before void."""
        self._plans += 1
        if self._searches:
            left = max(0.0, self._searches[0][0] - self._work)
            self._at(self._now + left / self._speed(), self._done, self._plans)

    def _done(self, plan: int) -> None:
        if plan != self._plans:
            return
        self._advance()
        _, _, replica = heapq.heappop(self._searches)
        batch, replica.batch, replica.searching = replica.batch, [], False
        for request in batch:
            self._answer(request)
        self._begin(replica)
        self._plan()

    def _answer(self, request: _ReplicaRequest) -> None:
        ask, replica, seconds = request.ask, request.replica, self._now - request.sent + self._fleet.request_s
        if ask.answered or not replica.alive:
            return
        ask.answered = True
        for each in ask.requests:
            _ended(each)
        _remember(replica, seconds)
        took = self._now - self._arrivals[ask.query] + self._fleet.request_s
        self._of_parts[ask.part].append(took)
        self._left[ask.query] -= 1
        if not self._left[ask.query]:
            self._latencies[ask.query] = took

    def _lose(self, replica: _Replica) -> None:
        replica.alive = False
        lost = [*replica.batch, *replica.waiting]
        replica.waiting.clear()
        for request in lost:
            _ended(request)
            others = [each for each in request.ask.requests if each is not request and each.replica.alive]
            # Another replica is asked, unless one was asked already.
            if not request.ask.answered and not others:
                self._send(request.ask)


def _ended(request: _ReplicaRequest) -> None:
    """Take a request out of those in flight, as the client does when another answered first."""
    if request.counted:
        request.counted = False
        request.replica.in_flight -= 1


def _remember(replica: _Replica, seconds: float) -> None:
    replica.newest.append(seconds)
    replica.answers += 1
    if replica.answers >= _FROM and (replica.usual is None or replica.answers % _REMEASURED == 0):
        replica.usual = sorted(replica.newest)[int(_SHARE * len(replica.newest))]
