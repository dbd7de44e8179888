"""A retriever of several workers: one port, one index, and the loss of any of its processes costs no more than what that one had."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from research_rl.config import RetrieverConfig
from research_rl.paths import CHECKOUT
from research_rl.pipeline.stages import Workspace
from research_rl.process.services import free_port
from research_rl.retriever import TOKEN
from research_rl.retriever.retriever import Retriever
from tests.encoder_model import write_model, write_reranker
from tests.knowledge import built, until_ready
from tests.waiting import ended, until

ROWS, SECRET, WORKERS = 250, "a-secret", 2
HEADERS = {"Authorization": f"Bearer {SECRET}"}
CONFIG = {"workers": WORKERS, "cache_entries": 0, "log_requests": False, "follow_s": 0.2, "drain_s": 1000.0}


@dataclass
class Served:
    """A running service: its parent, the keeper below that, and below the keeper the workers."""

    process: psutil.Popen
    url: str

    def keepers(self) -> list[psutil.Process]:
        return children(self.process)

    def workers(self) -> list[psutil.Process]:
        return [child for keeper in self.keepers() for child in children(keeper)]

    def client(self, **more: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=HEADERS, trust_env=False, timeout=120, **more)

    def owners(self) -> Counter[int]:
        """How many connections each worker has, by pid."""
        port = httpx.URL(self.url).port
        owned = Counter[int]()
        for process in self.workers():
            with suppress(psutil.NoSuchProcess):
                owned[process.pid] += sum(one.laddr.port == port and bool(one.raddr) for one in process.net_connections("tcp"))
        return +owned


def children(process: psutil.Process) -> list[psutil.Process]:
    """Return the children that run, none when the process itself is gone."""
    with suppress(psutil.NoSuchProcess):
        return [child for child in process.children() if not ended(child.pid)]
    return []


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return built(tmp_path_factory.mktemp("workers"), ROWS, encoder={"dim": 256})


@pytest.fixture
def start(workspace: Workspace, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    with ExitStack() as ends:

        def starts(made: Workspace = workspace, **config: Any) -> Served:
            port = free_port()
            call = [sys.executable, "-m", "research_rl.retriever.command", "--workspace", str(made.root)]
            call += ["--config", json.dumps({"port": port, **CONFIG, **config})]
            log = tmp_path / "log"
            with log.open("ab") as output:
                process = psutil.Popen(call, cwd=CHECKOUT, env={**os.environ, TOKEN: SECRET}, stdout=output, stderr=output)
            ends.callback(end, process)
            served = Served(process, f"http://127.0.0.1:{port}")
            until_ready(process, served.url)
            # What answered until the index was open has ended.
            assert until(lambda: len(served.keepers()) == 1)
            return served

        yield starts


def end(process: psutil.Popen) -> None:
    every = [process, *process.children(recursive=True)] if process.is_running() else []
    for one in every:
        if one.is_running():
            one.kill()
    process.wait()


def search(client: httpx.Client, number: int = 7) -> httpx.Response:
    return client.post("/search", json={"query": f"Person{number} Surname{number}", "top_n": 1})


def found(client: httpx.Client, number: int = 7) -> bool:
    response = search(client, number)
    assert response.status_code == 200, response.text
    return bool(response.json()[0]["id"] == f"p{number}")


def test_connections_are_shared_and_each_worker_guards_the_door(start: Callable[..., Served]) -> None:
    served = start()
    with ExitStack() as open_clients:
        clients = [open_clients.enter_context(served.client()) for _ in range(8)]
        assert all(found(client) for client in clients)
        owners = served.owners()
        assert owners.total() == 8 and set(owners) == {worker.pid for worker in served.workers()}
        # On connections to both: what keeps strangers out does not depend on who answers.
        for client in clients:
            assert client.post("/search", json={"query": "a"}, headers={"Authorization": "Bearer other"}).status_code == 401
            assert client.get("/info", headers={"Host": "elsewhere.example"}).status_code == 421
            assert client.get("/health").json()["retrievers"]["total"] == WORKERS
            assert client.get("/info").json()["rows"] == ROWS
        assert served.owners() == owners


KINDS: dict[str, dict[str, Any]] = {
    "an exact scan": {"index": {"factory": "Exact"}},
    "codes and full vectors": {"index": {"factory": "RR32,RaBitQfs", "refine": True, "candidates": 50}},
    "words and vectors": {"index": {"kind": "hybrid", "factory": "Flat"}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_and_indexes_of_each_kind_answer_after_a_fork_as_in_one_process(
    start: Callable[..., Served], tmp_path: Path, kind: str
) -> None:
    write_model(tmp_path / "encoder")
    write_reranker(tmp_path / "reranker")
    tree = KINDS[kind] | {"encoder": {"kind": "sentence", "model": str(tmp_path / "encoder")}}
    if kind == "an exact scan":
        tree |= {"reranker": {"kind": "cross-encoder", "model": str(tmp_path / "reranker"), "candidates": 20}}
    made = built(tmp_path / "made", ROWS, **tree)
    queries = [f"Person{n} Surname{n} lives in the city" for n in range(24)]
    # Several threads, of OpenMP and of pools, on both sides of the fork.
    config = RetrieverConfig(warm=True, threads=3)
    expected = [[passage.id for passage in found] for found in Retriever.open(made, config).search(queries, 5)]
    served = start(made, warm=True, threads=3)
    with ExitStack() as open_clients:
        clients = [open_clients.enter_context(served.client()) for _ in range(4)]
        assert all(client.get("/readyz").status_code == 200 for client in clients)
        assert len(served.owners()) == WORKERS
        with ThreadPoolExecutor(4) as pool:
            for response in pool.map(lambda client: client.post("/batch_search", json={"query": queries, "top_n": 5}), clients * 5):
                assert response.status_code == 200, response.text
                assert [[passage["id"] for passage in found] for found in response.json()] == expected


def counted(client: httpx.Client, name: str) -> float:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"retriever_{name} ")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_counts_are_those_of_all_workers_and_outlive_one(start: Callable[..., Served]) -> None:
    served = start()
    searches = 'requests_total{route="/search",status="200"}'
    with ExitStack() as open_clients:
        clients = [open_clients.enter_context(served.client()) for _ in range(4)]
        for number in range(40):
            assert found(clients[number % 4], number)
        assert len(served.owners()) == WORKERS
        assert [counted(client, searches) for client in clients] == [40] * 4
        assert [counted(client, "ready") for client in clients] == [1] * 4
        served.workers()[0].kill()
        assert until(lambda: len(served.workers()) == WORKERS and set(served.owners()) <= {worker.pid for worker in served.workers()})
    with served.client() as client:
        assert counted(client, searches) == 40 and counted(client, "queries_total") == 40
        assert found(client)
        assert counted(client, searches) == 41


async def asking(served: Served, over: asyncio.Event, seconds: list[float]) -> Counter[str]:
    """Ask until `over`, each time by the connection at hand; return how often what came."""
    seen = Counter[str]()
    async with httpx.AsyncClient(base_url=served.url, headers=HEADERS, trust_env=False, timeout=120) as client:
        while not over.is_set():
            began = time.monotonic()
            try:
                response = await client.post("/batch_search", json={"query": ["Person7 Surname7"] * 3, "top_n": 2})
                seen[str(response.status_code)] += 1
            except httpx.TransportError as error:
                seen[type(error).__name__] += 1
            seconds.append(time.monotonic() - began)
    return seen


async def until_more(seconds: Sequence[float], requests: int = 40) -> None:
    """Return once as many further requests were answered: how long a busy machine takes for them is no property of the code."""
    goal = len(seconds) + requests
    assert await asyncio.to_thread(until, lambda: len(seconds) >= goal)


async def under_load(served: Served, act: Callable[[], object], clients: int = 8) -> tuple[Counter[str], list[float]]:
    """Do something in the middle of load; return what came, and after how many seconds each."""
    over, seconds = asyncio.Event(), list[float]()
    tasks = [asyncio.create_task(asking(served, over, seconds)) for _ in range(clients)]
    try:
        await until_more(seconds)
        await asyncio.to_thread(act)
        await until_more(seconds)
    finally:
        over.set()
    return sum([await task for task in tasks], Counter()), seconds


def test_a_killed_worker_costs_what_it_had_and_is_replaced(start: Callable[..., Served]) -> None:
    served = start()
    before = {worker.pid for worker in served.workers()}
    victim = min(before)

    had = list[int]()

    def kill() -> None:
        had.append(served.owners()[victim])
        os.kill(victim, signal.SIGKILL)
        assert until(lambda: len(served.workers()) == WORKERS)
        with served.client() as client:
            assert until(lambda: client.get("/health").json()["retrievers"]["total"] == WORKERS)

    seen, seconds = asyncio.run(under_load(served, kill))
    # Each connection to it had one request under way at the most.
    assert seen.total() - seen["200"] <= had[0] < 8, (seen, had)
    assert seen["200"] > 50 and max(seconds) < 30
    after = {worker.pid for worker in served.workers()}
    assert len(after & before) == 1 and victim not in after
    with served.client() as client:
        assert found(client)


def test_a_killed_keeper_costs_nothing(start: Callable[..., Served]) -> None:
    served = start()
    keeper = served.keepers()[0]

    def kill() -> None:
        keeper.kill()
        assert until(lambda: len(served.workers()) == WORKERS)

    seen, _ = asyncio.run(under_load(served, kill))
    assert set(seen) == {"200"}
    assert [other.pid for other in served.keepers()] != [keeper.pid]
    # The new ones can be replaced as the first could.
    os.kill(served.workers()[0].pid, signal.SIGKILL)
    assert until(lambda: len(served.workers()) == WORKERS)
    with served.client() as client:
        assert found(client)


@pytest.mark.parametrize("everyone", [False, True], ids=["the parent", "every process"])
def test_a_signal_drains_all(start: Callable[..., Served], everyone: bool) -> None:
    served = start(max_batch=1)
    every = [served.process, *served.process.children(recursive=True)]
    body = {"query": [f"Person{n % ROWS} asked {n}" for n in range(1000)], "top_n": 5}
    clients = [served.client() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert all(found(client) for client in clients)
        assert len(served.owners()) == WORKERS
        answers = [pool.submit(client.post, "/batch_search", json=body) for client in clients]
        with served.client() as client:
            assert until(lambda: counted(client, "active_requests") >= 5)
            # A guardian or a container signals all processes, and that is no second signal.
            for process in every if everyone else every[:1]:
                # The parent, which is the first, may have ended others already.
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGTERM)
            late = search(client)
        assert late.status_code in (200, 503)
        for answer in answers:
            response = answer.result()
            assert response.status_code == 200 and len(response.json()) == len(body["query"])
    assert served.process.wait(60) == -signal.SIGTERM
    # A worker is known to have ended when its last file is closed, which is a moment before the process is gone.
    assert until(lambda: all(ended(process.pid) for process in every))
    for client in clients:
        client.close()


def test_nothing_outlives_a_killed_parent(start: Callable[..., Served]) -> None:
    served = start(drain_s=1.0)
    every = [*served.keepers(), *served.workers()]
    assert len(every) == 1 + WORKERS
    served.process.kill()
    assert until(lambda: all(ended(process.pid) for process in every))


def test_a_file_that_is_cut_short_ends_the_service_with_the_reason(tmp_path: Path) -> None:
    own = built(tmp_path / "own", ROWS, encoder={"dim": 256})
    log = tmp_path / "cut"
    call = [sys.executable, "-m", "research_rl.retriever.command", "--workspace", str(own.root)]
    port = free_port()
    call += ["--config", json.dumps({"port": port, **CONFIG})]
    with log.open("wb") as output:
        process = subprocess.Popen(call, cwd=CHECKOUT, env={**os.environ, TOKEN: SECRET}, stdout=output, stderr=output)
    try:
        until_ready(process, f"http://127.0.0.1:{port}")
        path = next(own.folder("corpus").glob("passages-*.arrow"))
        os.truncate(path, path.stat().st_size - 1)
        assert process.wait(60) == 1
    finally:
        process.kill()
        process.wait()
    assert re.search(r"was cut to [0-9,]+ bytes of [0-9,]+ while it was served", log.read_text())


def test_what_cannot_be_opened_ends_the_start_with_the_reason(tmp_path: Path) -> None:
    call = [sys.executable, "-m", "research_rl.retriever.command", "--workspace", str(tmp_path)]
    call += ["--config", json.dumps({"port": free_port(), **CONFIG})]
    env = {name: value for name, value in os.environ.items() if name != TOKEN}
    done = subprocess.run(call, capture_output=True, text=True, cwd=CHECKOUT, timeout=120, env=env)
    assert done.returncode == 1
    assert str(tmp_path / "artifacts") in done.stderr and "Traceback" not in done.stderr
