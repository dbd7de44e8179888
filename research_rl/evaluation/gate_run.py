"""Let a challenger meet the champion on the same questions until the gate decides. Leaves asking to `answers` and the rules to `gate`.

Invariants: (1) no batch is asked after the one that decided; (2) equal gates are one artifact, whatever was answered before them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from research_rl.config import Config
from research_rl.errors import ConfigError
from research_rl.evaluation import cells
from research_rl.evaluation.answers import Answers, Asking, answers
from research_rl.evaluation.cells import Model
from research_rl.evaluation.gate import Decision, Outcome, asked, decide, looks
from research_rl.evaluation.results import HeldOutQuestion, read_questions, write_results
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import Progress, Workspace

__all__ = ["DECISION", "STAGE", "Gate", "answered", "meet", "prepare", "standing"]

STAGE, DECISION = "gate", "decision.json"
_FOLDER = Path("artifacts") / "gates"
_SHOWN = 12
# How a gate is held and who confirms it changes no decision, so it changes no hash.
_NOT_DECIDING = frozenset({"together", "approval"})


@dataclass(frozen=True)
class Gate:
    """A meeting of two models on the chosen questions; `batches` holds them in the order of the looks."""

    config: Config
    workspace: Workspace
    built: Mapping[str, Manifest]
    challenger: Answers
    champion: Answers
    batches: tuple[tuple[HeldOutQuestion, ...], ...]

    @property
    def questions(self) -> int:
        """How many questions there are, in all batches together."""
        return sum(map(len, self.batches))

    @property
    def parameters(self) -> dict[str, Any]:
        """What decides, beside the answers."""
        return self.config.gate.model_dump(mode="json", exclude=set(_NOT_DECIDING))

    @property
    def hash(self) -> str:
        """Hash of the rules and of both sides' cells."""
        sides = [[cell.hash for cell in side.cells] for side in (self.challenger, self.champion)]
        return hashlib.sha256(json.dumps([self.parameters, *sides], sort_keys=True).encode()).hexdigest()

    @property
    def folder(self) -> Path:
        """Where its artifact is, or will be."""
        label = f"{self.challenger.model.label}-against-{self.champion.model.label}-{self.hash[:_SHOWN]}"
        return self.workspace.root / _FOLDER / label


def prepare(config: Config, workspace: Workspace, challenger: Model, champion: Model, sets: Sequence[str] = ()) -> Gate:
    """Return the gate of two models on these question sets (none: all of test). Raises ConfigError, DataError and ManifestError."""
    if challenger.sha256 == champion.sha256:
        raise ConfigError(f"challenger {challenger.name} and champion {champion.name} are one model, {champion.sha256[:12]}; name another")
    built = cells.parents(workspace, config)
    chosen = cells.question_sets(
        read_questions(workspace.folder("prepare") / "test.parquet", config.evaluation.rows, config.evaluation.rows_per_set), sets
    )
    if absent := sorted(config.gate.must_hold.keys() - chosen.keys()):
        raise ConfigError(
            f"gate.must_hold names {', '.join(absent)}, and the questions are those of {', '.join(sorted(chosen))}: that such a set holds "
            "can never be shown, so nobody could be promoted; correct gate.must_hold or add its file to data.test"
        )
    # In the order of the file, in whatever order sets were named: equal gates then draw the same order of asking.
    questions = sorted((question for of_set in chosen.values() for question in of_set), key=lambda question: question.row)
    batches = tuple(tuple(questions[place] for place in batch) for batch in looks(len(questions), config.gate))

    ours, theirs = (answers(config, workspace, built, model, sorted(chosen)) for model in (challenger, champion))
    return Gate(config, workspace, built, ours, theirs, batches)


def standing(gate: Gate) -> Decision | None:
    """Return the decision of an equal gate that was held before, None when there is none or its folder is torn."""
    if manifest.found(gate.folder) is None:
        return None
    tree = json.loads((gate.folder / DECISION).read_text(encoding="utf-8"))
    return Decision(Outcome(tree["outcome"]), tree["reason"], tree["evidence"])


def answered(gate: Gate) -> bool:
    """Return whether the gate can be decided without asking either model anything."""
    return standing(gate) is not None or _next(gate) is None


def meet(gate: Gate, progress: Progress) -> Decision:
    """Hold the gate, or return the decision that stands. Raises ConfigError, DataError, ModelError and ServiceError."""
    if earlier := standing(gate):
        return earlier
    with Asking(gate.config, gate.workspace, [question for batch in gate.batches for question in batch], progress) as asking:
        _play(gate, asking)
    decision, batches = _decided(gate)
    _publish(gate, decision, [question.row for batch in batches for question in batch])
    return decision


def _decide(gate: Gate, batches: Sequence[Sequence[HeldOutQuestion]]) -> Decision:
    ours, theirs = gate.champion.results, gate.challenger.results
    rows = [question.row for batch in batches for question in batch]
    return decide([asked(ours[row], theirs[row], gate.config.gate.metric) for row in rows], gate.config.gate)


def _decided(gate: Gate) -> tuple[Decision, Sequence[Sequence[HeldOutQuestion]]]:
    """Return the decision at the look after which it fell, and the batches up to it, however many more have answers."""
    batches = gate.batches[: _answered(gate)]
    decision = _decide(gate, batches)
    after = decision.evidence["decided_after"]
    if after is None:
        return decision, batches
    counted, ours, theirs = 0, gate.champion.results, gate.challenger.results
    for number, batch in enumerate(batches, 1):
        # Counted as `gate.decide` counts: questions that have a score on both sides.
        counted += sum(asked(ours[q.row], theirs[q.row], gate.config.gate.metric).difference is not None for q in batch)
        if counted >= after:
            batches = batches[:number]
            break
    return _decide(gate, batches), batches


def _answered(gate: Gate) -> int:
    """Return how many batches, from the first on, have answers of both."""
    for number, batch in enumerate(gate.batches):
        if gate.challenger.lacking(batch) or gate.champion.lacking(batch):
            return number
    return len(gate.batches)


def _next(gate: Gate) -> int | None:
    """Return the number of the batch to ask next; None when the batches before it decide, or when all have answers."""
    number = _answered(gate)
    if number == len(gate.batches) or _decide(gate, gate.batches[:number]).outcome is not Outcome.UNDECIDED:
        return None
    return number


def _play(gate: Gate, asking: Asking) -> None:
    """Ask batch by batch until the gate is decided or all have answers."""
    questions = [question for batch in gate.batches for question in batch]
    sides = (gate.champion, gate.challenger)
    if not gate.config.gate.together and _next(gate) is not None and all(side.lacking(questions) for side in sides):
        asking.ask(gate.champion, questions)
        asking.release(gate.champion)
    while (number := _next(gate)) is not None:
        for side in sides:
            asking.ask(side, gate.batches[number])


def _publish(gate: Gate, decision: Decision, rows: Sequence[int]) -> None:
    with manifest.publish(gate.folder, STAGE, gate.hash, gate.built, gate.parameters) as staging:
        sides = {"challenger": gate.challenger, "champion": gate.champion}
        for name, side in sides.items():
            (staging.path / name).mkdir()
            # Only the questions that decided: equal gates are equal artifacts, whatever else has been answered.
            write_results(staging.path / name, [side.results[row] for row in rows])
        models = {name: {"model": side.model.name, "sha256": side.model.sha256} for name, side in sides.items()}
        tree = {**asdict(decision), **models, "gate": gate.parameters, "asked": len(rows), "questions": gate.questions}
        (staging.path / DECISION).write_text(json.dumps(tree, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        staging.counts |= {"asked": len(rows), "questions": gate.questions, "lost": decision.evidence["lost"]}
        staging.facts |= {"outcome": decision.outcome.value, "reason": decision.reason, **models}
