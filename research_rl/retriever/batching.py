"""Join waiting searches into one. Knows a blocking search function, a queue and one worker thread; knows no HTTP.

Invariants: (1) the event loop never waits for a search; (2) at most `max_queue` queries wait, the next is refused;
(3) a search that fails or whose caller left costs no other caller anything; (4) what waited past its deadline is not searched.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from research_rl.episode.trajectory import Passage

__all__ = ["Busy", "Late", "MicroBatcher", "Search"]

Found = list[list[Passage]]
Search = Callable[[Sequence[str], int], Found]
Watch = Callable[[int, float], None]
"""Told after each batch: distinct queries and seconds."""


class Busy(Exception):
    """The queue is full; try again later."""


class Late(Exception):
    """The deadline passed while the search waited."""


@dataclass
class _Job:
    queries: Sequence[str]
    top_k: int
    deadline: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[tuple[Found, int]]
    alone: Search | None


class MicroBatcher:
    """Runs `search` in one thread; whatever waits when it becomes free is searched together, up to `max_batch` queries."""

    def __init__(self, search: Search, max_batch: int, max_queue: int, watch: Watch = lambda size, seconds: None) -> None:
        self._search, self._max_batch, self._max_queue, self._watch = search, max_batch, max_queue, watch
        self._jobs: deque[_Job] = deque()
        self._waiting = 0
        self._working = self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._drain, name="search", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        """Whether no search runs or waits."""
        # Without the lock: it tells /health how busy the service is, and may be out of date by then in any case.
        return not (self._working or self._jobs)

    @property
    def waiting(self) -> int:
        """Queries in the queue."""
        return self._waiting

    async def search(
        self, queries: Sequence[str], top_k: int, deadline: float = float("inf"), *, admitted: bool = False, alone: Search | None = None
    ) -> tuple[Found, int]:
        """Return what `search` returns for these queries, and how many queries its batch held.

        `deadline` is a time of `time.monotonic()`. A later piece of a request whose first piece was accepted is `admitted`: it may
        wait in a full queue. With `alone` this function searches them instead,
        joined with no others. Raises Busy, Late, or whatever `search` raised.
        """
        loop = asyncio.get_running_loop()
        job = _Job(queries, top_k, deadline, loop, loop.create_future(), alone)
        with self._changed:
            if self._closed or (not admitted and self._waiting + len(queries) > self._max_queue):
                raise Busy(f"{self._waiting} queries wait")
            self._jobs.append(job)
            self._waiting += len(queries)
            self._changed.notify()
        return await job.future

    def close(self) -> None:
        """Finish what waits, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _drain(self) -> None:
        while jobs := self._take():
            now = time.monotonic()
            timely = [job for job in jobs if not job.future.cancelled() and job.deadline > now]
            for job in jobs:
                if job.deadline <= now:
                    _settle(job, Late(f"{now - job.deadline:.3f} s past its deadline"))
            if timely:
                self._run(timely)
            with self._changed:
                self._working = False

    def _take(self) -> list[_Job]:
        """Wait for work and take as much as fits one batch; empty once closed and drained."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._jobs) or self._closed)
            taken: list[_Job] = []
            size = 0
            # The first job is taken whatever its size; one above `max_batch` would wait for ever.
            while self._jobs and (not taken or self._joins(taken[0], self._jobs[0], size)):
                taken.append(self._jobs.popleft())
                size += len(taken[-1].queries)
            self._waiting -= size
            self._working = bool(taken)
            return taken

    def _joins(self, first: _Job, job: _Job, size: int) -> bool:
        return first.alone is None and job.alone is None and size + len(job.queries) <= self._max_batch

    def _run(self, jobs: list[_Job]) -> None:
        queries = list(dict.fromkeys(query for job in jobs for query in job.queries))
        started = time.perf_counter()
        try:
            # As many as the most demanding caller asked for; the others take the beginning of the same list.
            search = jobs[0].alone or self._search
            results = dict(zip(queries, search(queries, max(job.top_k for job in jobs)), strict=True))
        except Exception as error:  # noqa: BLE001  (the boundary: a failed batch is told to its callers, the worker lives on)
            for job in jobs:
                _settle(job, error)
            return
        for job in jobs:
            _settle(job, ([results[query][: job.top_k] for query in job.queries], len(queries)))
        self._watch(len(queries), time.perf_counter() - started)


def _settle(job: _Job, outcome: tuple[Found, int] | Exception) -> None:
    def deliver() -> None:
        # The caller was cancelled while the search ran.
        if job.future.done():
            return
        if isinstance(outcome, Exception):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)

    try:
        job.loop.call_soon_threadsafe(deliver)
    except RuntimeError:  # the loop closed while the search ran: nobody waits any more
        return
