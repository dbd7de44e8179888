"""The background services: a taken port is one message, and a stale pid file is nobody's process."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import yaml

from research_rl.errors import ServiceError
from research_rl.paths import CHECKOUT
from research_rl.process.services import spawn
from tasks.local.stack import Stack, main, s3_command
from tasks.settings import ADDRESSES


def test_a_port_in_use_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("RESEARCH_PREFECT_PORT", str(taken.getsockname()[1]))
        with pytest.raises(ServiceError, match="RESEARCH_PREFECT_PORT="):
            Stack(tmp_path).up()
    assert not (tmp_path / ".services" / "stack" / ADDRESSES).exists(), "nothing may be half-started"


def test_a_pid_file_of_another_process_is_not_ours(tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    stack.folder.mkdir(parents=True)
    (stack.folder / "prefect-server.pid").write_text(json.dumps({"pid": os.getpid(), "started": 1.0, "marker": "x", "command": []}))
    assert stack.running() == set()
    assert stack.down() == []


@pytest.mark.parametrize("text", ["null", "[]", "{"])
def test_a_torn_pid_file_is_no_running_service(tmp_path: Path, text: str) -> None:
    stack = Stack(tmp_path)
    stack.folder.mkdir(parents=True)
    (stack.folder / "prefect-server.pid").write_text(text)
    assert stack.running() == set() and stack.down() == []


def test_servers_that_an_earlier_release_started_without_a_key_are_not_taken_over(tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    spawn("prefect-server", ["sleep", "60"], folder=stack.folder, detached=True)
    try:
        with pytest.raises(ServiceError, match=r"prefect-server .* without a key; run `make down`"):
            stack.up()
    finally:
        assert stack.down() == ["prefect-server"]


def test_keys_of_the_s3_server_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    command = s3_command(tmp_path / "s3", range(7000, 7008), keys)
    assert (tmp_path / "s3" / "s3.json").stat().st_mode & 0o077 == 0
    assert "-s3.port=7000" in command and not any(word == "b" for word in command)


def test_every_deployment_names_a_flow_that_exists() -> None:
    for item in yaml.safe_load((CHECKOUT / "prefect.yaml").read_text())["deployments"]:
        path, _, name = item["entrypoint"].partition(":")
        assert f"def {name}(" in (CHECKOUT / path).read_text()
        for schedule in item.get("schedules", []):
            assert schedule["active"] is (item["name"] == "nightly"), "what fetches data or trains is started by its user"


def test_an_unknown_verb_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["sideways"])
