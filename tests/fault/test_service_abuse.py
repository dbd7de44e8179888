"""The retriever under abuse: malformed requests by schema and by byte, 64 clients at once, SIGTERM in the middle of load.

Holds: no answer of 5xx but a deliberate 503 with Retry-After; the service lives; its memory stays; no accepted request is
lost. A sample runs by default, the long form with the marker `long`.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from research_rl.paths import CHECKOUT
from research_rl.process.services import free_port
from research_rl.retriever import TOKEN
from tests.abuse import MIB, by_bytes, by_schema, deliberate, mutations
from tests.knowledge import built, until_ready

PATHS = ("/search", "/batch_search", "/retrieve")
NAMES = ("query", "queries", "top_n", "topk", "return_score", "return_scores", "timeout_s", "z")
CONFIG = {"max_batch": 16, "max_queue": 48, "cache_entries": 200, "drain_s": 20.0, "verify": False}


@dataclass
class Served:
    """A running service."""

    process: psutil.Popen
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def mib(self) -> float:
        return self.process.memory_full_info().uss / MIB


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("abuse")
    built(root, 250, encoder={"dim": 128})
    return root


@pytest.fixture
def served(root: Path) -> Iterator[Served]:
    port = free_port()
    call = ["-m", "research_rl.retriever.command", "--workspace", str(root), "--config", json.dumps({"port": port, **CONFIG})]
    env = {name: value for name, value in os.environ.items() if name != TOKEN}
    with (root / "log").open("ab") as log:
        few_files = ["sh", "-c", 'ulimit -n 1024; exec "$0" "$@"', sys.executable, *call]
        process = psutil.Popen(few_files, cwd=CHECKOUT, env=env, stdout=subprocess.DEVNULL, stderr=log)
    made = Served(process, port)
    try:
        until_ready(made.process, made.url)
        yield made
    finally:
        if process.is_running():
            process.kill()
        process.wait()


def well(served: Served) -> None:
    """The service still answers a search rightly."""
    answer = httpx.post(f"{served.url}/search", json={"query": "Person7 Surname7"}, timeout=60, trust_env=False)
    assert answer.status_code == 200 and answer.json()[0]["id"] == "p7"


def abused(served: Served, examples: int, count: int) -> Counter[int]:
    well(served)
    asyncio.run(by_bytes(served.port, mutations(PATHS, NAMES, 1), 200))
    before = served.mib()
    statuses = by_schema(served.url, examples) + asyncio.run(by_bytes(served.port, mutations(PATHS, NAMES, 2), count))
    assert served.process.poll() is None
    well(served)
    assert served.mib() - before < 64
    return statuses


def test_malformed_requests_are_refused_and_harm_nobody(served: Served) -> None:
    statuses = abused(served, 25, 400)
    assert statuses.total() > 500 and statuses[422] > 50 and statuses[200] > 0, statuses


@pytest.mark.long
def test_ten_thousand_malformed_requests(served: Served) -> None:
    statuses = abused(served, 1000, 6000)
    print(f"\n{statuses.total()} requests: {dict(statuses)}; {served.mib():.0f} MiB")
    assert statuses.total() >= 10_000


async def clients(port: int, number: int, seconds: float, counts: Counter[Any]) -> None:
    """Search with `number` clients at once, as fast as they are answered; count statuses, and what was not answered: by its
    error when sent before `counts["signalled"]` was set, else as refused.
    """
    until = time.monotonic() + seconds

    async def one(name: int) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            turn = 0
            while time.monotonic() < until:
                turn += 1
                size = 1 + (name + turn) % 3
                body = {"query": [f"Person{(name * turn + item) % 250} {name} {turn}" for item in range(size)], "top_n": 3}
                late = counts["signalled"]
                try:
                    answer = await client.post("/batch_search", json=body)
                except httpx.TransportError as error:
                    counts["refused" if late else type(error).__name__] += 1
                    return
                counts[answer.status_code] += 1
                assert deliberate(answer.status_code, answer.headers) and answer.status_code in (200, 503), answer.text
                if answer.status_code == 200:
                    assert len(answer.json()) == size
                else:
                    await asyncio.sleep(0.05)

    await asyncio.gather(*(one(name) for name in range(number)))


def soak(served: Served, seconds: float) -> tuple[Counter[Any], list[float]]:
    """Load the service in four parts of equal length, longer where a busy machine answers little; return all counts and its memory."""
    counts: Counter[Any] = Counter()
    memory: list[float] = []
    for _ in range(4):
        goal = counts[200] + 16
        for _ in range(30):
            asyncio.run(clients(served.port, 64, seconds / 4, counts))
            if counts[200] >= goal:
                break
        memory.append(served.mib())
    return counts, memory


def test_64_clients_are_each_answered_and_memory_stays(served: Served) -> None:
    counts, memory = soak(served, 8.0)
    assert set(counts) <= {200, 503} and counts[200] > 50, counts
    assert memory[-1] - memory[0] < 32, memory


@pytest.mark.long
def test_64_clients_for_minutes(served: Served) -> None:
    counts, memory = soak(served, 240.0)
    print(f"\n{dict(counts)}; MiB after each minute: {[round(value, 1) for value in memory]}")
    assert set(counts) <= {200, 503}
    assert memory[-1] - memory[1] < 8, memory


def test_sigterm_under_load_loses_no_accepted_request(served: Served) -> None:
    counts: Counter[Any] = Counter()

    async def go() -> None:
        load = asyncio.create_task(clients(served.port, 32, 60.0, counts))
        while counts[200] < 100 and not load.done():
            await asyncio.sleep(0.01)
        served.process.send_signal(signal.SIGTERM)
        counts["signalled"] = 1
        await load

    asyncio.run(go())
    assert set(counts) <= {200, 503, "refused", "signalled"} and counts[200] >= 100 and counts["refused"] == 32, counts
    assert served.process.wait(30) in (0, -signal.SIGTERM)


def test_a_slow_sender_costs_only_itself(served: Served) -> None:
    head = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 400\r\n\r\n{"
    slow = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(100)]
    for connection in slow:
        connection.sendall(head)
    well(served)
    with slow[0].makefile("rb") as answer:
        slow[0].settimeout(30)
        assert b" 408 " in answer.readline()
    for connection in slow:
        connection.close()
    well(served)


def test_connections_that_never_finish_their_headers_keep_nobody_out(served: Served) -> None:
    """More of them than the service may have files open: the oldest give way, and each is closed after its deadline."""
    ours = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, ours[1]), ours[1]))
    slow: list[socket.socket] = []
    try:
        for _ in range(1100):
            slow.append(socket.create_connection(("127.0.0.1", served.port), timeout=30))
            slow[-1].sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nX: ")
        started = time.monotonic()
        well(served)
        assert time.monotonic() - started < 10
        assert served.process.num_fds() < 1024
        assert b" 408 " in slow[-1].makefile("rb").readline(), "the newest is closed by its deadline"
    finally:
        for connection in slow:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, ours)
    well(served)


def test_an_index_file_cut_short_ends_the_service_with_the_reason(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "artifacts", tmp_path / "artifacts")
    call = ["-m", "research_rl.retriever.command", "--workspace", str(tmp_path), "--config", json.dumps({"port": free_port(), **CONFIG})]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, *call], cwd=CHECKOUT, stdout=log, stderr=log)
    try:
        until_ready(process, f"http://127.0.0.1:{json.loads(call[-1])['port']}")
        os.truncate(next((tmp_path / "artifacts" / "corpus").glob("*.arrow")), 64)
        assert process.wait(30) == 1
    finally:
        process.kill()
    assert "was cut to 64 bytes" in (tmp_path / "log").read_text()
