"""Runs on a real server: a schedule makes them; a lost one goes back into its queue and keeps no place there; others stay as they are."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import CronSchedule
from prefect.states import Crashed, Pending, Running

from tasks import limits
from tasks.local import automations
from tests.prefect_server import Server
from tests.waiting import until


@pytest.fixture(scope="module", name="server")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    server = Server(tmp_path_factory.mktemp("home"))
    yield server
    server.kill()


@pytest.fixture(scope="module", name="client")
def _client(server: Server) -> Generator[SyncPrefectClient]:
    with server.client() as client:
        client.create_work_pool(WorkPoolCreate(name="laptop", type="process"))
        client.create_work_queue("nightly", work_pool_name="laptop")
        limits.apply_to_queues(client, "laptop")
        automations.apply(client, automations.all_automations(None))
        yield client


@pytest.fixture(scope="module", name="deployment")
def _deployment(client: SyncPrefectClient) -> UUID:
    @flow(name="of-the-test")
    def of_the_test() -> None: ...

    flow_id = client.create_flow(of_the_test)
    return client.create_deployment(flow_id, "of-the-test", work_pool_name="laptop", work_queue_name="nightly")


def lost(client: SyncPrefectClient, deployment: UUID, message: str, starts: int = 1) -> FlowRun:
    """Return a run that was started so often and then crashed with this message."""
    run = client.create_flow_run_from_deployment(deployment)
    for _ in range(starts):
        for state in (Pending(), Running()):
            client.set_flow_run_state(run.id, state, force=True)
    client.set_flow_run_state(run.id, Crashed(message=message), force=True)
    return client.read_flow_run(run.id)


def message_of_silence() -> str:
    (silent,) = [item for item in automations.all_automations(None) if item.name == automations.ZOMBIE]
    return str(silent.actions[0].message)  # type: ignore[union-attr]


def test_a_schedule_makes_runs(server: Server, client: SyncPrefectClient) -> None:
    daily = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 3 * * *", timezone="UTC"))
    made = client.create_deployment(client.create_flow_from_name("scheduled"), "scheduled", schedules=[daily])
    runs = lambda: client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[made])))  # noqa: E731
    log = server.home / "log"
    assert until(runs, over=lambda: "InvalidRequestError" in log.read_text() or server.process.poll() is not None), log.read_text()[-3000:]
    assert {(run.state_name, run.expected_start_time.hour) for run in runs() if run.expected_start_time} == {("Scheduled", 3)}


def test_a_silent_run_goes_on_and_no_other(client: SyncPrefectClient, deployment: UUID, tmp_path: Path) -> None:
    said = message_of_silence()
    other = lost(client, deployment, "No worker can start it.")
    often = lost(client, deployment, said, starts=automations.STARTS)
    assert often.run_count == automations.STARTS
    once = lost(client, deployment, said)
    assert until(lambda: client.read_flow_run(once.id).state_name == "AwaitingRetry", pause_s=1.0)
    # Events are handled in their order: what is left of the earlier ones is decided.
    assert [client.read_flow_run(run.id).state_name for run in (other, often)] == ["Crashed", "Crashed"]
    found = client.read_flow_run(once.id).state
    assert found is not None and found.is_scheduled() and found.state_details.scheduled_time is not None


def test_a_run_is_waited_for_after_a_start_that_applied_its_automation_again_and_after_a_long_outage(
    server: Server, client: SyncPrefectClient, deployment: UUID
) -> None:
    def waited_for(run: FlowRun) -> bool:
        with closing(sqlite3.connect(server.home / "prefect.db")) as database:
            triggers = {item["trigger"]["id"] for item in client.request("POST", "/automations/filter", json={}).json()}
            rows = database.execute("SELECT trigger_id, bucketing_key FROM automation_bucket WHERE \"end\" > datetime('now')").fetchall()
        return any(trigger in triggers and str(run.id) in key for trigger, key in rows)

    run, unheard = (client.create_flow_run_from_deployment(deployment) for _ in range(2))
    for each in (run, unheard):
        for state in (Pending(), Running()):
            client.set_flow_run_state(each.id, state, force=True)
    automations.beat(client, run)
    assert until(lambda: waited_for(run), over=lambda: server.process.poll() is not None)
    automations.apply(client, automations.all_automations(None))
    assert waited_for(run), "applying again forgets nobody"
    # The server writes events down some seconds after it heard them.
    assert until(lambda: automations.watch(client), pause_s=1.0)
    server.kill()
    with closing(sqlite3.connect(server.home / "prefect.db")) as database, database:
        # As the server does after an outage of more than five minutes.
        database.execute("DELETE FROM automation_bucket")
    server.start()
    assert automations.watch(client) == [f"waits to hear of: {run.name}"]
    assert until(lambda: waited_for(run)) and not waited_for(unheard)


def test_a_queue_gives_out_one_run_at_a_time_and_the_next_after_a_crash(client: SyncPrefectClient, deployment: UUID) -> None:
    def given() -> list[UUID]:
        found = client.get_scheduled_flow_runs_for_work_pool("laptop", work_queue_names=["nightly"])
        return [response.flow_run.id for response in found]

    for run in client.read_flow_runs():
        client.delete_flow_run(run.id)
    first, second = (client.create_flow_run_from_deployment(deployment).id for _ in range(2))
    assert given() == [first]
    for state in (Pending(), Running()):
        client.set_flow_run_state(first, state)
    assert given() == []
    client.set_flow_run_state(first, Crashed())
    assert given() == [second]


def test_a_limit_of_a_queue_that_a_user_changed_stays(client: SyncPrefectClient) -> None:
    (pool, queue), *_ = limits.queues(limits.PROJECTS[0])
    assert client.read_work_queue_by_name(queue, pool).concurrency_limit == 1
    path = {"work_pool_name": pool, "name": queue}
    client.request("PATCH", "/work_pools/{work_pool_name}/queues/{name}", path_params=path, json={"concurrency_limit": 2})
    assert f"kept at 2: queue {pool}/{queue}" in limits.apply_to_queues(client, pool)


def test_a_limit_that_an_earlier_release_gave_a_deployment_goes(client: SyncPrefectClient) -> None:
    flow_id = client.create_flow_from_name("earlier")
    for limit in (1, None):
        made = client.create_deployment(flow_id, "earlier", concurrency_limit=limit)
        standing = client.read_deployment(made).global_concurrency_limit
        assert (standing.limit if standing else None) == limit


def test_no_deployment_has_a_limit_of_its_own_and_each_has_its_queue() -> None:
    texts = [path.read_text() for path in limits.PROJECTS]
    assert not [text for text in texts if re.search(r"^ *concurrency_limit:", text, re.M)]
    named = [item for path in limits.PROJECTS for item in limits.queues(path)]
    assert len(named) == len(set(named)) == sum(text.count("entrypoint:") for text in texts)
