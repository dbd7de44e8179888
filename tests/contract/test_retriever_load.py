"""Many episodes at once before the real service: a slow one is waited for, a failing one pauses the searches until it works."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import httpx
import pytest

from research_rl.config import RetrieverConfig
from research_rl.episode.agent import Limits, SearchFailure, run_episode
from research_rl.episode.trajectory import Passage, SearchFault, StopReason
from research_rl.retriever.client import RetrieverClient
from research_rl.retriever.gate import Note, Patience, PauseGate
from tests.searching import Bytes, Engine, served

EPISODES = 256
SEARCH_S = 4.0
"""How long a search may be tried: enough for a busy machine to answer one that works."""


class Slow:
    """Takes a second for a search, whatever its size, and remembers the sizes."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        self.sizes.append(len(queries))
        time.sleep(1.0)
        return [[Passage("1", query, 1.0)] for query in queries]


@pytest.mark.parametrize(("max_batch", "largest"), [(64, 64), (512, 65)])
def test_a_slow_healthy_service_gets_large_batches_and_no_timeout(max_batch: int, largest: int) -> None:
    slow, notes = Slow(), list[Note]()

    async def run(url: str) -> tuple[list[StopReason | None], dict[str, int], str]:
        limits = Limits(1, 1, 64, 2048, wall_s=900.0, search_timeout_s=250.0)
        async with RetrieverClient(url, timeout_s=250.0, connections=EPISODES) as client:
            gate = PauseGate(client.works, Patience(10.0, 8, 0.3, 60.0), notes.append)
            episodes = (run_episode((1,), Engine(f"e{n}", 1), client, Bytes(), limits, gate) for n in range(EPISODES))
            stops = [trajectory.stop for trajectory in await asyncio.gather(*episodes)]
            return stops, client.take_counts(), client._parts[0].replicas[0].state

    with served(slow, max_batch=max_batch) as url:
        stops, counts, state = asyncio.run(run(url))
    assert stops == [StopReason.ANSWERED] * EPISODES
    assert counts == {"asked": EPISODES, "tries": EPISODES} and state == "closed" and notes == []
    assert max(slow.sizes) >= largest, slow.sizes


def test_a_whole_question_set_in_one_request_is_answered_in_order() -> None:
    """FlashRAG's pipelines send all questions of 2WikiMultihopQA's development set at once; the defaults must take them."""
    sizes, queries = list[int](), [f"question {n}" for n in range(12_576)]

    def answers(batch: Sequence[str], top_k: int) -> list[list[Passage]]:
        sizes.append(len(batch))
        return [[Passage(str(k), f"{query} {k}", 1.0 / (1 + k)) for k in range(top_k)] for query in batch]

    with served(answers) as url:
        reply = httpx.post(f"{url}/batch_search", json={"query": queries, "top_n": 5}, trust_env=False, timeout=300)
    assert reply.status_code == 200, reply.text[:200]
    assert [[hit["contents"] for hit in row] for row in reply.json()] == [[f"{query} {k}" for k in range(5)] for query in queries]
    assert max(sizes) == RetrieverConfig().max_batch and sum(sizes) == len(queries)


def test_waiting_for_a_connection_is_bounded_and_no_failure_of_the_replica() -> None:
    asked, answer = threading.Event(), threading.Event()

    def waits(queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        asked.set()
        assert answer.wait(60)
        return [[Passage("1", query, 1.0)] for query in queries]

    async def run(url: str) -> None:
        async with RetrieverClient(url, timeout_s=60.0, connections=1) as client:
            first = asyncio.create_task(client.search(["on the wire"], 1))
            assert await asyncio.to_thread(asked.wait, 30)
            client.timeout_s = 0.2
            second = await client.search(["waits its turn"], 1)
            assert isinstance(second, SearchFailure) and second.fault is SearchFault.NO_CONNECTION
            assert second.reason == "none of this client's 1 connections was free in 0.2 s"
            client.timeout_s = 60.0
            third = asyncio.create_task(client.search(["waits its turn"], 1))
            answer.set()
            assert [isinstance(await search, list) for search in (first, third)] == [True, True]
            assert client._parts[0].replicas[0].state == "closed"
            assert client.take_counts() == {"asked": 3, "tries": 2, "no_connection": 1}

    with served(waits) as url:
        asyncio.run(run(url))


class Failing:
    """Raises for every search until `mended` is set; `searches` counts the calls."""

    def __init__(self) -> None:
        self.mended, self.probed, self.searches = threading.Event(), threading.Event(), 0

    def __call__(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        self.searches += 1
        if any("is the retriever there" in query for query in queries):
            self.probed.set()
        if not self.mended.is_set():
            raise OSError("the disk of the index is gone")
        return [[Passage("1", query, 1.0)] for query in queries]


def test_a_service_that_is_up_but_fails_every_search_stays_paused_until_it_answers_one() -> None:
    """Twice, because an answer that was kept from before the second outage must not end the pause."""
    failing, notes = Failing(), list[Note]()
    failing.mended.set()

    async def outage(gate: PauseGate, client: RetrieverClient, name: str) -> None:
        limits = Limits(1, 2, 64, 2048, wall_s=600.0, search_timeout_s=SEARCH_S)
        failing.mended.clear()
        episodes = [run_episode((1,), Engine(f"{name}{n}", 2), client, Bytes(), limits, gate) for n in range(8)]
        playing = asyncio.gather(*episodes)
        for _ in range(3):
            failing.probed.clear()
            assert await asyncio.to_thread(failing.probed.wait, 120)
            assert gate.closed and [note.event for note in notes][-1] == "paused"
        failing.mended.set()
        trajectories = await playing
        assert [trajectory.stop for trajectory in trajectories] == [StopReason.ANSWERED] * 8
        failed = sum(search.fault is not None for trajectory in trajectories for search in trajectory.searches)
        assert failed < 8, "the search that closed the pause gate is asked again after it, and none was asked while it was closed"

    async def run(url: str) -> None:
        async with RetrieverClient(url, timeout_s=SEARCH_S, connections=8) as client:
            gate = PauseGate(client.works, Patience(30.0, 8, 0.3, 60.0), notes.append)
            client.timeout_s = 30.0
            assert await client.works()
            client.timeout_s = SEARCH_S
            health = await client.health()
            assert not isinstance(health, SearchFailure) and health["status"] == "healthy", "the service says that it is up"
            for name in ("first", "second"):
                await outage(gate, client, name)

    with served(failing) as url:
        asyncio.run(run(url))
    assert [note.event for note in notes] == ["paused", "resumed"] * 2
    assert [sum(note.faults.values()) for note in notes] == [8] * 4, "eight failed searches close the gate"
