"""Say which component made two evaluations differ: a table for the terminal and a page. Knows shares and words; plays nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from research_rl.evaluation.blame import Crossing, Evaluated, ExchangePlan, Joint, Share, attribute
from research_rl.evaluation.cells import Cell
from research_rl.evaluation.intervals import Difference
from research_rl.evaluation.results import Result
from research_rl.report import html, markdown, parameters
from research_rl.report.compare import RESAMPLES, SEED
from research_rl.report.html import ColouredCell
from research_rl.terminal import printable

__all__ = ["Blame", "describe", "page", "plan_text", "weigh"]

_SCORES = ("f1", "em")
_LABELS = {"f1": "F1", "em": "EM"}
_HEAD = ("what differs", "in A", "in B", *(text for name in _SCORES for text in (_LABELS[name], "95 % interval")), "n")
_POINT_HEAD = ("taken from B", "F1", "EM", "n")
_DIGITS = 12


@dataclass(frozen=True)
class Blame:
    """Two evaluations, how one was turned into the other, what could not be had, every evaluation in between, and the shares by metric."""

    a: Evaluated
    b: Evaluated
    plan: ExchangePlan
    gone: tuple[Mapping[str, str], Mapping[str, str]]
    points: Mapping[Crossing, Sequence[Result]]
    shares: Mapping[str, tuple[list[Share], Difference]]


def weigh(
    a: Evaluated,
    b: Evaluated,
    plan: ExchangePlan,
    gone: tuple[Mapping[str, str], Mapping[str, str]],
    points: Mapping[Crossing, Sequence[Result]],
) -> Blame:
    """Return the shares of F1 and exact match. Raises DataError when no question is in all evaluations."""
    return Blame(a, b, plan, gone, points, {name: attribute(points, plan, name, RESAMPLES, SEED) for name in _SCORES})


def describe(blame: Blame) -> str:
    """Return it as Markdown that is safe to print."""
    parts = ["# What made B differ from A", _sides(blame), _verdict(blame), markdown.table(_HEAD, map(_plain, _rows(blame)))]
    parts += [*_notes(blame), "## The evaluations in between", markdown.table(_POINT_HEAD, _points(blame))]
    return "\n\n".join(parts)


def page(blame: Blame) -> str:
    """Return it as a page."""
    return html.render(
        "blame.html.j2",
        "What made B differ from A",
        a=_name(blame.a),
        b=_name(blame.b),
        verdict=_verdict(blame),
        head=_HEAD,
        shares=_rows(blame),
        notes=_notes(blame),
        point_head=_POINT_HEAD,
        points=_points(blame),
        parameter_head=("parameter", "A", "B"),
        parameters=parameters.differences(blame.a.parameters, blame.b.parameters) or [("none", "", "")],
    )


def plan_text(
    plan: ExchangePlan, gone: tuple[Mapping[str, str], Mapping[str, str]], crossings: Mapping[Crossing, Sequence[tuple[Cell, bool]]]
) -> str:
    """Return which evaluations would be played; `crossings` tells of each crossing's cells whether they stand."""
    head = f"A and B differ in {', '.join(map(_joint, plan.players))}."
    rows = [
        [_from_b(point), cell.label, "stands" if stands else "to be played"]
        for point, states in crossings.items()
        for cell, stands in states
    ]
    table = [markdown.table(("taken from B", "cell", "state"), rows)] if rows else ["Nothing has to be played."]
    return "\n\n".join([head, *_gone(gone), *table])


def _rows(blame: Blame) -> list[list[str | ColouredCell]]:
    rows = [_row(blame, player, place) for place, player in enumerate(blame.plan.players)]
    totals = [blame.shares[name][1] for name in _SCORES]
    return [*rows, ["all together", "", "", *_numbers(totals)]]


def _row(blame: Blame, player: Joint, place: int) -> list[str | ColouredCell]:
    differences = [blame.shares[name][0][place].difference for name in _SCORES]
    return [_joint(player), _identity(blame.a, player), _identity(blame.b, player), *_numbers(differences)]


def _numbers(differences: Sequence[Difference]) -> list[str | ColouredCell]:
    cells: list[str | ColouredCell] = []
    for difference in differences:
        mean = f"{difference.mean:+.3f}"
        kind = "good" if difference.mean > 0 else "bad"
        cells += [ColouredCell(mean, kind) if difference.significant else mean, f"{difference.low:+.3f} to {difference.high:+.3f}"]
    return [*cells, str(differences[0].n)]


def _plain(row: Sequence[str | ColouredCell]) -> list[str]:
    return [cell if isinstance(cell, str) else cell.text for cell in row]


def _verdict(blame: Blame) -> str:
    shares, total = blame.shares["f1"]
    largest = max(shares, key=lambda share: abs(share.difference.mean))
    difference = largest.difference
    certain = "its interval leaves out 0" if difference.significant else "which may be chance"
    share = f"the largest share, {difference.mean:+.3f}, is that of {_joint(largest.components)}, {certain}"
    return f"F1 differs by {total.mean:+.3f} on {total.n} questions; {share}."


def _notes(blame: Blame) -> list[str]:
    plan = blame.plan
    if plan.ordered:
        way = f"Shares are what each exchange changed in the order {', '.join(map(_joint, plan.players))}; another order may give others."
    else:
        way = "Shares are Shapley values: the mean over all orders of exchange of what a component's own exchange changes."
    notes = [
        f"{way} They sum up to the whole difference. Intervals are bootstrapped over questions, all evaluations paired.",
        *_gone(blame.gone),
    ]
    if plan.first or plan.last:
        fixed = [f"{_joint(plan.first)} first"] if plan.first else []
        fixed += [f"{_joint(plan.last)} last"] if plan.last else []
        notes.append(f"So {' and '.join(fixed)}: only in this order could the others be exchanged.")
    versions = [each.manifest.code_version for each in (blame.a, blame.b)]
    if versions[0] != versions[1]:
        notes.append(f"A was made by version {versions[0]} and B by {versions[1]}; what that changed is in the shares unseen.")
    return notes


def _gone(gone: tuple[Mapping[str, str], Mapping[str, str]]) -> list[str]:
    return [
        f"{name} of {side} cannot be played again: {reason}."
        for side, reasons in zip("AB", gone, strict=True)
        for name, reason in reasons.items()
    ]


def _points(blame: Blame) -> list[list[str]]:
    return [
        [_from_b(point), *(f"{_mean(results, name):.3f}" for name in _SCORES), str(len(results))] for point, results in blame.points.items()
    ]


def _mean(results: Sequence[Result], name: str) -> float:
    return sum(float(getattr(result, name)) for result in results) / len(results)


def _from_b(point: Crossing) -> str:
    return ", ".join(sorted(point)) or "nothing (A)"


def _joint(components: Joint) -> str:
    return " with ".join(components)


def _identity(each: Evaluated, components: Joint) -> str:
    return "; ".join(_short(each.identity(name)) for name in components)


def _short(value: Any) -> str:
    """Return a component in a few words: hashes cut, values of little account left out."""
    if isinstance(value, Mapping):
        shown = {name: item for name, item in value.items() if item is not None and name != "max_tokens"}  # pyright: ignore[reportUnknownVariableType]
        return ", ".join(f"{name} {_short(item)}" for name, item in shown.items())  # pyright: ignore[reportUnknownVariableType,reportUnknownArgumentType]
    text = parameters.public(str(value))
    return text[:_DIGITS] if len(text) == 64 else text


def _sides(blame: Blame) -> str:
    return f"A: {_name(blame.a)}  \nB: {_name(blame.b)}"


def _name(each: Evaluated) -> str:
    return printable(f"{each.folder} ({each.manifest.hash[:_DIGITS]})")
