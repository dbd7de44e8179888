"""What the service says about itself: Prometheus metrics and one JSON line a request. Knows numbers; keeps no query text
unless told to.

Invariants: (1) labels come from fixed sets, so that no client can grow them; (2) a reader of the lines that stands still
or went away delays no request: at most `_MOST_LINES` wait for it, more are dropped and counted.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from research_rl.retriever.whole import Whole

__all__ = ["REASONS", "ROUTES", "RequestLog", "RetrieverMetrics", "Seen"]

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROUTES = ("/search", "/batch_search", "/retrieve", "/health", "/readyz", "/metrics", "/info")
REASONS = (
    *("full", "deadline", "draining", "starting", "error", "size", "connections", "headers", "unread"),
    *("header", "host", "origin", "type", "network", "token"),
)
"""Why a request is refused. All are counted from 0: Prometheus sees no increase in a series that begins at 1."""
_SUM: dict[str, Any] = {"multiprocess_mode": "livesum"}
_MOST: dict[str, Any] = {"multiprocess_mode": "livemax"}
_LONGEST_LOGGED = 32
"""Queries of one request that are logged, where they are logged at all."""
_MOST_LINES = 10_000
_FLUSH_S = 0.1


@dataclass
class Seen:
    """One request as it went: filled by the handlers, written when it is over. `late`: it came when the service drained."""

    route: str
    late: bool = False
    queries: int = 0
    top_k: int = 0
    batch: int = 0
    cached: int = 0
    texts: Sequence[str] = ()


class RetrieverMetrics:
    """The counters of one service; `waiting` says how many queries queue, `active` how many requests are answered now.

    Of several processes that are one service each has its own, and `whole` tells of all of them.
    """

    def __init__(
        self, waiting: Callable[[], float], active: Callable[[], float], ready: Callable[[], float], whole: Whole | None = None
    ) -> None:
        self.registry = CollectorRegistry()
        self._whole = whole
        self._watched: list[tuple[Gauge, Callable[[], float]]] = []
        options: dict[str, Any] = {"registry": self.registry, "namespace": "retriever"}
        self._requests = Counter("requests", "Requests answered.", ["route", "status"], **options)
        self._seconds = Histogram("request_seconds", "Seconds from request to answer.", ["route"], buckets=_SECONDS, **options)
        self._queries = Counter("queries", "Queries answered, those from the cache included.", **options)
        self._hits = Counter("cache_hits", "Queries answered from the cache.", **options)
        self._refusals = Counter("refusals", "Requests refused, by reason.", ["reason"], **options)
        self._shortened = Counter("shortened_queries", "Queries cut to retriever.max_query_chars.", **options)
        self._late = Counter("deadline_misses", "Requests whose deadline passed before they were searched.", **options)
        self._batches = Histogram("batch_queries", "Distinct queries searched together.", buckets=_SIZES, **options)
        self._searches = Histogram("search_seconds", "Seconds of one joint search.", buckets=_SECONDS, **options)
        self._read = Counter("reranked_passages", "Candidates that the reranker read.", **options)
        self._unread = Counter("unranked_passages", "Candidates that kept their order: reranker.budget_ms was spent.", **options)
        self._reranking = Histogram("rerank_seconds", "Seconds of the reranker in one joint search.", buckets=_SECONDS, **options)
        # What a gauge's mode says is how those of several processes become one.
        self._watch(Gauge("queue_queries", "Queries that wait.", **_SUM, **options), waiting)
        self._watch(Gauge("active_requests", "Requests being answered.", **_SUM, **options), active)
        self._watch(Gauge("ready", "1 once the canary was found and until the service drains.", **_MOST, **options), ready)
        text = "1 while the workspace holds another index than the one that is served."
        self._stale = Gauge("index_stale", text, multiprocess_mode="livemostrecent", **options)
        self._is_stale: Callable[[], bool] = lambda: False
        # One series: that of the index before goes with it.
        text = "1, with the beginning of the hash of the index that was opened last."
        self._index = Gauge("index_info", text, ["index"], **_MOST, **options)
        self._switches = Gauge("index_switches", "Indexes taken into service after the first.", **_MOST, **options)
        self._failed_switches = Gauge("index_failed_switches", "Times that a newer index could not be opened.", **_MOST, **options)
        for reason in REASONS:
            self._refusals.labels(reason)
        self._by_route = {route: self._seconds.labels(route) for route in (*ROUTES, "other")}

    def request(self, seen: Seen, status: int, seconds: float) -> None:
        """Count a finished request."""
        self._requests.labels(seen.route, str(status)).inc()
        self._by_route[seen.route].observe(seconds)
        if status == 200:
            self._queries.inc(seen.queries)
            self._hits.inc(seen.cached)

    def batch(self, size: int, seconds: float) -> None:
        """Count a joint search."""
        self._batches.observe(size)
        self._searches.observe(seconds)

    def reranked(self, read: int, unread: int, seconds: float) -> None:
        """Count what the reranker did in a joint search."""
        self._read.inc(read)
        self._unread.inc(unread)
        self._reranking.observe(seconds)

    def shortened(self) -> None:
        """Count a query that was cut to its limit."""
        self._shortened.inc()

    def refused(self, reason: str) -> None:
        """Count a refusal; `reason` is one of a few words of this program."""
        self._refusals.labels(reason).inc()
        if reason == "deadline":
            self._late.inc()

    def watch_index(self, stale: Callable[[], bool]) -> None:
        """Have `stale` asked, at each reading, whether another index stands than the one that is served."""
        self._is_stale = stale

    def watch_switches(self, switches: Callable[[], float], failures: Callable[[], float]) -> None:
        """Have both asked, at each reading, how often the index was exchanged, and how often that failed."""
        self._watch(self._switches, switches)
        self._watch(self._failed_switches, failures)

    def serves(self, index: str) -> None:
        """Say which index was opened last."""
        # A process that is one of several opens one index alone, and in this mode no series can be removed.
        if not self._whole:
            self._index.clear()
        self._index.labels(index[:12]).set(1)

    def refresh(self) -> None:
        """Bring the gauges to now, for the reading of another process."""
        for gauge, value in self._watched:
            gauge.set(value())

    def text(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        self.refresh()
        self._stale.set(self._is_stale())
        return self._whole.text() if self._whole else generate_latest(self.registry)

    def _watch(self, gauge: Gauge, value: Callable[[], float]) -> None:
        self._watched.append((gauge, value))


class RequestLog:
    """Writes JSON lines to a stream from a thread of its own; those of several processes are kept apart by `alone`."""

    def __init__(self, stream: TextIO, alone: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self._stream, self._alone = stream, alone
        self._lines: deque[str] = deque(maxlen=_MOST_LINES)
        self._dropped = 0
        self._closed = False
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._write, name="request-log", daemon=True)
        self._thread.start()

    def request(self, seen: Seen, status: int, seconds: float) -> None:
        """Write one finished request."""
        line: dict[str, Any] = {"time": round(time.time(), 3), "route": seen.route, "status": status, "ms": round(seconds * 1000, 2)}
        line |= {"queries": seen.queries, "k": seen.top_k, "batch": seen.batch, "cached": seen.cached}
        if seen.texts:
            line["texts"] = list(seen.texts[:_LONGEST_LOGGED])
        self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        """Write one line."""
        # A full deque drops its oldest line by itself when one is appended.
        self._dropped += len(self._lines) == _MOST_LINES
        self._lines.append(json.dumps(line))
        self._woken.set()

    def close(self) -> None:
        """Write what waits, for at most a second where the reader does not read."""
        self._closed = True
        self._woken.set()
        self._thread.join(timeout=1.0)

    def _write(self) -> None:
        # Asleep while there is nothing to write: an idle service costs nothing.
        while self._lines or not self._closed:
            self._woken.wait()
            if not self._closed:
                time.sleep(_FLUSH_S)
            self._woken.clear()
            # By single pops, which are atomic: the event loop appends meanwhile.
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            if self._dropped:
                lines.append(json.dumps({"time": round(time.time(), 3), "dropped_lines": self._dropped}))
                self._dropped = 0
            try:
                with self._alone():
                    self._stream.write("".join(line + "\n" for line in lines))
                    self._stream.flush()
            except (OSError, ValueError):  # the reader is gone: nobody wants lines any more
                return
