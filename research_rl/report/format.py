"""Words and cells for paired metrics, shared by the report and by `research compare`. Knows numbers and their units."""

from __future__ import annotations

from collections.abc import Sequence

from research_rl.evaluation.statistics import Difference
from research_rl.report.html import Html
from research_rl.report.pairs import PairedMetric

__all__ = ["LABELS", "difference_cells", "difference_rows", "metric_head", "verdict"]

LABELS = {
    "em": "exact match",
    "f1": "F1",
    "format": "right format",
    "reward_repository": "reward (repository)",
    "reward_paper": "reward (paper)",
    "searches": "searches per question",
    "recall": "retrieval recall",
    "tokens": "tokens by the model",
    "response_tokens": "tokens in all",
    "failed_searches": "failed searches",
}
_COUNTS = frozenset({"searches", "tokens", "response_tokens", "failed_searches"})
_HIGHER_IS_BETTER = frozenset({"em", "f1", "format", "reward_repository", "reward_paper", "recall"})


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


def difference_rows(metrics: Sequence[PairedMetric]) -> list[list[str | Html]]:
    """Return one table row a metric; a difference whose interval leaves out 0 is coloured where a direction is better."""
    rows: list[list[str | Html]] = []
    for metric in metrics:
        cells: list[str | Html] = [*difference_cells(metric)]
        kind = _kind(metric)
        if kind:
            cells[3] = Html(f'<span class="{kind}">{cells[3]}</span>')
        rows.append(cells)
    return rows


def verdict(metrics: Sequence[PairedMetric], name: str, before: str = "before", after: str = "after") -> str:
    """Return one sentence on a metric's paired difference."""
    metric = next((metric for metric in metrics if metric.name == name), None)
    if metric is None:
        return f"No question has {LABELS.get(name, name)} on both sides."
    d = metric.difference
    what = f"{LABELS.get(name, name)} {metric.before:.3f} {before}, {metric.after:.3f} {after}"
    return f"{what}: {d.mean:+.3f}, 95 % interval {d.low:+.3f} to {d.high:+.3f}; {_judge(d)}."


def _judge(difference: Difference) -> str:
    if not difference.significant:
        return "the interval holds 0, so this may be chance"
    return "better, and the interval leaves out 0" if difference.mean > 0 else "worse, and the interval leaves out 0"


def _kind(metric: PairedMetric) -> str:
    if not metric.difference.significant or metric.name not in _HIGHER_IS_BETTER:
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
