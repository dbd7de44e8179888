"""An agent that is kept up: the same address and token over restarts, the new policy after a training, nothing left at the end.

The service, its retriever and its watch are real; a scripted server stands for vLLM's, and Prefect's artifacts are collected in a list.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from research_rl import config
from research_rl.agent.command import recorded_address
from research_rl.config import Config
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace
from tasks.local import keeper
from tests.contract.test_agent_follow import configured, model
from tests.knowledge import built
from tests.waiting import until

NEWS: dict[str, Any] = {"trust_env": False, "timeout": 600.0}


def train(workspace: Workspace, word: str) -> None:
    """Publish a policy that answers `word`, as a training does."""
    with manifest.publish(workspace.folder("export"), "export", word, {}) as staging:
        shutil.copytree(model(workspace.root / "models" / word, word, 0.01), staging.path, dirs_exist_ok=True)


def prepared(root: Path) -> tuple[Workspace, Config]:
    workspace = Workspace(root)
    built(root, 60, encoder={"dim": 64})
    train(workspace, "one")
    settings = configured(root, None)
    settings = settings.model_copy(update={"agent": config.AgentConfig()})
    config.save(settings, root / "params.yaml")
    return workspace, settings


def answer(workspace: Workspace) -> tuple[str, str, str] | None:
    """Return address, token and the answer that the workspace's agent gives; None while it gives none."""
    address = recorded_address(workspace)
    if address is None or address.token is None:
        return None
    headers = {"Authorization": f"Bearer {address.token}"}
    try:
        reply = httpx.post(f"{address.url}/v1/responses", json={"input": "who wrote Borel"}, headers=headers, **NEWS)
    except httpx.HTTPError:
        return None
    return (address.url, address.token, reply.json()["research"]["answer"]) if reply.status_code == 200 else None


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def kept(workspace: Workspace, settings: Config, monkeypatch: pytest.MonkeyPatch) -> Generator[list[str]]:
    """Keep an agent up for the block; yield the artifacts that were shown."""
    shown, over, failed = list[str](), threading.Event(), list[Exception]()
    monkeypatch.setattr(keeper, "get_run_logger", lambda: logging.getLogger("keeper"))
    monkeypatch.setattr(keeper, "create_markdown_artifact", lambda text, **_: shown.append(text))

    def run() -> None:
        try:
            keeper.keep_agent(settings, workspace, {}, over.is_set)
        except Exception as error:  # noqa: BLE001 - told by the test that waits
            failed.append(error)

    keeping = threading.Thread(target=run)
    keeping.start()
    try:
        assert until(lambda: answer(workspace), over=lambda: failed), failed
        yield shown
    finally:
        over.set()
        keeping.join(600)
        assert not keeping.is_alive() and not failed


def test_an_agent_is_kept_up_with_its_address_and_token_and_serves_the_newest_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, settings = prepared(tmp_path)
    assert not keeper.is_kept(workspace)
    with kept(workspace, settings, monkeypatch) as shown:
        first = answer(workspace)
        assert first and first[2] == "one" and keeper.is_kept(workspace) and len(shown) == 1 and first[0] in shown[0]
        [service] = psutil.Process(json.loads((tmp_path / ".serving" / "agent.pid").read_text())["pid"]).children()
        service.kill()
        assert until(lambda: len(shown) == 2 and answer(workspace) == first), "it is started again at the same address"
        train(workspace, "two")
        assert until(lambda: (answer(workspace) or ("", "", ""))[2] == "two") and answer(workspace)[:2] == first[:2]  # type: ignore[index]
        assert until(lambda: len(shown) == 3)
    assert not keeper.is_kept(workspace) and recorded_address(workspace) is None
    assert [line for process in psutil.process_iter() if str(tmp_path) in (line := command_line(process))] == []
