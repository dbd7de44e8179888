"""Aggregate results into metrics with 95 % intervals. Knows results; writes nothing.

`reward` is the reward that training pays, judge and all; `seconds` are wall time, with as many questions in flight as there were. Every
mean runs over all questions, lost episodes included, but for these: `recall` runs over the questions whose supporting passages are
known, `judge_failed` over those about which the judge was asked, `answer_in_results` over those with a gold answer other than yes or no,
`first_answer_search` and `searches_after_answer` over those whose answer a search showed, `redundant_queries` over those with a query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from research_rl.episode.trajectory import StopReason
from research_rl.evaluation.intervals import interval
from research_rl.evaluation.results import Result

__all__ = ["BETTER_HIGH", "BOUNDED", "HEADLINE", "METRICS", "SCORES", "Metric", "headline", "means", "overall", "summarise"]

Metric = Callable[[Result], float | None]

METRICS: dict[str, Metric] = {
    "em": lambda r: r.em,
    "f1": lambda r: r.f1,
    "acc": lambda r: r.acc,
    "token_precision": lambda r: r.token_precision,
    "token_recall": lambda r: r.token_recall,
    "format": lambda r: float(r.format),
    "reward": lambda r: r.reward,
    "reward_repository": lambda r: r.reward_repository,
    "reward_paper": lambda r: r.reward_paper,
    "searches": lambda r: float(r.searches),
    "recall": lambda r: r.recall,
    "answer_in_results": lambda r: None if r.answer_search is None else float(r.answer_search > 0),
    "first_answer_search": lambda r: float(r.answer_search) if r.answer_search else None,
    "searches_after_answer": lambda r: float(r.searches - r.answer_search) if r.answer_search else None,
    "redundant_queries": lambda r: r.redundant_queries,
    "right_without_search": lambda r: float(r.em == 1 and r.searches == 0),
    "tokens": lambda r: float(r.tokens),
    "response_tokens": lambda r: float(r.response_tokens),
    "seconds": lambda r: r.seconds,
    "failed_searches": lambda r: float(r.failed_searches),
    "suspect": lambda r: float(r.suspicion is not None),
    "judge_failed": lambda r: None if r.judge is None else float(r.judge != "asked"),
}
"""Metric by name, each a number per question (None: not defined for it)."""

SCORES = frozenset(
    {
        "em",
        "f1",
        "acc",
        "token_precision",
        "token_recall",
        "format",
        "reward_repository",
        "reward_paper",
        "recall",
        "answer_in_results",
    }
)
"""Metrics between 0 and 1 of which more is better."""

BOUNDED = SCORES | {"redundant_queries", "right_without_search", "suspect", "judge_failed"}
"""All metrics between 0 and 1."""

BETTER_HIGH = SCORES | {"reward"}
"""Metrics of which more is better; the reward as trained may have any range."""

HEADLINE = ("reward", "em", "f1", "format", "searches", "recall")


def summarise(results: Sequence[Result], resamples: int, seed: int) -> dict[str, Any]:
    """Return every metric as {mean, low, high, n}: overall, by data source and by number of supporting passages."""
    return {
        **overall(results, resamples, seed),
        "by_data_source": _grouped(results, lambda r: r.data_source, resamples, seed),
        # As text, since JSON has no other keys.
        "by_hops": _grouped(results, lambda r: str(r.hops), resamples, seed),
    }


def headline(metrics: dict[str, Any]) -> dict[str, float]:
    """Return the means that stand for an evaluation."""
    return {"n": metrics["n"], **{name: metrics[name]["mean"] for name in HEADLINE if name in metrics}}


def overall(results: Sequence[Result], resamples: int, seed: int) -> dict[str, Any]:
    """Return every metric that at least one result defines as {mean, low, high, n}, the number of results and the stop reasons."""
    metrics = means(results, METRICS, resamples, seed)
    metrics["stop"] = {reason.value: _share(results, reason, resamples, seed) for reason in StopReason}
    return metrics


def means(results: Sequence[Result], names: Iterable[str], resamples: int, seed: int) -> dict[str, Any]:
    """Return the metrics of these names that at least one result defines, as {mean, low, high, n}, and the number of results."""
    metrics: dict[str, Any] = {"n": len(results)}
    for name in names:
        values = _defined(METRICS[name](result) for result in results)
        # Left out where it is defined for no question: 0 would be read as a result.
        if values:
            metrics[name] = interval(values, resamples, seed, bounded=name in BOUNDED).to_json()
    return metrics


def _share(results: Sequence[Result], reason: StopReason, resamples: int, seed: int) -> dict[str, float | int]:
    return interval([float(result.stop == reason) for result in results], resamples, seed, bounded=True).to_json()


def _grouped(results: Sequence[Result], key: Callable[[Result], str], resamples: int, seed: int) -> dict[str, Any]:
    groups = sorted({key(result) for result in results})
    return {group: overall([result for result in results if key(result) == group], resamples, seed) for group in groups}


def _defined(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]
