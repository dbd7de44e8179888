"""Compare two evaluations of the same questions, question by question. Knows results and numbers; formats nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from research_rl.evaluation.results import Result
from research_rl.evaluation.statistics import Difference, paired
from research_rl.evaluation.summary import METRICS

__all__ = ["Pair", "PairedMetric", "by_group", "compare_metrics", "match", "outcome"]

Pair = tuple[Result, Result]


@dataclass(frozen=True)
class PairedMetric:
    """One metric over pairs: means before and after, and the difference with its interval."""

    name: str
    before: float
    after: float
    difference: Difference


def match(before: Sequence[Result], after: Sequence[Result]) -> list[Pair]:
    """Return the pairs of results of equal questions, in the order of `before`."""
    found = {_key(result): result for result in after}
    return [(result, found[_key(result)]) for result in before if _key(result) in found]


def compare_metrics(pairs: Sequence[Pair], resamples: int, seed: int) -> list[PairedMetric]:
    """Return every metric that at least one pair defines on both sides."""
    found: list[PairedMetric] = []
    for name, metric in METRICS.items():
        both = [(a, b) for a, b in ((metric(before), metric(after)) for before, after in pairs) if a is not None and b is not None]
        if both:
            first, second = [a for a, _ in both], [b for _, b in both]
            found.append(PairedMetric(name, sum(first) / len(both), sum(second) / len(both), paired(first, second, resamples, seed)))
    return found


def by_group(pairs: Sequence[Pair], key: Callable[[Result], str], resamples: int, seed: int) -> dict[str, list[PairedMetric]]:
    """Return the comparison of each group of questions; `key` names a question's group."""
    groups = sorted({key(before) for before, _ in pairs})
    return {group: compare_metrics([pair for pair in pairs if key(pair[0]) == group], resamples, seed) for group in groups}


def outcome(pair: Pair) -> str:
    """Return whether F1 rose (win), fell (loss) or stood (tie)."""
    before, after = pair
    return "win" if after.f1 > before.f1 else "loss" if after.f1 < before.f1 else "tie"


def _key(result: Result) -> tuple[str, str, str]:
    return result.data_source, result.id, result.question
