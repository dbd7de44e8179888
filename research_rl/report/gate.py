"""A gate's decision and the evidence behind it as Markdown. Knows numbers; decides nothing."""

from __future__ import annotations

from typing import Any

from research_rl.evaluation.gate import Decision
from research_rl.evaluation.gate_run import Gate
from research_rl.report import markdown
from research_rl.terminal import printable

__all__ = ["describe"]

_HEAD = ("questions", "difference", "from", "to", "n", "tolerated fall")


def describe(gate: Gate, decision: Decision) -> str:
    """Return the decision, why, and the differences overall and by question set; safe to print."""
    evidence = decision.evidence
    sides = (("challenger", gate.challenger.model), ("champion", gate.champion.model))
    return "\n".join(
        [
            f"# {printable(gate.challenger.model.name)} against {printable(gate.champion.model.name)}: {decision.outcome.value}",
            "",
            printable(decision.reason),
            "",
            f"{evidence['n']} of {gate.questions} questions have a score on both sides, {evidence['lost']} were lost. "
            f"Differences of {evidence['metric']} are challenger minus champion; each limit is wrong with probability "
            f"{evidence['alpha']:g} at most.",
            "",
            markdown.table(_HEAD, [_row("all", evidence), *(_row(name, of_set) for name, of_set in evidence["sets"].items())]),
            "",
            markdown.table(
                ("evidence", "value", "shown at"),
                [(name, f"{evidence[key]:.4g}", f"{1 / evidence['alpha']:.4g}") for name, key in (("gain", "e_gain"), ("fall", "e_fall"))],
            ),
            "",
            markdown.table(("challenger's mean", "value", "ceiling"), [_cost(name, cost) for name, cost in evidence["ceilings"].items()]),
            "",
            markdown.table(("side", "model", "sha256"), [(side, model.name, f"`{model.sha256[:12]}`") for side, model in sides]),
            "",
            f"Kept in `{printable(str(gate.folder.relative_to(gate.workspace.root)))}`.",
        ]
    )


def _row(name: str, numbers: dict[str, Any]) -> list[str]:
    tolerated = numbers.get("tolerated_fall")
    limits = [f"{numbers[key]:+.4f}" for key in ("mean", "low", "high")]
    return [name, *limits, str(numbers["n"]), "" if tolerated is None else f"{tolerated:g}"]


def _cost(name: str, cost: dict[str, Any]) -> list[str]:
    return [name, f"{cost['mean']:.2f}", "none" if cost["ceiling"] is None else f"{cost['ceiling']:g}"]
