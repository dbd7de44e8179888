"""Compare two evaluations of the same questions, question by question. Knows results and numbers; formats nothing.

Invariant: a question whose episode was lost on either side is in no difference and no test: an outage is neither a gain nor a loss.
It is counted. Sources: McNemar's test in its exact form (McNemar 1947: of the questions that changed sides, as many are expected to
have gained as lost), Holm's correction for several tests (Holm 1979).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from research_rl.evaluation.intervals import Difference, paired
from research_rl.evaluation.results import Result
from research_rl.evaluation.summary import BOUNDED, METRICS

__all__ = [
    "Comparison",
    "ExactTest",
    "Matched",
    "Pair",
    "PairedMetric",
    "by_group",
    "compare_metrics",
    "compare_results",
    "compare_sets",
    "holm",
    "match",
    "mcnemar",
    "outcome",
]

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

    @property
    def lost_sides(self) -> tuple[int, int]:
        """In how many pairs the episode before, and the one after, was lost."""
        return sum(before.lost for before, _ in self.lost), sum(after.lost for _, after in self.lost)


@dataclass(frozen=True)
class PairedMetric:
    """One metric over pairs: means before and after, and the difference with its interval."""

    name: str
    before: float
    after: float
    difference: Difference


@dataclass(frozen=True)
class ExactTest:
    """McNemar's exact test of exact match: questions that only the later evaluation answers (`gains`), and only the earlier (`losses`).

    `p` is two-sided; `adjusted` is it after Holm's correction over the question sets compared at once, `p` itself where there is one.
    """

    gains: int
    losses: int
    p: float
    adjusted: float


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of one question set in pairs: the pairs, each metric's difference, and the test of exact match."""

    matched: Matched
    metrics: list[PairedMetric]
    exact_match: ExactTest

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record: counts of pairs, means, differences and the test."""
        before_lost, after_lost = self.matched.lost_sides
        lost = {"questions": len(self.matched.lost), "before": before_lost, "after": after_lost}
        metrics = {m.name: {"before": m.before, "after": m.after, **m.difference.to_json()} for m in self.metrics}
        return {"pairs": len(self.matched.pairs), "lost": lost, "metrics": metrics, "exact_match": asdict(self.exact_match)}


def compare_results(before: Sequence[Result], after: Sequence[Result], resamples: int, seed: int) -> Comparison:
    """Compare two evaluations over all questions that both have."""
    return _compared(match(before, after), resamples, seed, METRICS)


def compare_sets(
    before: Sequence[Result], after: Sequence[Result], resamples: int, seed: int, names: Collection[str] = METRICS
) -> dict[str, Comparison]:
    """Compare two evaluations on each question set (data source) apart, the tests corrected for being as many as the sets.

    Only the metrics of these `names` are compared.
    """
    matched = match(before, after)
    sets = sorted({before.data_source for before, _ in matched.everything})
    compared = {name: _compared(_of_set(matched, name), resamples, seed, names) for name in sets}
    adjusted = holm({name: comparison.exact_match.p for name, comparison in compared.items()})
    return {name: replace(c, exact_match=replace(c.exact_match, adjusted=adjusted[name])) for name, c in compared.items()}


def match(before: Sequence[Result], after: Sequence[Result]) -> Matched:
    """Pair the results of equal questions, in the order of `before`."""
    later = {result.key: result for result in after}
    pairs = [(result, later[result.key]) for result in before if result.key in later]
    return Matched([pair for pair in pairs if not _is_lost(pair)], [pair for pair in pairs if _is_lost(pair)])


def compare_metrics(pairs: Sequence[Pair], resamples: int, seed: int, names: Collection[str] = METRICS) -> list[PairedMetric]:
    """Return every metric of these names that at least one pair defines on both sides."""
    compared: list[PairedMetric] = []
    for name, metric in ((name, metric) for name, metric in METRICS.items() if name in names):
        # A metric may be undefined for a question, as recall is without known passages; a pair counts only with both sides.
        both = [(a, b) for a, b in ((metric(before), metric(after)) for before, after in pairs) if a is not None and b is not None]
        if both:
            first, second = [a for a, _ in both], [b for _, b in both]
            difference = paired(first, second, resamples, seed, bounded=name in BOUNDED)
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


def mcnemar(pairs: Sequence[Pair]) -> ExactTest:
    """Test whether exact match differs: p is how often chance splits the questions that changed sides at least as unevenly."""
    gains = sum(after.em > before.em for before, after in pairs)
    losses = sum(after.em < before.em for before, after in pairs)
    p = _two_sided(min(gains, losses), gains + losses)
    return ExactTest(gains, losses, p, p)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values corrected for being several: one below 0.05 holds with 5 % risk of any false one among all."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        # Never below an earlier one: a test cannot hold where a clearer one did not.
        largest = max(largest, min(1.0, (len(p_values) - place) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def _compared(matched: Matched, resamples: int, seed: int, names: Collection[str]) -> Comparison:
    return Comparison(matched, compare_metrics(matched.pairs, resamples, seed, names), mcnemar(matched.pairs))


def _of_set(matched: Matched, name: str) -> Matched:
    def chosen(pairs: Sequence[Pair]) -> list[Pair]:
        return [pair for pair in pairs if pair[0].data_source == name]

    return Matched(chosen(matched.pairs), chosen(matched.lost))


def _two_sided(fewer: int, trials: int) -> float:
    """Return twice the chance of at most `fewer` heads in `trials` throws of a fair coin, at most 1."""
    # In whole numbers, which neither overflow nor lose digits, also for thousands of throws.
    term = total = 1
    for heads in range(1, fewer + 1):
        term = term * (trials - heads + 1) // heads
        total += term
    return min(1.0, 2 * total / 2**trials)


def _is_lost(pair: Pair) -> bool:
    return pair[0].lost or pair[1].lost
