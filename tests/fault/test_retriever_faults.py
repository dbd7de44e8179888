"""Episodes against the real retriever while it is spoiled, killed and frozen: all end, in bounded time, and each fault is counted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from research_rl.episode.agent import Limits, run_episode
from research_rl.episode.trajectory import StopReason, Trajectory
from research_rl.retriever.client import RetrieverClient
from research_rl.retriever.gate import Note, Patience, PauseGate
from tests.faulty import GARBAGE, Proxy, Retriever
from tests.knowledge import built
from tests.searching import Bytes, Engine

EPISODES, SEARCHES, OUT_S = 12, 3, 4.0
LONG_S, SHORT_S = 120.0, 1.5
"""Seconds a search may take: what no busy machine needs, and less than an outage lasts."""
GIVEN_UP_S = 60.0
"""Seconds after which the gate opens although searching does not work."""


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Retriever]:
    made = Retriever(built(tmp_path_factory.mktemp("knowledge")).root)
    yield made
    made.process.kill()
    made.process.wait()


Played = tuple[list[Trajectory], dict[str, int], list[Note], Proxy]


def play(
    retriever: Retriever, faults: Sequence[str] = (), act: Callable[[], None] | None = None, least: int = 99, timeout_s: float = LONG_S
) -> Played:
    """Play all episodes at once through a proxy; return them, the client's counts, the gate's notes and the proxy."""
    proxy, notes = Proxy(retriever.port, slow_s=0.4), list[Note]()
    proxy.plan.extend(faults)
    limits = Limits(3, SEARCHES, 256, 4096, wall_s=300.0, search_timeout_s=timeout_s)

    async def run() -> tuple[list[Trajectory], dict[str, int]]:
        async with RetrieverClient(proxy.url, timeout_s=timeout_s, connections=EPISODES) as client:
            gate = PauseGate(client.works, Patience(10.0, least, 0.3, GIVEN_UP_S), notes.append)
            engines = [Engine(f"e{n}x{time.monotonic_ns()}", SEARCHES, 0.05) for n in range(EPISODES)]
            episodes = (run_episode((1,), engine, client, Bytes(), limits, gate) for engine in engines)
            return list(await asyncio.gather(*episodes)), client.take_counts()

    thread = threading.Thread(target=act or (lambda: None))
    thread.start()
    trajectories, counts = asyncio.run(run())
    thread.join()
    proxy.shutdown()
    proxy.server_close()
    assert [trajectory.stop for trajectory in trajectories] == [StopReason.ANSWERED] * EPISODES
    assert all(len(trajectory.searches) == SEARCHES for trajectory in trajectories)
    return trajectories, counts, notes, proxy


def told(trajectories: Sequence[Trajectory]) -> Counter[Any]:
    return Counter(search.fault.value for trajectory in trajectories for search in trajectory.searches if search.fault)


@pytest.mark.parametrize("fault", [*GARBAGE, "nothing"])
def test_an_answer_without_sense_is_told_once_each(retriever: Retriever, fault: str) -> None:
    trajectories, counts, notes, proxy = play(retriever, [fault] * 5)
    kind = "nothing" if fault == "nothing" else "garbage"
    assert proxy.injected == {fault: 5} and told(trajectories) == {kind: 5} and notes == []
    assert counts.get("failed_tries/garbage", 0) == (0 if fault == "nothing" else 5)


@pytest.mark.parametrize(("fault", "kind"), [("busy", "busy"), ("server_error", "server_error")])
def test_a_refusal_that_passes_is_tried_again_and_never_told(retriever: Retriever, fault: str, kind: str) -> None:
    trajectories, counts, _, proxy = play(retriever, [fault] * 7)
    # Searches that wait for the trial of a replica share its refusal: each counts a failed try.
    assert proxy.injected == {fault: 7} and counts[f"failed_tries/{kind}"] >= 7 and told(trajectories) == {}
    assert proxy.received == EPISODES * SEARCHES + 7 and counts["tries"] == EPISODES * SEARCHES + counts[f"failed_tries/{kind}"]


def test_slow_answers_are_answers(retriever: Retriever) -> None:
    trajectories, counts, _, proxy = play(retriever, ["slow"] * 12)
    assert proxy.injected == {"slow": 12} and told(trajectories) == {} and counts["tries"] == EPISODES * SEARCHES
    assert proxy.most_slow > 1, "an episode waited for the slow answer of another"


@pytest.mark.parametrize("how", ["outage", "freeze"])
def test_an_outage_longer_than_a_search_may_last_costs_none(retriever: Retriever, how: str) -> None:
    trajectories, _, notes, _ = play(retriever, act=lambda: getattr(retriever, how)(OUT_S), least=4, timeout_s=SHORT_S)
    # A machine that stands still for longer than a search may last closes the gate once more; each closing must end by the probe.
    assert notes and [note.event for note in notes] == ["paused", "resumed"] * (len(notes) // 2)
    closings = [sum(note.faults.values()) for note in notes if note.event == "paused"]
    assert set(notes[0].faults) <= {"unreachable", "timeout"} and min(closings) >= 4
    assert sum(told(trajectories).values()) < sum(closings), "searches that closed the gate are asked again"
    assert 1 < max(trajectory.paused_seconds for trajectory in trajectories) < GIVEN_UP_S
