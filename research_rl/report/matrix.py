"""Tables of a matrix of cells: one row a cell, paired differences, repeated samples, marked questions. Reads cells; plays nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from research_rl.config import Config
from research_rl.evaluation.cells import Cell, Model, names
from research_rl.evaluation.comparison import Comparison, PairedMetric, compare_sets
from research_rl.evaluation.contamination import SIZE, mark, with_and_without
from research_rl.evaluation.evidence import Evidence
from research_rl.evaluation.judging import METRICS, standing
from research_rl.evaluation.matrix import CellOutcome
from research_rl.evaluation.published import Placed, Value, against, publication, values
from research_rl.evaluation.repeats import summarise_repeats
from research_rl.evaluation.results import Result, read_results
from research_rl.evaluation.survival import survival
from research_rl.pipeline.manifest import Manifest
from research_rl.report import markdown
from research_rl.report.compare import RESAMPLES, SEED
from research_rl.report.format import p_value

__all__ = ["describe", "describe_against"]

_SHOWN = ("em", "f1", "acc", "recall", "searches", "tokens", "seconds")
_COUNTS = frozenset({"searches", "tokens", "seconds"})
_HEAD = ("model", "method", "set", "n", "lost", "EM", "F1", "acc", "retrieval recall", "searches", "tokens", "seconds")
_DIFFERENCE_HEAD = ("what", "set", "F1", "95 % interval", "EM", "gained", "lost", "p", "p (Holm)", "n")
_MARK_HEAD = ("model", "method", "set", "n", "in passages", "right in closed book", "EM", "EM without both marks", "n without")
_AGAINST_HEAD = ("model", "method", "set", "ours", "published", "band", "ours is", "n")
_JUDGED_HEAD = (*_AGAINST_HEAD, "our judge")
_PRESET = "research"
"""The judge's preset whose verdicts may stand beside published ones."""
_SURVIVAL_HEAD = ("model", "method", "set", "right", "still right", "survival", "EM moved", "F1 moved", "p", "n", "evidence unknown")
_OURS, _CLOSED = "research", "closed-book"
_CONTROLS = {_CLOSED: "what search adds", "single-search": "what further searches add"}
"""Controls by what our protocol's gain over them is."""

_Results = dict[Cell, list[Result]]


def describe(outcomes: Sequence[CellOutcome]) -> str:
    """Return the matrix as Markdown that is safe to print. Raises DataError for results that cannot be read."""
    results, names = _read(outcomes), _Names.of(outcomes)
    first = {cell: answers for cell, answers in results.items() if cell.sample == 0 and cell.evidence is None}
    rows = [_refused(item, names) if item.refusal else _row(item.cell, names) for item in outcomes]
    parts = [
        markdown.table(_HEAD, rows),
        *_repeats(results, names),
        *_survivals(results, names),
        *_differences(first, names),
        *_marks(first, names),
    ]
    return "\n\n".join(parts)


def describe_against(outcomes: Sequence[CellOutcome], name: str, config: Config) -> str:
    """Return our exact match and our judges' verdicts beside those of a publication, as Markdown. Raises ConfigError for an unknown one."""
    published, names = publication(name), _Names.of(outcomes)
    results = _read(outcomes)
    rows = [[*names.row(item.cell), *_placed(item)] for item in against(published, results, config)]
    if not rows:
        known = ", ".join(f"{family.name} by {', '.join(family.methods)}" for family in published.families)
        return f"No cell has a value in {published.source}. It has {known}, on {', '.join(published.sets)}."
    about = (
        f"Exact match beside {published.source}. The band is the 95 % binomial interval of the published share on n questions, the fewer "
        "of ours and theirs."
    )
    verdicts = (
        f"Called right by a judge, ours by the preset {_PRESET} and theirs by {published.judge}, of the questions with a verdict. Two "
        "judges may differ by several points on equal answers."
    )
    made = {item.cell: item.manifest for item in outcomes if item.manifest}
    theirs = values(published, made, config, "judge")
    judged = [[*names.row(value.cell), *row] for value in theirs for row in _judged(value, made[value.cell])]
    return "\n\n".join([about, markdown.table(_AGAINST_HEAD, rows), verdicts, markdown.table(_JUDGED_HEAD, judged)])


def _placed(item: Placed) -> list[str]:
    """Return the columns of `_AGAINST_HEAD` behind the names."""
    return [f"{item.ours:.3f}", _published(item.published, item.family), f"{item.low:.3f} to {item.high:.3f}", item.place, str(item.n)]


def _published(share: float, family: str) -> str:
    return f"{share:.4f} ({family})"


def _judged(value: Value, artifact: Manifest) -> Iterable[list[str]]:
    """Yield the columns behind the names: a row for each judge of the published preset that was asked about a cell, one row without any."""
    cell, asked = value.cell, False
    for folder, judgement in standing(cell.root, artifact.hash, _PRESET):
        rate: dict[str, float] = json.loads((folder / METRICS).read_text())["published_accuracy"]
        if rate["n"]:
            asked = True
            yield [*_placed(value.beside(rate["mean"], int(rate["n"]))), str(judgement.parameters["model"])]
    if not asked:
        remedy = f"not judged: `research judge {cell.folder.relative_to(cell.root)} --preset {_PRESET}`"
        yield ["", _published(value.share, value.family), "", "", "", remedy]


def _read(outcomes: Iterable[CellOutcome]) -> _Results:
    return {item.cell: read_results(item.cell.folder) for item in outcomes if item.manifest}


@dataclass(frozen=True)
class _Names:
    """What the tables call each model of a matrix."""

    models: dict[Model, str]

    @classmethod
    def of(cls, outcomes: Iterable[CellOutcome]) -> _Names:
        return cls(names(item.cell.model for item in outcomes))

    def row(self, cell: Cell) -> list[str]:
        """Return the cells with which a row begins."""
        again = f" (sample {cell.sample + 1})" if cell.sample else ""
        return [self.models[cell.model], cell.played + again, cell.question_set]


def _row(cell: Cell, names: _Names) -> list[str]:
    metrics: dict[str, Any] = json.loads((cell.folder / "metrics.json").read_text())
    lost = json.loads((cell.folder / "manifest.json").read_text())["counts"]["lost"]
    return [*names.row(cell), str(metrics["n"]), str(lost), *(_value(metrics, name) for name in _SHOWN)]


def _refused(outcome: CellOutcome, names: _Names) -> list[str]:
    return [*names.row(outcome.cell), f"refused: {outcome.refusal}", *[""] * (len(_HEAD) - 4)]


def _value(metrics: dict[str, Any], name: str) -> str:
    if name not in metrics:
        return ""
    digits = 2 if name in _COUNTS else 3
    return _interval(metrics[name], digits)


def _interval(estimate: dict[str, float], digits: int = 3) -> str:
    return f"{estimate['mean']:.{digits}f} ({estimate['low']:.{digits}f} to {estimate['high']:.{digits}f})"


@dataclass(frozen=True)
class _Side:
    """A model played by one method."""

    model: Model
    method: str


def _differences(results: _Results, names: _Names) -> list[str]:
    sides: dict[_Side, list[Result]] = {}
    for cell, answers in results.items():
        sides.setdefault(_Side(cell.model, cell.method), []).extend(answers)
    rows = [
        _difference(what, name, compared)
        for what, before, after in [*_between_models(sides, names), *_between_methods(sides, names)]
        for name, compared in compare_sets(sides[before], sides[after], RESAMPLES, SEED, ("f1", "em")).items()
    ]
    if not rows:
        return []
    about = (
        "Differences are paired by question; questions that an outage decided on either side are in none. Gained and lost count the "
        "questions whose exact match changed, p is McNemar's exact test of them, and Holm's correction is for the sets of one difference."
    )
    return [about, markdown.table(_DIFFERENCE_HEAD, rows)]


def _between_models(sides: Iterable[_Side], names: _Names) -> Iterable[tuple[str, _Side, _Side]]:
    """Yield each further model against the first, played by the same method; one model under two names differs in nothing."""
    first: dict[str, _Side] = {}
    for side in sides:
        other, shown = first.setdefault(side.method, side), names.models
        if (other.model.sha256, other.model.prompt) != (side.model.sha256, side.model.prompt):
            yield f"{shown[side.model]} against {shown[other.model]}, {side.method}", other, side


def _between_methods(sides: Iterable[_Side], names: _Names) -> Iterable[tuple[str, _Side, _Side]]:
    """Yield what our protocol gains over each control, and how far it stays behind searches that always find the right passages."""
    known = frozenset(sides)
    for side in sides:
        ours = _Side(side.model, _OURS)
        if ours in known and side.method in _CONTROLS:
            yield f"{_CONTROLS[side.method]}, {names.models[side.model]}", side, ours
        elif ours in known and side.method == "oracle":
            yield f"what the right passages would add, {names.models[side.model]}", ours, side


def _difference(what: str, name: str, compared: Comparison) -> list[str]:
    metrics = {metric.name: metric.difference for metric in compared.metrics}
    if "f1" not in metrics:
        return [what, name, "no question in both", *[""] * (len(_DIFFERENCE_HEAD) - 4), "0"]
    f1, em, test = metrics["f1"], metrics["em"], compared.exact_match
    changed = [str(test.gains), str(test.losses), p_value(test.p), p_value(test.adjusted)]
    return [what, name, f"{f1.mean:+.3f}", f"{f1.low:+.3f} to {f1.high:+.3f}", f"{em.mean:+.3f}", *changed, str(f1.n)]


def _repeats(results: _Results, names: _Names) -> list[str]:
    """Return averages over samples, and how often one of k or all of them are right; nothing where each question was asked once."""
    samples: dict[Cell, list[list[Result]]] = {}
    for cell, answers in results.items():
        samples.setdefault(replace(cell, hash="", sample=0), []).append(answers)
    most = max(map(len, samples.values()), default=0)
    if most < 2:
        return []
    ks = sorted({*(2**power for power in range(1, most.bit_length())), most} - {1})
    head = ("model", "method", "set", f"EM avg@{most}", f"F1 avg@{most}", *(f"pass@{k}" for k in ks), f"pass^{most}")
    return [markdown.table(head, [[*names.row(cell), *_repeated(every, ks)] for cell, every in samples.items() if len(every) == most])]


def _repeated(samples: Sequence[Sequence[Result]], ks: Sequence[int]) -> list[str]:
    summary = summarise_repeats([result for sample in samples for result in sample], ks, RESAMPLES, SEED)
    average = summary["average"]
    passed = [summary["pass@k"][k] for k in ks]
    return [_interval(estimate) for estimate in (average["em"], average["f1"], *passed, summary["pass^k"][ks[-1]])]


def _survivals(results: _Results, names: _Names) -> list[str]:
    """Return how many right answers survive each change of the evidence; nothing where none was played."""
    plain = {replace(cell, hash=""): answers for cell, answers in results.items() if cell.evidence is None}
    rows = [
        [*names.row(cell), *_survived(cell.evidence, plain[before], answers)]
        for cell, answers in results.items()
        if cell.evidence and (before := replace(cell, hash="", evidence=None)) in plain
    ]
    about = (
        "Survival is the share of the plain evaluation's right answers (exact match) that stay right with the changed evidence, with its "
        "binomial 95 % interval. Differences are paired by question, changed minus plain; p is McNemar's exact test. Questions of which "
        "nobody knows the evidence, and those that an outage decided, are in no number."
    )
    return [about, markdown.table(_SURVIVAL_HEAD, rows)] if rows else []


def _survived(evidence: Evidence, plain: list[Result], changed: list[Result]) -> list[str]:
    result = survival(plain, changed, evidence, RESAMPLES, SEED)
    share = "" if result.share is None else f"{result.share:.3f} ({result.low:.3f} to {result.high:.3f})"
    moved = [_moved(result.metrics[name]) if name in result.metrics else "" for name in ("em", "f1")]
    return [
        str(result.right),
        str(result.survived),
        share,
        *moved,
        p_value(result.exact_match.p),
        str(result.pairs),
        str(result.unknown),
    ]


def _moved(metric: PairedMetric) -> str:
    d = metric.difference
    return f"{d.mean:+.3f} ({d.low:+.3f} to {d.high:+.3f})"


def _marks(results: _Results, names: _Names) -> list[str]:
    """Return exact match with and without questions whose answer may not have been found by searching."""
    closed = {(cell.model, cell.question_set): answers for cell, answers in results.items() if cell.method == _CLOSED}
    rows = [
        [*names.row(cell), *_marked(answers, closed.get((cell.model, cell.question_set)))]
        for cell, answers in results.items()
        if cell.method != _CLOSED
    ]
    about = (
        f"Marked questions: {SIZE} consecutive words of the question stand in a passage that search showed; the model answers it right "
        "without search. Without them a set is also a harder one: compare models, not one model's two numbers."
    )
    return [about, markdown.table(_MARK_HEAD, rows)] if rows else []


def _marked(answers: list[Result], closed: list[Result] | None) -> list[str]:
    summary = with_and_without(answers, mark(answers, closed), RESAMPLES, SEED, ("em",))
    marked, rest = summary["marked"], summary["without_any"]
    known = str(marked["closed_book"]) if closed else "not played"
    remaining = _interval(rest["em"]) if rest["n"] else ""
    return [str(len(answers)), str(marked["in_passages"]), known, _value(summary["all"], "em"), remaining, str(rest["n"])]
