"""Aggregate results into metrics with 95 % intervals. Knows results; writes nothing.

`reward` is the reward that training pays, judge and all. Every mean runs over all questions, lost episodes included, but for two:
`recall` runs over the questions whose supporting passages are known, `judge_failed` over those about which the judge was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from research_rl.episode.trajectory import StopReason
from research_rl.evaluation.intervals import interval
from research_rl.evaluation.results import Result

__all__ = ["BETTER_HIGH", "HEADLINE", "METRICS", "SCORES", "headline", "summarise"]

Metric = Callable[[Result], float | None]

METRICS: dict[str, Metric] = {
    "em": lambda r: r.em,
    "f1": lambda r: r.f1,
    "format": lambda r: float(r.format),
    "reward": lambda r: r.reward,
    "reward_repository": lambda r: r.reward_repository,
    "reward_paper": lambda r: r.reward_paper,
    "searches": lambda r: float(r.searches),
    "recall": lambda r: r.recall,
    "tokens": lambda r: float(r.tokens),
    "response_tokens": lambda r: float(r.response_tokens),
    "failed_searches": lambda r: float(r.failed_searches),
    "suspect": lambda r: float(r.suspicion is not None),
    "judge_failed": lambda r: None if r.judge is None else float(r.judge != "asked"),
}
"""Metric by name, each a number per question (None: not defined for it)."""

SCORES = frozenset({"em", "f1", "format", "reward_repository", "reward_paper", "recall"})
"""Metrics between 0 and 1 of which more is better."""

BETTER_HIGH = SCORES | {"reward"}
"""Metrics of which more is better; the reward as trained may have any range."""

HEADLINE = ("reward", "em", "f1", "format", "searches", "recall")


def summarise(results: Sequence[Result], resamples: int, seed: int) -> dict[str, Any]:
    """Return every metric as {mean, low, high, n}: overall, by data source and by number of supporting passages."""
    return {
        **_metrics(results, resamples, seed),
        "by_data_source": _grouped(results, lambda r: r.data_source, resamples, seed),
        # As text, since JSON has no other keys.
        "by_hops": _grouped(results, lambda r: str(r.hops), resamples, seed),
    }


def headline(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the means that stand for an evaluation."""
    return {"n": metrics["n"], **{name: metrics[name]["mean"] for name in HEADLINE if name in metrics}}


def _metrics(results: Sequence[Result], resamples: int, seed: int) -> dict[str, Any]:
    metrics: dict[str, Any] = {"n": len(results)}
    for name, metric in METRICS.items():
        values = _defined(metric(result) for result in results)
        # Left out where it is defined for no question: 0 would be read as a result.
        if values:
            metrics[name] = interval(values, resamples, seed, bounded=name in SCORES).to_json()
    metrics["stop"] = {reason.value: _share(results, reason, resamples, seed) for reason in StopReason}
    return metrics


def _share(results: Sequence[Result], reason: StopReason, resamples: int, seed: int) -> dict[str, float | int]:
    return interval([float(result.stop == reason) for result in results], resamples, seed, bounded=True).to_json()


def _grouped(results: Sequence[Result], key: Callable[[Result], str], resamples: int, seed: int) -> dict[str, Any]:
    groups = sorted({key(result) for result in results})
    return {group: _metrics([result for result in results if key(result) == group], resamples, seed) for group in groups}


def _defined(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
