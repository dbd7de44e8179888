"""What a judge's verdicts say: two rates, and agreement with exact match. Knows verdicts; asks nobody, writes nothing.

accuracy            right verdicts / all questions: one about which the judge failed counts as wrong
published_accuracy  right verdicts / questions with a verdict, as the published judge reports it
kappa               (agreement - chance) / (1 - chance), chance from both sides' shares of right answers (Cohen 1960)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from research_rl.evaluation.calibration import calibrate
from research_rl.evaluation.intervals import interval

if TYPE_CHECKING:
    from research_rl.evaluation.judging import Judged

__all__ = ["agreement", "measure", "stability"]


def measure(verdicts: Sequence[Judged], resamples: int, seed: int, *, confidence: bool = False) -> dict[str, Any]:
    """Return the metrics of all verdicts, and by data source; rates are {mean, low, high, n}.

    With `confidence` the judge was asked for what responses state, and `unstated` counts the verdicts without one.
    """

    def measured(of: Sequence[Judged]) -> dict[str, Any]:
        metrics = _measured(of, resamples, seed)
        unstated = sum(item.correct is not None and item.confidence is None for item in of)
        return {**metrics, "unstated": unstated} if confidence else metrics

    sources = sorted({item.data_source for item in verdicts})
    by_source = {name: measured([item for item in verdicts if item.data_source == name]) for name in sources}
    return {**measured(verdicts), "by_data_source": by_source}


def _measured(verdicts: Sequence[Judged], resamples: int, seed: int) -> dict[str, Any]:
    judged = [item for item in verdicts if item.correct is not None]

    def rate(values: Sequence[float]) -> dict[str, float | int]:
        return interval(values, resamples, seed, bounded=True).to_json()

    metrics: dict[str, Any] = {
        "n": len(verdicts),
        "failed": len(verdicts) - len(judged),
        "accuracy": rate([float(item.correct is True) for item in verdicts]),
        "published_accuracy": rate([float(item.correct is True) for item in judged]),
        "em": rate([item.em for item in verdicts]),
        "agreement": agreement(judged),
    }
    pairs = [(item.confidence / 100, bool(item.correct)) for item in judged if item.confidence is not None]
    if pairs:
        metrics["calibration"] = calibrate(pairs).to_json()
    return metrics


def agreement(judged: Sequence[Judged]) -> dict[str, float | int | None]:
    """Return the 2x2 table of verdict and exact match over the questions with a verdict, the share that agrees, and kappa.

    Both are None where they are undefined: without a verdict, and kappa also where either side calls all right or all wrong alike.
    """
    counts = Counter((bool(item.correct), item.em == 1) for item in judged)
    both, judge_alone, em_alone, neither = (counts[key] for key in ((True, True), (True, False), (False, True), (False, False)))
    table: dict[str, float | int | None] = {
        "judge_right_em_right": both,
        "judge_right_em_wrong": judge_alone,
        "judge_wrong_em_right": em_alone,
        "judge_wrong_em_wrong": neither,
    }
    n = len(judged)
    if not n:
        return {**table, "share": None, "kappa": None}
    share, judge_right, em_right = (both + neither) / n, (both + judge_alone) / n, (both + em_alone) / n
    chance = judge_right * em_right + (1 - judge_right) * (1 - em_right)
    return {**table, "share": share, "kappa": (share - chance) / (1 - chance) if chance < 1 else None}


def stability(verdicts: Sequence[Judged], swapped: Sequence[Judged], resamples: int, seed: int) -> dict[str, Any]:
    """Return the share of verdicts that stay when what is shown is swapped, and how many turn to right and to wrong.

    Counted are the questions that the judge was asked about, and answered, both times.
    """
    other = {item.row: item for item in swapped}
    pairs = [(item, other[item.row]) for item in verdicts if item.asked and item.row in other]
    both = [(bool(a.correct), bool(b.correct)) for a, b in pairs if a.correct is not None and b.correct is not None]
    return {
        "stay": interval([float(a == b) for a, b in both], resamples, seed, bounded=True).to_json(),
        "to_right": sum(b and not a for a, b in both),
        "to_wrong": sum(a and not b for a, b in both),
    }
