"""`python -m tasks.local.automations`: what the Prefect server does by itself when a run goes wrong, and its limits. Knows events.

Invariants: (1) each is found by its name: applying again changes it and makes no second one; (2) one that a user turned off stays off;
(3) one that is as it should be is left alone, and with it the runs that it waits to hear of.
A message is sent where RESEARCH_NOTIFY_BLOCK names a notification block, as TYPE/NAME, for example slack-webhook/operations.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events.actions import ActionTypes, ChangeFlowRunState, DoNothing, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import Event, Resource, ResourceSpecification
from prefect.exceptions import ObjectNotFound

from research_rl.errors import ConfigError, ResearchError
from research_rl.terminal import say
from tasks import limits
from tasks.settings import HEARTBEAT_S

__all__ = ["BLOCK", "all_automations", "apply", "beat", "main", "watch"]

BLOCK = "RESEARCH_NOTIFY_BLOCK"
_SILENT = timedelta(seconds=8 * HEARTBEAT_S)
"""Longer than Prefect's default of 180 s between two heartbeats, so that no living run of another client is taken for a dead one."""
_RUN = "prefect.flow-run."
_ALIVE = ("heartbeat", "Completed", "Failed", "Cancelled", "Cancelling", "Crashed", "Paused", "Suspended", "AwaitingRetry")
_EACH = {"prefect.resource.id"}
_WORDS = {
    "A run failed": ("Failed", "Its log says why; run it again, and finished stages are skipped."),
    "A run crashed": ("Crashed", "Its process ended or lost the server; run it again, and training goes on from its last checkpoint."),
    "A run is late": ("Late", "No worker took it: look whether the worker of its pool runs, and whether another run fills the pool."),
}
_EVENTS = {
    "A night fell": ("research.night.regressed", "research.model.*", "The champion lost on a question set; see docs/nightly.md."),
    "A training collapsed": ("research.training.collapsed", "research.training.*", "A rule of the watch stopped it; see docs/runbook.md."),
}
ZOMBIE = "A run is silent"
AGAIN = "A silent run goes on"
_UNHEARD = "It sent no heartbeat"
STARTS = 5
"""How often a run is started at most by AGAIN, its first start counted."""


def all_automations(block: UUID | None) -> list[AutomationCore]:
    """Return all automations; with `block` each sends a message through it."""
    automations = [
        AutomationCore(name=name, description=text, trigger=_states(state), actions=_told(block, name, text))
        for name, (state, text) in _WORDS.items()
    ]
    for name, (event, resource, text) in _EVENTS.items():
        trigger = EventTrigger(expect={event}, match=_matching(resource), posture=Posture.Reactive, threshold=1)
        automations.append(AutomationCore(name=name, description=text, trigger=trigger, actions=_told(block, name, text)))
    return [*automations, _zombie(block), _again(block)]


def _states(state: str) -> EventTrigger:
    return EventTrigger(expect={_RUN + state}, match=_matching(f"{_RUN}*"), for_each=_EACH, posture=Posture.Reactive, threshold=1)


def _matching(resource: str) -> ResourceSpecification:
    return ResourceSpecification.model_validate({"prefect.resource.id": resource})


def _zombie(block: UUID | None) -> AutomationCore:
    """Mark a run Crashed that gave no sign of life: its worker was killed, and nobody else would say so."""
    text = f"{_UNHEARD} for {_SILENT.total_seconds():g} s: its worker was killed, or its machine is gone."
    trigger = EventTrigger(
        after={f"{_RUN}heartbeat"},
        expect={_RUN + word for word in _ALIVE},
        match=_matching(f"{_RUN}*"),
        for_each=_EACH,
        posture=Posture.Proactive,
        threshold=1,
        within=_SILENT,
    )
    crash = ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=text, force=False)
    actions: list[ActionTypes] = [crash, *(_told(block, ZOMBIE, text) if block else [])]
    return AutomationCore(name=ZOMBIE, description=text, trigger=trigger, actions=actions)


def _again(block: UUID | None) -> AutomationCore:
    """Put a run that was silent back into the queue of its deployment; a training goes on from its last checkpoint.

    The message of its state tells it from a run that crashed otherwise: one that no worker can start would be put back for ever. One
    that takes its machine down each time is left Crashed after STARTS.
    """
    text = "Its process was lost; a worker takes it once more, and finished stages are skipped."
    counts = [str(count) for count in range(1, STARTS)]
    labels = {"prefect.resource.id": f"{_RUN}*", "prefect.state-message": f"{_UNHEARD}*", "prefect.run-count": counts}
    match = ResourceSpecification.model_validate(labels)
    trigger = EventTrigger(expect={f"{_RUN}Crashed"}, match=match, for_each=_EACH, posture=Posture.Reactive, threshold=1)
    again = ChangeFlowRunState(state=StateType.SCHEDULED, name="AwaitingRetry", message=text, force=False)
    actions: list[ActionTypes] = [again, *(_told(block, AGAIN, text) if block else [])]
    return AutomationCore(name=AGAIN, description=text, trigger=trigger, actions=actions)


def _told(block: UUID | None, subject: str, text: str) -> list[ActionTypes]:
    """Return the message; without a block the automation is seen in the server's feed of events alone."""
    if block is None:
        return [DoNothing()]
    body = (
        f"{text}\n\n{{{{ flow_run.name }}}} {{{{ flow_run|ui_url }}}}" if subject not in _EVENTS else f"{text}\n\n{{{{ event.payload }}}}"
    )
    return [SendNotification(block_document_id=block, subject=f"research-rl: {subject}", body=body)]


def apply(client: SyncPrefectClient, automations: Sequence[AutomationCore]) -> list[str]:
    """Bring each automation to the server; return one line for each."""
    return [f"{_applied(client, automation)}: {automation.name}" for automation in automations]


def _applied(client: SyncPrefectClient, automation: AutomationCore) -> str:
    standing = client.read_automations_by_name(automation.name)
    if not standing:
        client.create_automation(automation)
        return "made"
    # A server may hold the same one twice, from before they were found by name.
    for twin in standing[1:]:
        client.delete_automation(twin.id)
    wanted = automation.model_copy(update={"enabled": standing[0].enabled})
    # What is changed gets another trigger, which waits to hear of no run that it has not heard itself.
    if AutomationCore.model_validate(standing[0].model_dump()) != wanted:
        client.update_automation(standing[0].id, wanted)
        return "changed"
    return "kept"


def watch(client: SyncPrefectClient) -> list[str]:
    """Let the server wait to hear of every run that is said to be running, as after a heartbeat of it; return one line for each.

    It forgets them in an outage of more than five minutes, and whenever an automation is changed. One that lives is heard within
    HEARTBEAT_S; one that was never heard belongs to a client that sends no heartbeats.
    """
    running = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.RUNNING])))
    heard = [run for run in client.read_flow_runs(flow_run_filter=running) if _was_heard(client, run)]
    for run in heard:
        beat(client, run)
    return [f"waits to hear of: {run.name}" for run in heard]


def beat(client: SyncPrefectClient, run: FlowRun) -> None:
    """Send a heartbeat in the name of a run."""
    resource = {"prefect.resource.id": f"{_RUN}{run.id}", "prefect.resource.name": run.name}
    heartbeat = Event(event=f"{_RUN}heartbeat", resource=Resource.model_validate(resource))
    client.request("POST", "/events", json=[heartbeat.model_dump(mode="json")]).raise_for_status()


def _was_heard(client: SyncPrefectClient, run: FlowRun) -> bool:
    asked = {"filter": {"event": {"name": [f"{_RUN}heartbeat"]}, "resource": {"id": [f"{_RUN}{run.id}"]}}, "limit": 1}
    return client.request("POST", "/events/filter", json=asked).raise_for_status().json()["total"] > 0


def _block(client: SyncPrefectClient) -> UUID | None:
    """Return the notification block that the environment names. Raises ConfigError when the server has none of that name."""
    if not (named := os.environ.get(BLOCK, "").strip()):
        return None
    kind, _, name = named.partition("/")
    try:
        return client.read_block_document_by_name(name, kind).id
    except ObjectNotFound:
        raise ConfigError(
            f"{BLOCK}={named} is no block of the server; make it in the page of blocks, as TYPE/NAME, or unset {BLOCK}"
        ) from None


def main() -> int:
    """Apply all automations and limits to the configured server, and let it wait for what runs; return the exit code."""
    try:
        with get_client(sync_client=True) as client:
            applied = [*apply(client, all_automations(_block(client))), *limits.apply(client), *limits.apply_to_queues(client)]
            say("\n".join([*applied, *watch(client)]))
    except ResearchError as error:
        say(f"automations: {error}", sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
