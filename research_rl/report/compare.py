"""Compare two evaluation artifacts: what was set differently, what came of it, is it chance. Reads folders; builds nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_rl.errors import DataError
from research_rl.evaluation.results import read_results
from research_rl.pipeline import manifest
from research_rl.report import html
from research_rl.report.format import difference_cells, difference_rows, metric_head, verdict
from research_rl.report.pairs import Pair, PairedMetric, compare_metrics, match

__all__ = ["Comparison", "compare", "load"]

RESAMPLES, SEED = 2000, 17
_STAGES = ("baseline", "evaluate")
_EXAMPLES = 10


@dataclass(frozen=True)
class Comparison:
    """Two evaluations: `parameters` holds (name, in A, in B) of each difference, `only` the questions A and B have alone."""

    a: str
    b: str
    parameters: list[tuple[str, str, str]]
    metrics: list[PairedMetric]
    pairs: list[Pair]
    only: tuple[int, int]


def compare(a: Path, b: Path, page: Path | None = None) -> str:
    """Return the comparison as Markdown, and write it to `page` as HTML too. Raises ManifestError and DataError."""
    found = load(a, b)
    if page:
        page.write_text(_html(found), encoding="utf-8")
    return _markdown(found)


def load(a: Path, b: Path) -> Comparison:
    """Read and pair two evaluation artifacts; `b` counts as the later one."""
    names = [_name(folder) for folder in (a, b)]
    before, after = read_results(a), read_results(b)
    pairs = match(before, after)
    if not pairs:
        raise DataError(
            f"{a} and {b} share no question ({len(before)} and {len(after)} questions); compare evaluations of the same test set"
        )
    parameters = _parameter_differences(_parameters(a), _parameters(b))
    only = (len(before) - len(pairs), len(after) - len(pairs))
    return Comparison(names[0], names[1], parameters, compare_metrics(pairs, RESAMPLES, SEED), pairs, only)


def _name(folder: Path) -> str:
    found = manifest.load(folder)
    if found.stage not in _STAGES:
        raise DataError(f"{folder} is the artifact of stage {found.stage}; compare takes artifacts of {' and '.join(_STAGES)}")
    return f"{folder} ({found.hash[:12]})"


def _parameters(folder: Path) -> dict[str, Any]:
    return dict(_leaves(json.loads((folder / "parameters.json").read_text(encoding="utf-8")), ""))


def _leaves(tree: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _parameter_differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Return differing parameters; a section that only one of the two depends on is one row."""
    sections = [{name.partition(".")[0] for name in parameters} for parameters in (a, b)]
    alone = sections[0] ^ sections[1]
    names = [name for name in sorted({*a, *b}) if name.partition(".")[0] not in alone and a.get(name, ...) != b.get(name, ...)]
    rows = [(name, _value(a, name), _value(b, name)) for name in names]
    used = ("not used", "used")
    return rows + [(f"{name} (all)", used[name in sections[0]], used[name in sections[1]]) for name in sorted(alone)]


def _value(parameters: dict[str, Any], name: str) -> str:
    return json.dumps(parameters[name], ensure_ascii=False) if name in parameters else "absent"


def _changed(pairs: Sequence[Pair]) -> list[list[str]]:
    """Return the questions whose F1 moved most, losses first."""
    moved = sorted((pair for pair in pairs if pair[0].f1 != pair[1].f1), key=lambda pair: pair[1].f1 - pair[0].f1)
    chosen = moved if len(moved) <= 2 * _EXAMPLES else [*moved[:_EXAMPLES], *moved[-_EXAMPLES:]]
    return [[a.question, " | ".join(a.golden_answers), a.prediction, b.prediction, f"{b.f1 - a.f1:+.2f}"] for a, b in chosen]


_CHANGED_HEAD = ("question", "gold", "answer in A", "answer in B", "F1")


def _shared(found: Comparison) -> str:
    return f"{len(found.pairs)} questions in both, {found.only[0]} only in A, {found.only[1]} only in B."


def _markdown(found: Comparison) -> str:
    parameters = [list(row) for row in found.parameters] or [["none", "", ""]]
    return "\n".join(
        [
            "# A against B",
            "",
            f"A: {found.a}  ",
            f"B: {found.b}  ",
            _shared(found),
            "",
            verdict(found.metrics, "f1", "in A", "in B"),
            "",
            "## Parameters that differ",
            "",
            *_markdown_table(("parameter", "A", "B"), parameters),
            "",
            "## Metrics: B minus A, paired",
            "",
            *_markdown_table(metric_head("A", "B"), [difference_cells(metric) for metric in found.metrics]),
            "",
            "## Questions that moved most",
            "",
            *_markdown_table(_CHANGED_HEAD, _changed(found.pairs)),
        ]
    )


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_markdown_row(head), _markdown_row(["---"] * len(head)), *(_markdown_row(row) for row in rows)]


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"


def _html(found: Comparison) -> str:
    parameters = [list(row) for row in found.parameters] or [["none", "", ""]]
    body = (
        html.heading("A against B", 1)
        + html.paragraph(f"A: {found.a}", "lead")
        + html.paragraph(f"B: {found.b}", "lead")
        + html.paragraph(verdict(found.metrics, "f1", "in A", "in B"), "verdict")
        + html.paragraph(_shared(found))
        + html.heading("Parameters that differ")
        + html.table(("parameter", "A", "B"), parameters)
        + html.heading("Metrics: B minus A, paired")
        + html.table(metric_head("A", "B"), difference_rows(found.metrics))
        + html.heading("Questions that moved most")
        + html.table(_CHANGED_HEAD, _changed(found.pairs))
    )
    return html.page("A against B", body)
