"""Several samples a question: their average, the chance that one of k is right, and that all k are. Knows results and numbers.

    avg@k   mean over questions of the mean over their samples
    pass@k  mean over questions of 1 - C(n - c, k) / C(n, k)        at least one of k samples is right
    pass^k  mean over questions of     C(c, k)     / C(n, k)        all of k samples are right

for n samples of a question, c of them right (exact match): both are the share among all choices of k of the n, and without bias.
Sources: pass@k arXiv 2107.03374, equation 1; pass^k arXiv 2406.12045. The best of several runs is none of these.
A sample whose episode was lost scores 0 and stays, as in `summary`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import comb
from typing import Any

from research_rl.errors import ConfigError, DataError
from research_rl.evaluation.intervals import interval, nested
from research_rl.evaluation.results import Result
from research_rl.evaluation.summary import BOUNDED, METRICS, Metric

__all__ = ["by_question", "pass_all_k", "pass_at_k", "summarise_repeats"]


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Return the chance that at least one of `k` of a question's `samples` is right, of which `right` are.

    Raises ConfigError for a k that is not among 1 to `samples`, DataError for more right samples than there are.
    """
    _check(right, samples, k)
    return 1 - comb(samples - right, k) / comb(samples, k)


def pass_all_k(right: int, samples: int, k: int) -> float:
    """Return the chance that all of `k` of a question's `samples` are right (pass^k). Raises as `pass_at_k`."""
    _check(right, samples, k)
    return comb(right, k) / comb(samples, k)


def by_question(results: Iterable[Result]) -> list[list[Result]]:
    """Return the samples of each question together, questions in the order of their first ones."""
    questions: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        questions.setdefault(result.key, []).append(result)
    return list(questions.values())


def summarise_repeats(results: Iterable[Result], ks: Sequence[int], resamples: int, seed: int) -> dict[str, Any]:
    """Return `average` (every metric, as {mean, low, high, n}), `pass@k` and `pass^k` by k, and the fewest and most samples a question.

    `results` hold every sample of every question. Raises ConfigError for a k that a question has too few samples for.
    """
    questions = by_question(results)
    sizes = [len(samples) for samples in questions]
    averages = {name: _samples(questions, metric) for name, metric in METRICS.items()}
    counts = [(sum(result.em == 1 for result in samples), len(samples)) for samples in questions]
    return {
        "questions": len(questions),
        "samples": {"fewest": min(sizes, default=0), "most": max(sizes, default=0)},
        "average": {name: nested(v, resamples, seed, bounded=name in BOUNDED).to_json() for name, v in averages.items() if v},
        **{
            name: {k: interval([chance(*count, k) for count in counts], resamples, seed, bounded=True).to_json() for k in ks}
            for name, chance in (("pass@k", pass_at_k), ("pass^k", pass_all_k))
        },
    }


def _samples(questions: Sequence[Sequence[Result]], metric: Metric) -> list[list[float]]:
    """Return the values of each question's samples that the metric is defined for; questions without any are left out."""
    values = [[value for result in samples if (value := metric(result)) is not None] for samples in questions]
    return [defined for defined in values if defined]


def _check(right: int, samples: int, k: int) -> None:
    if not 1 <= k <= samples:
        raise ConfigError(f"k={k} is not between 1 and the {samples} samples of a question; lower k or evaluate with more samples")
    if not 0 <= right <= samples:
        raise DataError(f"{right} right samples of {samples}; count each sample of a question once")
