"""How many right answers survive a change of the evidence, paired with the plain evaluation. Knows results, numbers; formats nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from research_rl.evaluation.comparison import ExactTest, PairedMetric, compare_metrics, match, mcnemar
from research_rl.evaluation.evidence import Evidence, is_known
from research_rl.evaluation.intervals import binomial
from research_rl.evaluation.results import Result

__all__ = ["Survival", "survival"]

_METRICS = ("em", "f1")


@dataclass(frozen=True)
class Survival:
    """Of `right` questions answered exactly in the plain evaluation, `survived` still are: with the binomial 95 % interval of that share.

    `metrics` are paired over all `pairs`. `unknown` questions are in none of this: nobody knows which passages answer them.
    """

    right: int
    survived: int
    low: float
    high: float
    pairs: int
    unknown: int
    metrics: dict[str, PairedMetric]
    exact_match: ExactTest

    @property
    def share(self) -> float | None:
        """The share of right answers that survive, None where none was right."""
        return self.survived / self.right if self.right else None


def survival(plain: Sequence[Result], changed: Sequence[Result], evidence: Evidence, resamples: int, seed: int) -> Survival:
    """Compare an evaluation with changed evidence with the plain one; a question that either lost to an outage is in no number."""
    pairs = match(plain, changed).pairs
    # `hops` counts the supporting passages.
    known = [pair for pair in pairs if evidence.kind != "without" or pair[0].hops or is_known((), pair[0].golden_answers)]
    right = [after.em for before, after in known if before.em == 1]
    survived = sum(em == 1 for em in right)
    low, high = binomial(survived, len(right)) if right else (0.0, 1.0)
    metrics = {metric.name: metric for metric in compare_metrics(known, resamples, seed, _METRICS)}
    return Survival(len(right), survived, low, high, len(known), len(pairs) - len(known), metrics, mcnemar(known))
