"""Words and cells for paired metrics, shared by the report and by `research compare`. Knows numbers and their units."""

from __future__ import annotations

from collections.abc import Sequence

from research_rl.evaluation.comparison import Matched, PairedMetric
from research_rl.evaluation.intervals import FEWEST, Difference
from research_rl.evaluation.summary import BETTER_HIGH
from research_rl.report.html import ColouredCell

__all__ = ["LABELS", "difference_cells", "difference_rows", "left_out", "metric_head", "p_value", "verdict"]

LABELS = {
    "em": "exact match",
    "f1": "F1",
    "acc": "gold answer in the answer",
    "token_precision": "token precision",
    "token_recall": "token recall",
    "format": "right format",
    "reward": "reward as trained",
    "reward_repository": "reward (repository)",
    "reward_paper": "reward (paper)",
    "searches": "searches per question",
    "recall": "retrieval recall",
    "answer_in_results": "answer in the results",
    "first_answer_search": "search that showed the answer",
    "searches_after_answer": "searches after the answer",
    "redundant_queries": "queries asked before",
    "right_without_search": "right without a search",
    "tokens": "tokens by the model",
    "response_tokens": "tokens in all",
    "seconds": "seconds",
    "failed_searches": "failed searches",
    "suspect": "suspect answers",
    "judge_failed": "judge without a verdict",
}
_COUNTS = frozenset({"searches", "first_answer_search", "searches_after_answer", "tokens", "response_tokens", "seconds", "failed_searches"})


def metric_head(before: str, after: str) -> tuple[str, ...]:
    """Return the head of a table of paired metrics."""
    return ("metric", before, after, "difference", "95 % interval", "up", "down", "same", "n")


def difference_cells(metric: PairedMetric) -> list[str]:
    """Return one metric as plain cells under `metric_head`."""
    d = metric.difference
    number, signed = (_count, _signed_count) if metric.name in _COUNTS else (_share, _signed_share)
    interval = f"{signed(d.low)} to {signed(d.high)}"
    label = LABELS.get(metric.name, metric.name)
    return [label, number(metric.before), number(metric.after), signed(d.mean), interval, str(d.wins), str(d.losses), str(d.ties), str(d.n)]


def difference_rows(metrics: Sequence[PairedMetric]) -> list[list[str | ColouredCell]]:
    """Return one table row a metric; a difference whose interval leaves out 0 is coloured where a direction is better."""
    rows: list[list[str | ColouredCell]] = []
    for metric in metrics:
        cells: list[str | ColouredCell] = [*difference_cells(metric)]
        if kind := _kind(metric):
            cells[3] = ColouredCell(difference_cells(metric)[3], kind)
        rows.append(cells)
    return rows


def left_out(matched: Matched, before: str = "before", after: str = "after") -> str:
    """Return a sentence on the questions that are in no difference; empty when there are none."""
    if not matched.lost:
        return ""
    first, second = matched.lost_sides
    return (
        f"{len(matched.lost)} of {len(matched.everything)} questions are in no difference, "
        "because the model server or the retriever failed in their episodes: "
        f"{first} {before}, {second} {after}."
    )


def p_value(p: float) -> str:
    """Return a p-value with three digits; one that rounds to 0 is none, and is said to be below the least shown."""
    return f"{p:.3f}" if p >= 0.0005 else "<0.001"


def verdict(metrics: Sequence[PairedMetric], name: str, before: str = "before", after: str = "after") -> str:
    """Return one sentence on a metric's paired difference."""
    metric = next((metric for metric in metrics if metric.name == name), None)
    if metric is None:
        return f"No question has {LABELS.get(name, name)} on both sides."
    d = metric.difference
    what = f"{LABELS.get(name, name)} {metric.before:.3f} {before}, {metric.after:.3f} {after}"
    return f"{what}: {d.mean:+.3f}, 95 % interval {d.low:+.3f} to {d.high:+.3f}; {_judge(d)}."


def _judge(difference: Difference) -> str:
    # Before the interval: with very few questions it is too narrow to be believed.
    if not difference.decides:
        return f"{difference.n} {'question decides' if difference.n == 1 else 'questions decide'} nothing, it takes {FEWEST}"
    if not difference.significant:
        return "the interval holds 0, so this may be chance"
    return "better, and the interval leaves out 0" if difference.mean > 0 else "worse, and the interval leaves out 0"


def _kind(metric: PairedMetric) -> str:
    # Of counts such as searches or tokens neither direction is better.
    if not metric.difference.significant or metric.name not in BETTER_HIGH:
        return ""
    return "good" if metric.difference.mean > 0 else "bad"


def _share(value: float) -> str:
    return f"{value:.3f}"


def _signed_share(value: float) -> str:
    return f"{value:+.3f}"


def _count(value: float) -> str:
    return f"{value:,.2f}"


def _signed_count(value: float) -> str:
    return f"{value:+,.2f}"
