"""`python -m uvicorn --factory tasks.local.exporter:app`: the newest training of a workspace, in Prometheus's format. Reads files alone.

RESEARCH_WORKSPACE names the workspace, RESEARCH_METRICS_TOKEN the bearer token. A scrape reads the newest metrics.jsonl; the trainer is
not asked, so that a training without this service, or this service without a training, lacks nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, make_asgi_app
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from research_rl.errors import ConfigError
from research_rl.process.access import Access, Guard, bearer
from research_rl.process.tokens import token_from
from research_rl.training.run.metrics_log import MetricsLog

__all__ = ["SERIES", "Training", "app"]

SERIES = {
    "reward": ("episode/reward", "Mean reward of the step's episodes."),
    "f1": ("episode/f1", "Mean F1 of the step's episodes."),
    "dev_f1": ("dev/f1", "Mean F1 on the questions held out for development."),
    "format": ("episode/format", "Share of episodes that keep the format."),
    "searches": ("episode/searches", "Mean number of searches of an episode."),
    "failed_searches": ("episode/failed_searches", "Mean number of failed searches of an episode."),
    "lost_episodes": ("episode/lost", "Episodes of the step that were lost."),
    "suspect": ("episode/suspect", "Share of episodes whose answer looks like reward hacking."),
    "entropy_nats": ("actor/entropy_loss", "Entropy of the policy."),
    "tokens_per_second": ("perf/throughput", "Tokens a second and processor, as verl counts them."),
    "step_seconds": ("timing_s/step", "Seconds that the step took."),
    "paused_seconds": ("search/paused_s", "Seconds that the step waited for the retriever."),
}
"""Gauge -> the metric of the step, and what it says. Fixed, so that no option of the trainer makes series without end."""


class Training(Collector):
    """Reads, at each scrape, the last step of the training that wrote last."""

    def __init__(self, workspace: Path) -> None:
        self._workspace = workspace

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield the step, its metrics, and how long ago it was written; nothing in a workspace without a training."""
        folder = self._workspace / "artifacts"
        logs = [*folder.glob(".work/train-*/metrics.jsonl"), *folder.glob("train/metrics.jsonl")]
        if not logs:
            return
        written, path = max((log.stat().st_mtime, log) for log in logs)
        log = MetricsLog(path)
        metrics = log.rows.get(log.last, {})
        yield GaugeMetricFamily("training_step", "The newest finished step.", log.last)
        yield GaugeMetricFamily("training_running", "1 while the training is not published.", float(".work" in path.parts))
        yield GaugeMetricFamily("training_silent_seconds", "Seconds since a step was written.", max(0.0, time.time() - written))
        for name, (metric, text) in SERIES.items():
            if metric in metrics:
                yield GaugeMetricFamily(f"training_{name}", text, metrics[metric])


def app() -> Guard:
    """Return the service for uvicorn. Raises ConfigError without a token."""
    if not (token := token_from("RESEARCH_METRICS_TOKEN")):
        raise ConfigError("RESEARCH_METRICS_TOKEN is not set; set it to a secret that Prometheus sends as bearer token")
    registry = CollectorRegistry()
    registry.register(Training(Path(os.environ.get("RESEARCH_WORKSPACE", "/workspace"))))
    return Guard(make_asgi_app(registry), Access(outside=True, authorization=bearer(token)))
