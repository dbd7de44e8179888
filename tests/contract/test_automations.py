"""Automations on a real server: applied twice, each stands once, and what a user turned off stays off."""

from __future__ import annotations

from collections.abc import Generator

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client

from research_rl.errors import ConfigError
from tasks.local import automations
from tasks.settings import HEARTBEAT_S
from tests.prefect_server import harness

NAMES = {
    *("A run failed", "A run crashed", "A run is late", "A run is silent", "A silent run goes on"),
    *("A night fell", "A training collapsed"),
}


@pytest.fixture(scope="module")
def client() -> Generator[SyncPrefectClient]:
    with harness(), get_client(sync_client=True) as client:
        yield client


def test_applied_twice_each_stands_once_and_twins_go(client: SyncPrefectClient) -> None:
    said = automations.apply(client, automations.all_automations(None))
    assert {line.partition(": ")[0] for line in said} == {"made"}
    client.create_automation(automations.all_automations(None)[0])
    (silent,) = client.read_automations_by_name("A run is silent")
    client.pause_automation(silent.id)
    said = automations.apply(client, automations.all_automations(None))
    assert {line.partition(": ")[0] for line in said} == {"kept"}
    standing = client.read_automations()
    assert sorted(item.name for item in standing) == sorted(NAMES)
    assert {item.name: item.enabled for item in standing} == {name: name != "A run is silent" for name in NAMES}


def test_what_is_as_it_should_be_is_left_alone_and_what_is_not_is_changed(client: SyncPrefectClient) -> None:
    wanted = automations.all_automations(None)
    automations.apply(client, wanted)
    client.update_automation(client.read_automations_by_name("A run is late")[0].id, wanted[0].model_copy(update={"name": "A run is late"}))
    triggers = lambda: {item["name"]: item["trigger"]["id"] for item in client.request("POST", "/automations/filter", json={}).json()}  # noqa: E731
    before = triggers()
    said = automations.apply(client, wanted)
    assert [line for line in said if not line.startswith("kept: ")] == ["changed: A run is late"]
    assert {name for name, trigger in triggers().items() if before[name] != trigger} == {"A run is late"}
    (late,) = [item for item in wanted if item.name == "A run is late"]
    assert client.read_automations_by_name("A run is late")[0].trigger == late.trigger


def test_a_silent_run_is_crashed_after_several_heartbeats(client: SyncPrefectClient) -> None:
    automations.apply(client, automations.all_automations(None))
    (silent,) = client.read_automations_by_name("A run is silent")
    assert silent.trigger.within.total_seconds() > max(180, 3 * HEARTBEAT_S)  # type: ignore[union-attr]
    assert [action.type for action in silent.actions] == ["change-flow-run-state"]


def test_a_block_that_the_server_lacks_is_one_message(client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(automations.BLOCK, "slack-webhook/nobody")
    refused = r"RESEARCH_NOTIFY_BLOCK=slack-webhook/nobody is no block of the server; make it in the page of blocks"
    with pytest.raises(ConfigError, match=refused):
        automations._block(client)
