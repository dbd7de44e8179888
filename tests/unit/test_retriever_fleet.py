"""Failing replicas are left alone until a probe and a search succeed; slow ones are hedged; addresses read back as written."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine

import pytest

from research_rl.episode.trajectory import Passage
from research_rl.retriever import fleet
from research_rl.retriever.client import merged
from research_rl.retriever.fleet import Part, Replica


class Down(Exception):
    """A replica does not answer."""


async def well(url: str) -> bool:
    return True


def test_addresses_read_back_as_written() -> None:
    assert fleet.parts(fleet.address(["http://a/", "http://b"])) == [["http://a", "http://b"]]
    assert fleet.parts(fleet.address([["http://a", "http://b"], ["http://c"]])) == [["http://a", "http://b"], ["http://c"]]
    assert fleet.parts("http://a/") == [["http://a"]] and fleet.parts("") == []


def test_a_breaker_opens_after_three_failures_and_closes_after_one_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    replica = Replica("http://a")
    replica.failed()
    replica.failed()
    assert replica.usable
    replica.failed()
    assert (replica.state, replica.usable, replica.due) == ("open", False, False)
    now += 1.1
    assert replica.due and not replica.usable
    replica.probed(True)
    assert (replica.state, replica.usable) == ("half_open", True)
    replica.failed()
    assert replica.state == "open"
    now += 1.0  # the second rest is longer: between one and two seconds
    assert not replica.due or replica._rest > 2
    now += 1.1
    replica.probed(True)
    replica.succeeded(0.1)
    assert replica.state == "closed" and replica.usable


def run(urls: list[str], asks: Callable[[str], Coroutine[None, None, str]], times: int = 1) -> tuple[list[str], Part[str]]:
    async def go() -> tuple[list[str], Part[str]]:
        part: Part[str] = Part(urls, well)
        found: list[str] = []
        for _ in range(times):
            try:
                found.append(await part.ask(asks, Down))
            except Down:
                found.append("down")
        return found, part

    return asyncio.run(go())


def test_a_dead_replica_costs_no_answer_and_is_soon_left_alone() -> None:
    asked: list[str] = []

    async def ask(url: str) -> str:
        asked.append(url)
        if url == "dead":
            raise Down
        return url

    found, _ = run(["dead", "good"], ask, 40)
    assert found == ["good"] * 40
    assert 1 <= asked.count("dead") <= 4


def test_when_all_fail_the_last_failure_is_told_and_all_are_asked_again_later() -> None:
    async def ask(url: str) -> str:
        raise Down

    found, part = run(["a", "b"], ask, 5)
    assert found == ["down"] * 5
    assert {replica.state for replica in part.replicas} == {"open"}


def test_a_slow_answer_is_overtaken_by_a_second_replica() -> None:
    slow = True

    async def ask(url: str) -> str:
        if url == "slow" and slow:
            await asyncio.sleep(5)
        return url

    async def go() -> list[float]:
        nonlocal slow
        part: Part[str] = Part(["slow", "quick"], well)
        slow = False
        for _ in range(60):
            await part.ask(ask, Down)
        slow, seconds = True, list[float]()
        for _ in range(10):
            started = time.monotonic()
            assert await part.ask(ask, Down) == "quick"
            seconds.append(time.monotonic() - started)
        await asyncio.sleep(0.1)  # those that were overtaken are cancelled, which takes a turn of the loop
        assert all(replica.flying == 0 for replica in part.replicas)
        return seconds

    assert max(asyncio.run(go())) < 2


def test_parts_are_merged_by_score() -> None:
    left = [[Passage("a", "x", 0.9), Passage("b", "x", 0.2)], []]
    right = [[Passage("c", "x", 0.5)], [Passage("d", "x", 0.1)]]
    assert [[passage.id for passage in row] for row in merged([left, right], 2)] == [["a", "c"], ["d"]]
