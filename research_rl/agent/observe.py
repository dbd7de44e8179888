"""What the agent service counts, in Prometheus's format. Knows numbers; keeps no text.

Invariant: labels come from fixed sets, so that no client can grow them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from research_rl.agent.answering import Finished
from research_rl.agent.standing import Standing

__all__ = ["REASONS", "ROUTES", "AgentMetrics"]

ROUTES = ("/v1/responses", "/v1/chat/completions", "/v1/models", "/v1/feedback", "/health", "/readyz", "/info", "/metrics", "/")
REASONS = (
    *("draining", "model_not_found", "full", "size", "format", "question", "error", "connections", "headers", "unread"),
    *("response_not_found", "feedback", "disk"),
    *("header", "host", "origin", "network", "type", "token"),
)
"""Why a question is refused; all are counted from 0, as Prometheus sees no increase in a series that begins at 1."""
_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_COUNTS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 32)
_COUNTED = {
    "challenged": "Questions offered to the challenger, by what became of them.",
    "verdicts": "Verdicts of people on answers.",
}
_RECENT = 0.2
"""Weight of the newest episode in the mean of their lengths."""


class AgentMetrics(Collector):
    """The counters of one service process; `active` says how many questions are answered now, `ready` whether new ones are."""

    def __init__(
        self,
        active: Callable[[], float],
        ready: Callable[[], float],
        standing: Callable[[], Standing],
        counts: Callable[[], Mapping[str, Mapping[str, int]]],
    ) -> None:
        # Not the client library's global registry, where two services of one process would count into each other.
        self.registry = CollectorRegistry()
        self._standing, self._counts = standing, counts
        self.registry.register(self)
        options: dict[str, Any] = {"registry": self.registry, "namespace": "agent"}
        self._requests = Counter("requests", "Requests answered.", ["route", "status"], **options)
        self._refusals = Counter("refusals", "Requests refused, by reason.", ["reason"], **options)
        self._episodes = Counter("episodes", "Episodes, by why they ended; `gone`: the client left.", ["stop"], **options)
        self._seconds = Histogram("episode_seconds", "Seconds from question to answer.", buckets=_SECONDS, **options)
        self._first = Histogram("first_text_seconds", "Seconds from question to the first text.", buckets=_SECONDS, **options)
        self._per_episode = Histogram("episode_searches", "Searches of an episode.", buckets=_COUNTS, **options)
        self._searches = Counter("searches", "Searches, by what went wrong; `none`: nothing.", ["fault"], **options)
        self._tokens = Counter("tokens", "Tokens that the policy read and wrote.", ["direction"], **options)
        self._supported = Counter("answers", "Answers, by whether a passage that was read holds them.", ["supported"], **options)
        Gauge("active_episodes", "Questions being answered.", **options).set_function(active)
        Gauge("ready", "1 while new questions are answered.", **options).set_function(ready)
        for reason in REASONS:
            self._refusals.labels(reason)
        self._mean_s = 0.0

    def collect(self) -> Iterator[Metric]:
        """Yield what stands now and is counted elsewhere: the model in service, and what its successor and its challenger do."""
        now = self._standing()
        # A label a model, of which one stands at a time: those that were served before are told no more.
        yield InfoMetricFamily("agent_model", "The model in service.", {"model": now.model, "version": now.version})
        yield GaugeMetricFamily("agent_model_since_seconds", "Since when it is, seconds since 1970.", now.since)
        failed = now.failed.when if now.failed else 0.0
        yield GaugeMetricFamily("agent_failed_switch_seconds", "When a switch failed last, seconds since 1970; 0 where none did.", failed)
        yield CounterMetricFamily("agent_switches", "Switches to another model.", now.switches)
        yield CounterMetricFamily("agent_failed_switches", "Switches that failed; the model in service stayed.", now.failed_switches)
        yield CounterMetricFamily("agent_registry_failures", "Questions that the registry did not answer.", now.registry_failures)
        for name, each in self._counts().items():
            counted = CounterMetricFamily(f"agent_{name}", _COUNTED[name], labels=["outcome"])
            for outcome, number in each.items():
                counted.add_metric([outcome], number)
            yield counted

    def request(self, path: str, status: int) -> None:
        """Count an answered request."""
        # All other paths share one label, or a client could make any number of metrics.
        self._requests.labels(path if path in ROUTES else "other", str(status)).inc()

    def refused(self, reason: str) -> None:
        """Count a refusal; `reason` is one of a few words of this program."""
        self._refusals.labels(reason).inc()

    def first_text(self, seconds: float) -> None:
        """Count how long the first text took."""
        self._first.observe(seconds)

    def gone(self) -> None:
        """Count an episode that ended with its client."""
        self._episodes.labels("gone").inc()

    def finished(self, finished: Finished, seconds: float) -> None:
        """Count an episode."""
        trajectory = finished.trajectory
        self._episodes.labels(trajectory.stop.value).inc()
        self._seconds.observe(seconds)
        self._per_episode.observe(len(trajectory.searches))
        for record in trajectory.searches:
            self._searches.labels(record.fault.value if record.fault else "none").inc()
        self._tokens.labels("read").inc(finished.read_tokens)
        self._tokens.labels("written").inc(finished.written_tokens)
        self._supported.labels({True: "yes", False: "no", None: "unknown"}[finished.supported]).inc()
        # The first episode sets the mean: starting from 0, it would stay too low for the next ten.
        self._mean_s += (seconds - self._mean_s) * (_RECENT if self._mean_s else 1.0)

    def free_in_s(self, places: int) -> int:
        """Return in how many seconds one of `places` is likely to be free, 1 to 60."""
        return min(max(math.ceil(self._mean_s / places), 1), 60)

    def text(self) -> bytes:
        """Return all of it in Prometheus's text format."""
        return generate_latest(self.registry)
