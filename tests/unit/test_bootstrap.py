"""The bootstrap waits for a server that answers, and deploys what prefect.yaml names into the workspace of the containers."""

from __future__ import annotations

import subprocess
from pathlib import PurePosixPath
from subprocess import CompletedProcess

import pytest
import yaml

from research_rl.errors import ServiceError
from research_rl.paths import CHECKOUT
from research_rl.process.services import free_port
from tasks.local import bootstrap, deploy


def test_every_deployment_and_trigger_works_below_the_workspace() -> None:
    project = yaml.safe_load((CHECKOUT / "prefect.yaml").read_text())
    moved = deploy.with_workspace(project, PurePosixPath("/workspace"))
    before = {item["name"]: item["parameters"]["workspace"] for item in project["deployments"]}
    after = {item["name"]: item["parameters"]["workspace"] for item in moved["deployments"]}
    assert after == {name: "/workspace" if folder == "." else f"/workspace/{folder}" for name, folder in before.items()}
    triggers = [trigger for item in moved["deployments"] for trigger in item.get("triggers", [])]
    assert triggers and all(trigger["parameters"]["workspace"] == "/workspace" for trigger in triggers)
    assert [item["entrypoint"] for item in moved["deployments"]] == [item["entrypoint"] for item in project["deployments"]]


def test_pools_come_before_deployments_and_automations_after_them(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> CompletedProcess[str]:
        commands.append([str(word) for word in command[1:]])
        return CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    deploy.deploy({}, PurePosixPath("/workspace"))
    assert [command[:3] for command in commands] == [
        ["-m", "tasks.local.pools"],
        ["--no-prompt", "deploy", "--all"],
        ["-m", "tasks.local.automations"],
    ]


def test_a_server_that_is_silent_is_one_line_with_its_address(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    monkeypatch.setattr(bootstrap, "_EVERY_S", 0.01)
    with pytest.raises(ServiceError, match=rf"{url}/health does not answer after 0\.1 s .*see the log of that server"):
        bootstrap.wait(f"{url}/health", 0.1)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert bootstrap.main([]) == 1
    assert capsys.readouterr().err == (
        "bootstrap: PREFECT_API_URL is not set; set it to the address of Prefect's API, such as http://prefect:4200/api\n"
    )
