"""Task gate: the trained policy meets the standing champion; nothing else in a flow moves the alias `champion`.

Invariants: (1) a run does not wait for MLflow: where it has not said who is champion, nothing is decided, and that is said; (2) while
there is no champion the untrained policy stands in for it; (3) each decision is told once, however often a run finds it standing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import Field

from research_rl.errors import ConfigError, DataError, ModelError, ServiceError
from research_rl.evaluation import cells, gate_run
from research_rl.evaluation.cells import Model
from research_rl.evaluation.gate import Decision, Outcome
from research_rl.evaluation.gate_run import Gate
from research_rl.pipeline import manifest
from research_rl.process.registry import Registry
from research_rl.report.gate import describe
from tasks.artifacts import scored, showing
from tasks.job import Job
from tasks.stage import Progress, retried
from tasks.tracking.champion import local

__all__ = ["NO_CHAMPION", "WAIT_S", "Approval", "Held", "ask_standing", "champion", "conclude", "gate"]

WAIT_S = 120.0
"""Longest wait at the end of a run for MLflow's answer to a question that was put at its beginning."""
_APPROVAL_S = 24 * 3600
_TAG_CHARS = 4000
_UNTRAINED = "before"
NO_CHAMPION = "MLflow has not said which version is champion, so nothing was decided; when it answers, run this again or `research gate`"


@dataclass(frozen=True)
class Held:
    """A gate that was held: its decision, the version that it met (None: the untrained policy), and the challenger's manifest.

    `fresh` says that no run has told MLflow and Prefect of it.
    """

    gate: Gate
    decision: Decision
    met: str | None
    challenger: str
    fresh: bool


class Approval(RunInput):
    """Whether the challenger may become champion."""

    approve: bool = Field(default=False, description="Let the challenger become champion.")
    who: str = Field(default="", description="Who decides this.")
    why: str = Field(default="", description="The reason, which is recorded with the version.")


def ask_standing(job: Job) -> None:
    """Ask the registry who is champion; a whole run lies between the question and the gate, which needs the answer."""
    if model := job.config.tracking.registered_model:
        job.tracker.ask_standing(model)


@retried("gate", "the trained policy against the standing champion")
def gate(job: Job) -> State[list[Held]]:
    """Let the trained policy meet the champion; return what was decided, nothing when nobody was met."""
    if not (model := job.config.tracking.registered_model):
        return Completed(name="Skipped", message="tracking.registered_model is empty, so there is no champion", data=[])
    if (stands := job.tracker.standing(WAIT_S)) is None:
        get_run_logger().warning(NO_CHAMPION)
        return Completed(name="NotDecided", message=NO_CHAMPION, data=[])
    challenger = cells.model("after", job.config, job.workspace)
    if stands.get("manifest") == challenger.sha256:
        return Completed(name="Cached", message=f"the trained policy is champion as version {stands['version']}", data=[])
    try:
        meeting = _meeting(job, model, challenger, stands)
    # A training that is done stands, whatever is wrong with the answers, models or rules of the gate.
    except (ServiceError, ConfigError, DataError, ModelError) as error:
        get_run_logger().warning("nobody was met, so the champion stays: %s", error)
        return Completed(name="NotDecided", message=str(error)[:500], data=[])
    held = _held(job, meeting, stands.get("version"))
    return Completed(message=f"{held.decision.outcome.value}: {held.decision.reason}"[:500], data=[held])


def _meeting(job: Job, model: str, challenger: Model, stands: dict[str, str]) -> Gate:
    """Return the gate; the champion is downloaded only where it has to answer something. Raises as `prepare` and `champion`."""
    if not stands:
        return gate_run.prepare(job.config, job.workspace, challenger, cells.model(_UNTRAINED, job.config, job.workspace))
    if hash := stands["manifest"]:
        # Without its folder a model can answer nothing new, but what it answered before may be enough.
        absent = Model(f"{model}/{stands['version']}", job.workspace.root, hash)
        if gate_run.answered(known := gate_run.prepare(job.config, job.workspace, challenger, absent)):
            return known
    return gate_run.prepare(job.config, job.workspace, challenger, champion(job, model, stands))


def champion(job: Job, model: str, stands: Mapping[str, str]) -> Model:
    """Return the standing champion as a model folder, downloaded unless it is here. Raises ConfigError and ServiceError."""
    name = f"{model}/{stands['version']}"
    if here := local(job.workspace, stands["manifest"]):
        return Model(name, here, stands["manifest"])
    return cells.model(f"registry:{name}", job.config, job.workspace, Registry(job.workspace.root).folder)


def _held(job: Job, meeting: Gate, met: str | None) -> Held:
    progress = Progress(gate_run.STAGE, get_run_logger().info, job.proceed)
    decision = gate_run.meet(meeting, progress)
    progress.finish()
    # Remembered only once it was told: a run that is killed while it waits for approval asks again next time.
    fresh = job.tracker.journal_of(manifest.load(meeting.folder, verify=False)) is None
    return Held(meeting, decision, met, meeting.challenger.model.sha256, fresh)


def conclude(job: Job, decided: State[list[Held]]) -> None:
    """Move the champion after a decision to promote, once a person approved where `gate.approval` asks for one; show and tell it.

    `decided` is what the task `gate` ended as. Called in the flow itself: Prefect pauses flows, not tasks.
    """
    for held in decided.result():
        _conclude(job, held)


def _conclude(job: Job, held: Held) -> None:
    promoted, remark = held.decision.outcome is Outcome.PROMOTE, ""
    if promoted and held.fresh and job.config.gate.approval:
        promoted, remark = _approved(held)
    text = describe(held.gate, held.decision)
    with showing("the gate's decision"):
        create_markdown_artifact("\n".join([text, "", remark]), key="gate-decision", description=held.decision.reason)
    get_run_logger().info("gate: %s: %s %s", held.decision.outcome.value, held.decision.reason, remark)
    if held.fresh:
        _tell(job, held, promoted, remark)


def _approved(held: Held) -> tuple[bool, str]:
    """Pause the run until a person decides; return the decision and who made it, why."""
    asking = Approval.with_initial_data(description=f"# Promote?\n\n{held.decision.reason}", approve=False)
    try:
        answer = pause_flow_run(wait_for_input=asking, timeout=_APPROVAL_S, key="gate-approval")
    except FlowPauseTimeout:
        return False, f"Nobody approved it within {_APPROVAL_S // 3600} hours, so the champion stays."
    said = "approved" if answer.approve else "refused"
    return answer.approve, f"The promotion was {said} by {answer.who or 'a person without a name'}: {answer.why or 'no reason given'}."


def _tell(job: Job, held: Held, promoted: bool, remark: str) -> None:
    """Write the decision into the registered version, move the alias, and raise an event."""
    model, decision = str(job.config.tracking.registered_model), held.decision
    met = f"version {held.met}" if held.met else "the untrained policy"
    reason = " ".join(filter(None, (f"Gate against {met}: {decision.outcome.value}. {decision.reason}", remark)))
    numbers = {name: f"{decision.evidence[name]:.6g}" for name in ("n", "mean", "low", "high", "e_gain", "e_fall", "lost")}
    tags = {"gate.outcome": decision.outcome.value, "gate.met": held.met or "none", "gate.promoted": str(promoted).lower()}
    tags |= {"gate.reason": reason[:_TAG_CHARS], **{f"gate.{name}": value for name, value in numbers.items()}}
    scores = scored(manifest.load(job.workspace.folder("report"), verify=False).facts)
    with job.tracker.stage(gate_run.STAGE, job.config, ("gate",)) as run:
        run.finished(manifest.load(held.gate.folder, verify=False), built=True)
        run.artifact(held.gate.folder / gate_run.DECISION)
        run.describe(model, held.challenger, f"{scores}\n\n{reason}", tags)
        if promoted:
            run.promote(model, held.challenger, held.met, f"{flow_run.flow_name}, run {flow_run.name}", reason)
    emit_event(
        "research.gate.decided",
        resource={"prefect.resource.id": f"research.model.{model}", "research.gate.outcome": decision.outcome.value},
        payload={"outcome": decision.outcome.value, "promoted": promoted, "reason": reason, "evidence": decision.evidence},
    )
