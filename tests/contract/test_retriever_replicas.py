"""Real services behind one client: parts answer as the whole does, and a killed or frozen replica costs no answer."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from research_rl.config import Config
from research_rl.paths import CHECKOUT
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import free_port
from research_rl.retriever import TOKEN, command, fleet
from research_rl.retriever.client import RetrieverClient
from tests.knowledge import built, until_ready

ROWS = 240
QUERIES = [f"Person{n} Surname{n}" for n in range(0, ROWS, 7)]


@dataclass
class Served:
    """A running service."""

    process: subprocess.Popen[bytes]
    url: str


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return built(tmp_path_factory.mktemp("parts"), ROWS, encoder={"dim": 256}, index={"shard_rows": 100})


@pytest.fixture
def start(workspace: Workspace, tmp_path: Path) -> Iterator[object]:
    """Return a function that starts services on the workspace and waits for them; all end with the test."""
    started: list[Served] = []

    def starts(*parts: str) -> list[Served]:
        for part in parts:
            port = free_port()
            call = ["-m", "research_rl.retriever.command", "--workspace", str(workspace.root), "--part", part]
            call += ["--config", json.dumps({"port": port, "verify": False, "warm": False})]
            env = {name: value for name, value in os.environ.items() if name != TOKEN}
            process = subprocess.Popen([sys.executable, *call], cwd=CHECKOUT, env=env, stdout=subprocess.DEVNULL)
            started.append(Served(process, f"http://127.0.0.1:{port}"))
        for served in started:
            until_ready(served.process, served.url)
        return started

    yield starts
    for served in started:
        served.process.kill()
        served.process.wait()


def ask(address: str, queries: list[str], top_k: int) -> list[list[tuple[str, float]]]:
    async def go() -> list[list[tuple[str, float]]]:
        async with RetrieverClient(address) as client:
            found = await client.search(queries, top_k)
            assert isinstance(found, list), found
            return [[(passage.id, round(passage.score, 4)) for passage in row] for row in found]

    return asyncio.run(go())


def test_two_parts_answer_as_the_whole_and_fail_together(start: object) -> None:
    whole, first, second = start("1/1", "1/2", "2/2")  # type: ignore[operator]
    rows = [httpx.get(f"{served.url}/info", trust_env=False).json()["rows"] for served in (whole, first, second)]
    assert rows == [ROWS, 100, 140]
    address = fleet.address([[first.url], [second.url]])
    found, wanted = ask(address, QUERIES, 3), ask(whole.url, QUERIES, 3)
    assert [[score for _, score in row] for row in found] == [[score for _, score in row] for row in wanted]
    assert [row[0] for row in found] == [row[0] for row in wanted]
    config = Config.model_validate({"retriever": {"urls": [[first.url], [second.url]]}})
    with command.running(config, Workspace(Path("/nowhere"))) as endpoint:
        assert endpoint.url == address
    second.process.kill()
    second.process.wait()

    async def half() -> object:
        async with RetrieverClient(address, timeout_s=1.0) as client:
            return await client.search(["Person1 Surname1"], 3)

    assert "cannot be reached" in str(asyncio.run(half()))


def test_a_killed_and_a_frozen_replica_cost_no_answer(start: object) -> None:
    replicas = start("1/1", "1/1", "1/1")  # type: ignore[operator]

    async def go() -> list[float]:
        seconds: list[float] = []
        async with RetrieverClient(fleet.address([served.url for served in replicas]), timeout_s=20.0) as client:
            for number, query in enumerate(f"{query} {turn}" for turn in range(3) for query in QUERIES):
                if number == 20:
                    replicas[0].process.kill()
                if number == 50:
                    replicas[1].process.send_signal(signal.SIGSTOP)
                started = time.monotonic()
                found = await client.search([query], 2)
                seconds.append(time.monotonic() - started)
                assert isinstance(found, list) and len(found[0]) == 2, (number, found)
        return seconds

    assert max(asyncio.run(go())) < 10
