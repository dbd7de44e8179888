"""Keep several processes serving on one socket, and exchange what they serve. Knows processes and time; knows no HTTP, no index.

A *generation* is one process that opened something (the keeper, see `forks`) and its forks, which serve it (the workers).

Invariants: (1) a worker that ended is replaced by a fresh fork of its keeper, ever more slowly where they keep ending; (2) a generation
takes over when all of its workers are ready, and only then the one before makes room; (3) a generation that fails leaves the one in
service alone, and the first that fails ends the service; (4) a keeper that ended costs no request: its workers go on until the next
generation is ready; (5) the first signal drains all, the second ends all, and nothing outlives this process.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from types import FrameType
from typing import Any, Protocol

from research_rl.errors import ResearchError, ServiceError
from research_rl.process.board import Board
from research_rl.process.channel import Channel
from research_rl.process.forks import forked, keep, raised

__all__ = ["Crew", "Supervisor"]

_TICK_S = 0.1
_STEADY_S = 10.0
"""A worker that was ready for so long did not end because of what it serves."""
_MOST_EARLY = 5
"""Workers in a row that end early, after which a generation without any other fails."""
_LONGEST_PAUSE_S = 30.0
_LOG = logging.getLogger(__name__)


class Crew(Protocol):
    """What is served, by how many, and who is told of it. `herald`, `open` and `work` run in processes of their own."""

    workers: int
    grace_s: float
    """Seconds from the first signal until what still runs is killed."""

    def herald(self, channel: Channel, place: int) -> None:
        """Answer until the first generation is ready."""
        ...

    def open(self) -> Any:
        """Return what the workers of a generation share. Raises ResearchError."""
        ...

    def name(self, opened: Any) -> str:
        """Return by what an opened thing is known."""
        ...

    def work(self, opened: Any, channel: Channel, place: int) -> None:
        """Serve until told otherwise; see `SharingServer` for the orders. Sends its `pid` first, `ready` when it serves."""
        ...

    def has_newer(self) -> bool:
        """Whether there is something else to open than what is in service; asked often."""
        ...

    def took(self, name: str) -> None:
        """Hear what is in service now."""
        ...

    def refused(self, error: ResearchError) -> None:
        """Hear why what was wanted is not in service."""
        ...

    def ended(self, pid: int) -> None:
        """Hear that a worker ended."""
        ...


@dataclass(eq=False)
class _Worker:
    channel: Channel
    place: int
    pid: int = 0
    ready: float = 0.0
    """Since when, by `time.monotonic()`; 0 before."""


@dataclass(eq=False)
class _WorkerGeneration:
    keeper: Channel | None = None
    pid: int = 0
    """Of the keeper; 0 once it ended."""
    name: str = ""
    """Empty until it is open."""
    workers: list[_Worker] = field(default_factory=list[_Worker])
    early: int = 0
    due: float = 0.0
    """When the next worker may be forked."""
    retired: bool = False

    @property
    def ready(self) -> int:
        return sum(worker.ready > 0 for worker in self.workers)


class Supervisor:
    """Runs a crew in this process, which must have one thread."""

    def __init__(self, crew: Crew, board: Board) -> None:
        self._crew, self._board = crew, board
        self._current = _WorkerGeneration()
        """The herald at first."""
        self._generations = [self._current]
        self._signals: list[int] = []
        self._drains = 0
        self._failure: ResearchError | None = None
        self._kill_at = self._reopen_at = float("inf")

    def run(self) -> int:
        """Serve until a signal, and return its number. Raises what kept the first generation from opening, or a worker from serving."""
        # What is imported by now is shared with every fork until one writes into it, as a collection of garbage does.
        gc.collect()
        gc.freeze()
        with self._hearing():
            self._start_herald()
            self._start_generation()
            while self._generations:
                self._turn()
        if self._failure:
            raise self._failure
        return self._signals[0]

    @contextmanager
    def _hearing(self) -> Generator[None]:
        def hear(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)

        before = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _turn(self) -> None:
        """Hear at most one message, which may change whom there is to hear, and do what is due."""
        for end in wait(self._ends(), _TICK_S)[:1]:
            self._heard(end)
        while self._drains < min(len(self._signals), 2):
            self._drain(None)
        self._reap()
        if self._drains:
            self._kill_late()
            return
        for generation in list(self._generations):
            self._fill(generation)
        self._follow()

    def _ends(self) -> list[Any]:
        keepers = [generation.keeper for generation in self._generations if generation.keeper]
        return [*keepers, *(worker.channel for generation in self._generations for worker in generation.workers)]

    def _heard(self, end: Any) -> None:
        for generation in list(self._generations):
            if end is generation.keeper:
                self._from_keeper(generation, end.receive())
            for worker in [worker for worker in generation.workers if worker.channel is end]:
                self._from_worker(generation, worker, end.receive())

    def _start_herald(self) -> None:
        place = 0
        mine, theirs = Channel.pair()

        def run() -> None:
            mine.close()
            self._crew.herald(theirs, place)

        forked(run)
        theirs.close()
        self._current.workers.append(_Worker(mine, place))

    def _start_generation(self) -> None:
        """Have a new keeper open what there is."""
        mine, theirs = Channel.pair()

        def run() -> None:
            # A worker sees the end of this process by the end of its channel, of which no other process may hold a copy.
            for end in (mine, *self._ends()):
                end.close()
            keep(theirs, self._crew.open, self._crew.name, self._crew.work)

        pid = forked(run)
        theirs.close()
        self._reopen_at = float("inf")
        self._generations.append(_WorkerGeneration(mine, pid))

    def _fill(self, generation: _WorkerGeneration) -> None:
        """Have as many workers forked as are missing."""
        if generation.retired or not (generation.name and generation.keeper) or time.monotonic() < generation.due:
            return
        held = {worker.place for some in self._generations for worker in some.workers}
        free = [place for place in range(self._board.places) if place not in held]
        for place in free[: self._crew.workers - len(generation.workers)]:
            mine, theirs = Channel.pair()
            generation.keeper.send([theirs.fileno()], place=place)
            theirs.close()
            generation.workers.append(_Worker(mine, place))

    def _follow(self) -> None:
        """Open what is to be opened, one after the other."""
        if self._generations[-1] is self._current and (time.monotonic() >= self._reopen_at or self._crew.has_newer()):
            self._start_generation()

    def _from_keeper(self, generation: _WorkerGeneration, heard: tuple[dict[str, Any], list[int]] | None) -> None:
        if heard and "opened" in heard[0]:
            generation.name = heard[0]["opened"]
        elif heard:
            self._fail(generation, raised(heard[0]))
        elif generation is self._current:
            _LOG.error("process %d, which the workers are forked from, ended; what it held is opened again", generation.pid)
            self._close_keeper(generation)
            self._reopen_at = time.monotonic()
        else:
            self._fail(generation, ServiceError("the process that opened the index ended; see the system's log, memory may be short"))

    def _from_worker(self, generation: _WorkerGeneration, worker: _Worker, heard: tuple[dict[str, Any], list[int]] | None) -> None:
        if heard is None:
            self._gone(generation, worker)
        elif "pid" in heard[0]:
            worker.pid = heard[0]["pid"]
        elif "ready" in heard[0]:
            worker.ready = time.monotonic()
            if generation.ready == self._crew.workers and not (generation.retired or self._drains):
                self._take_over(generation)
        elif worker.ready:
            self._drain(raised(heard[0]))
        elif generation is not self._current:
            self._fail(generation, raised(heard[0]))
        else:
            _LOG.error("worker %d cannot serve: %s", worker.pid, heard[0]["failed"])

    def _take_over(self, generation: _WorkerGeneration) -> None:
        before, self._current = self._current, generation
        if before is not generation:
            self._crew.took(generation.name)
            self._retire(before)

    def _retire(self, generation: _WorkerGeneration) -> None:
        generation.retired = True
        self._close_keeper(generation)
        for worker in generation.workers:
            worker.channel.send(retire=True)
        self._forget(generation)

    def _fail(self, generation: _WorkerGeneration, error: ResearchError) -> None:
        """Give up a generation that is not in service."""
        self._retire(generation)
        if not (self._current.name and self._current.ready):
            self._drain(error)
            return
        self._crew.refused(error)
        if self._current.keeper is None:
            self._reopen_at = time.monotonic() + _LONGEST_PAUSE_S

    def _gone(self, generation: _WorkerGeneration, worker: _Worker) -> None:
        worker.channel.close()
        generation.workers.remove(worker)
        self._board.leave(worker.place)
        if worker.pid:
            self._crew.ended(worker.pid)
        self._forget(generation)
        if generation.retired or self._drains:
            return
        now = time.monotonic()
        generation.early = 0 if worker.ready and now - worker.ready > _STEADY_S else generation.early + 1
        generation.due = now + min(2.0 ** (generation.early - 2), _LONGEST_PAUSE_S) * (generation.early > 1)
        _LOG.error("worker %d ended and is replaced", worker.pid)
        if generation.early >= _MOST_EARLY and not generation.ready:
            error = ServiceError(f"{generation.early} workers in a row ended soon after they began; see the service's log")
            self._drain(error) if generation is self._current else self._fail(generation, error)

    def _drain(self, error: ResearchError | None) -> None:
        """Have all workers answer what they accepted and end; where something failed, end at once."""
        self._failure = self._failure or error
        self._drains += 1 if error is None else 2
        self._kill_at = min(self._kill_at, time.monotonic() + self._crew.grace_s)
        for generation in list(self._generations):
            self._close_keeper(generation)
            for worker in generation.workers:
                for _ in range(1 if error is None else 2):
                    worker.channel.send(drain=True)
            self._forget(generation)

    def _close_keeper(self, generation: _WorkerGeneration) -> None:
        if generation.keeper:
            generation.keeper.close()
            generation.keeper = None
            # It may be in the middle of opening, and there is nothing that it would have to finish.
            if generation.pid:
                os.kill(generation.pid, signal.SIGKILL)

    def _forget(self, generation: _WorkerGeneration) -> None:
        over = generation.retired or self._drains
        if over and not generation.workers and generation in self._generations:
            self._generations.remove(generation)

    def _kill_late(self) -> None:
        if time.monotonic() > self._kill_at:
            for worker in [worker for generation in self._generations for worker in generation.workers if worker.pid]:
                with suppress(ProcessLookupError):
                    os.kill(worker.pid, signal.SIGKILL)

    def _reap(self) -> None:
        with suppress(ChildProcessError):
            while ended := os.waitpid(-1, os.WNOHANG)[0]:
                for generation in self._generations:
                    # From now on the number may be another process's.
                    generation.pid *= generation.pid != ended
