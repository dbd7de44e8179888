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
from dataclasses import dataclass
from typing import Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["ROUTES", "Metrics", "RequestLog", "Seen"]

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROUTES = ("/search", "/batch_search", "/retrieve", "/health", "/readyz", "/metrics", "/info")
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


class Metrics:
    """The counters of one service process; `waiting` says how many queries queue, `active` how many requests are answered now."""

    def __init__(self, waiting: Callable[[], float], active: Callable[[], float], ready: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
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
        Gauge("queue_queries", "Queries that wait.", **options).set_function(waiting)
        Gauge("active_requests", "Requests being answered.", **options).set_function(active)
        Gauge("ready", "1 once the canary was found and until the service drains.", **options).set_function(ready)
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

    def shortened(self) -> None:
        """Count a query that was cut to its limit."""
        self._shortened.inc()

    def refused(self, reason: str) -> None:
        """Count a refusal; `reason` is one of a few words of this program."""
        self._refusals.labels(reason).inc()
        if reason == "deadline":
            self._late.inc()

    def text(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        return generate_latest(self.registry)


class RequestLog:
    """Writes JSON lines to a stream from a thread of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines: deque[str] = deque(maxlen=_MOST_LINES)
        self._dropped = 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._write, name="request-log", daemon=True)
        self._thread.start()

    def request(self, seen: Seen, status: int, seconds: float) -> None:
        """Write one finished request."""
        line: dict[str, Any] = {"time": round(time.time(), 3), "route": seen.route, "status": status, "ms": round(seconds * 1000, 2)}
        line |= {"queries": seen.queries, "k": seen.top_k, "batch": seen.batch, "cached": seen.cached}
        if seen.texts:
            line["texts"] = list(seen.texts[:_LONGEST_LOGGED])
        # A full deque drops its oldest line by itself when one is appended.
        self._dropped += len(self._lines) == _MOST_LINES
        self._lines.append(json.dumps(line))

    def close(self) -> None:
        """Write what waits, for at most a second where the reader does not read."""
        self._closed.set()
        self._thread.join(timeout=1.0)

    def _write(self) -> None:
        while not self._closed.wait(_FLUSH_S) or self._lines:
            # By single pops, which are atomic: the event loop appends meanwhile.
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            if self._dropped:
                lines.append(json.dumps({"time": round(time.time(), 3), "dropped_lines": self._dropped}))
                self._dropped = 0
            try:
                self._stream.write("".join(line + "\n" for line in lines))
                self._stream.flush()
            except (OSError, ValueError):  # the reader is gone: nobody wants lines any more
                return
