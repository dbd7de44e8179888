"""Compare two evaluations of the same questions, question by question. Knows results and numbers; formats nothing.

Invariant: a question whose episode was lost on either side is in no difference: an outage is neither a gain nor a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from research_rl.evaluation.intervals import Difference, paired
from research_rl.evaluation.results import Result
from research_rl.evaluation.summary import METRICS, SCORES

__all__ = ["Matched", "Pair", "PairedMetric", "by_group", "compare_metrics", "match", "outcome"]

Pair = tuple[Result, Result]


@dataclass(frozen=True)
class Matched:
    """Results of equal questions: `pairs` that the policies decided on both sides, and `lost` ones."""

    pairs: list[Pair]
    lost: list[Pair]

    @property
    def everything(self) -> list[Pair]:
        """All pairs, the lost ones last."""
        return self.pairs + self.lost


@dataclass(frozen=True)
class PairedMetric:
    """One metric over pairs: means before and after, and the difference with its interval."""

    name: str
    before: float
    after: float
    difference: Difference


def match(before: Sequence[Result], after: Sequence[Result]) -> Matched:
    """Pair the results of equal questions, in the order of `before`."""
    later = {_key(result): result for result in after}
    pairs = [(result, later[_key(result)]) for result in before if _key(result) in later]
    return Matched([pair for pair in pairs if not _is_lost(pair)], [pair for pair in pairs if _is_lost(pair)])


def compare_metrics(pairs: Sequence[Pair], resamples: int, seed: int) -> list[PairedMetric]:
    """Return every metric that at least one pair defines on both sides."""
    compared: list[PairedMetric] = []
    for name, metric in METRICS.items():
        # A metric may be undefined for a question, as recall is without known passages; a pair counts only with both sides.
        both = [(a, b) for a, b in ((metric(before), metric(after)) for before, after in pairs) if a is not None and b is not None]
        if both:
            first, second = [a for a, _ in both], [b for _, b in both]
            difference = paired(first, second, resamples, seed, bounded=name in SCORES)
            compared.append(PairedMetric(name, sum(first) / len(both), sum(second) / len(both), difference))
    return compared


def by_group(pairs: Sequence[Pair], key: Callable[[Result], str], resamples: int, seed: int) -> dict[str, list[PairedMetric]]:
    """Return the comparison of each group of questions; `key` names a question's group."""
    groups = sorted({key(before) for before, _ in pairs})
    return {group: compare_metrics([pair for pair in pairs if key(pair[0]) == group], resamples, seed) for group in groups}


def outcome(pair: Pair) -> str:
    """Return whether F1 rose (win), fell (loss) or stood (tie), or whether an episode was lost (lost)."""
    before, after = pair
    if _is_lost(pair):
        return "lost"
    return "win" if after.f1 > before.f1 else "loss" if after.f1 < before.f1 else "tie"


def _is_lost(pair: Pair) -> bool:
    return pair[0].lost or pair[1].lost


def _key(result: Result) -> tuple[str, str, str]:
    # Ids repeat between data sets, and an evaluation of other questions may use the same ids.
    return result.data_source, result.id, result.question
