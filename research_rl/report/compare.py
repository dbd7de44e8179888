"""Compare two evaluation artifacts: what was set differently, what came of it, is it chance. Reads folders; builds nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from research_rl.errors import DataError
from research_rl.evaluation.comparison import ExactTest, Matched, Pair, PairedMetric, compare_results, compare_sets
from research_rl.evaluation.results import load_evaluation, read_results
from research_rl.report import html, markdown, parameters
from research_rl.report.format import difference_cells, difference_rows, left_out, metric_head, p_value, verdict
from research_rl.terminal import printable

__all__ = ["EvaluationComparison", "compare", "load"]

RESAMPLES, SEED = 2000, 17
_EXAMPLES = 10
_PARAMETER_HEAD = ("parameter", "A", "B")
_TEST_HEAD = ("question set", "right in B alone", "right in A alone", "p", "p (Holm)")
_TEST_TITLE = "Exact match: is it chance? McNemar's exact test"
_CHANGED_HEAD = ("question", "gold", "answer in A", "answer in B", "F1")


@dataclass(frozen=True)
class EvaluationComparison:
    """Two evaluations: `parameters` holds (name, in A, in B) of each difference, `only` the questions A and B have alone.

    `exact_match` holds McNemar's test of each question set, corrected for being several.
    """

    a: str
    b: str
    parameters: list[parameters.Row]
    metrics: list[PairedMetric]
    exact_match: dict[str, ExactTest]
    matched: Matched
    only: tuple[int, int]


def compare(a: Path, b: Path, page: Path | None = None) -> str:
    """Return the comparison as Markdown that is safe to print, and write it to `page` as HTML too.

    Raises ManifestError and DataError.
    """
    comparison = load(a, b)
    if page:
        page.write_text(_html(comparison), encoding="utf-8")
    return _markdown(comparison)


def load(a: Path, b: Path) -> EvaluationComparison:
    """Read and pair two evaluation artifacts; `b` counts as the later one."""
    names = [_name(folder) for folder in (a, b)]
    before, after = read_results(a), read_results(b)
    compared = compare_results(before, after, RESAMPLES, SEED)
    shared = len(compared.matched.everything)
    if not shared:
        raise DataError(
            f"{a} and {b} share no question ({len(before)} and {len(after)} questions); compare evaluations of the same test set"
        )
    # What each evaluation recorded beside its results, not params.yaml: that may have changed since.
    changes = parameters.differences(parameters.read(a), parameters.read(b))
    metrics = [metric for metric in compared.metrics if metric.name != "reward" or not _rewards_differ(changes)]
    tests = {name: comparison.exact_match for name, comparison in compare_sets(before, after, RESAMPLES, SEED, ()).items()}
    return EvaluationComparison(names[0], names[1], changes, metrics, tests, compared.matched, (len(before) - shared, len(after) - shared))


def _rewards_differ(changes: Sequence[parameters.Row]) -> bool:
    """Whether A and B were trained for different rewards, whose means say nothing about each other."""
    return any(name.startswith(("reward", "judge.")) for name, *_ in changes)


def _name(folder: Path) -> str:
    return f"{folder} ({load_evaluation(folder).hash[:12]})"


def _changed(pairs: Sequence[Pair]) -> list[list[str]]:
    """Return the questions whose F1 moved most, losses first."""
    # Losses first: they are what a mean that rose hides.
    moved = sorted((pair for pair in pairs if pair[0].f1 != pair[1].f1), key=lambda pair: pair[1].f1 - pair[0].f1)
    chosen = moved if len(moved) <= 2 * _EXAMPLES else [*moved[:_EXAMPLES], *moved[-_EXAMPLES:]]
    return [[a.question, " | ".join(a.golden_answers), a.prediction, b.prediction, f"{b.f1 - a.f1:+.2f}"] for a, b in chosen]


def _parameters(comparison: EvaluationComparison) -> list[parameters.Row]:
    return comparison.parameters or [("none", "", "")]


def _tests(comparison: EvaluationComparison) -> list[list[str]]:
    tests = comparison.exact_match.items()
    return [[name, str(test.gains), str(test.losses), p_value(test.p), p_value(test.adjusted)] for name, test in tests]


def _shared(comparison: EvaluationComparison) -> str:
    matched, only = comparison.matched, comparison.only
    total = len(matched.everything)
    shared = f"{total} questions in both, {only[0]} only in A, {only[1]} only in B."
    return " ".join(filter(None, (shared, left_out(matched, "in A", "in B"))))


def _markdown(comparison: EvaluationComparison) -> str:
    return "\n".join(
        [
            "# A against B",
            "",
            f"A: {printable(comparison.a)}  ",
            f"B: {printable(comparison.b)}  ",
            _shared(comparison),
            "",
            verdict(comparison.metrics, "f1", "in A", "in B"),
            "",
            "## Parameters that differ",
            "",
            markdown.table(_PARAMETER_HEAD, _parameters(comparison)),
            "",
            "## Metrics: B minus A, paired",
            "",
            markdown.table(metric_head("A", "B"), map(difference_cells, comparison.metrics)),
            "",
            f"## {_TEST_TITLE}",
            "",
            markdown.table(_TEST_HEAD, _tests(comparison)),
            "",
            "## Questions that moved most",
            "",
            markdown.table(_CHANGED_HEAD, _changed(comparison.matched.pairs)),
        ]
    )


def _html(comparison: EvaluationComparison) -> str:
    return html.render(
        "compare.html.j2",
        "A against B",
        a=comparison.a,
        b=comparison.b,
        verdict=verdict(comparison.metrics, "f1", "in A", "in B"),
        shared=_shared(comparison),
        parameter_head=_PARAMETER_HEAD,
        parameters=_parameters(comparison),
        metric_head=metric_head("A", "B"),
        metrics=difference_rows(comparison.metrics),
        test_title=_TEST_TITLE,
        test_head=_TEST_HEAD,
        tests=_tests(comparison),
        changed_head=_CHANGED_HEAD,
        changed=_changed(comparison.matched.pairs),
    )
