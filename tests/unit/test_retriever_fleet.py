"""Failing replicas are left alone until a probe and a trial search succeed; slow ones are hedged; addresses read back as written."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine

import pytest

from research_rl.episode.trajectory import Passage, SearchFault
from research_rl.retriever import fleet
from research_rl.retriever.client import merged
from research_rl.retriever.fleet import IndexPart, Replica, ReplicaError

Send = Callable[[str], Coroutine[None, None, str]]


def down() -> ReplicaError:
    return ReplicaError("does not answer", SearchFault.UNREACHABLE)


async def healthy(url: str) -> bool:
    return True


def test_addresses_read_back_as_written() -> None:
    assert fleet.parts(fleet.address(["http://a/", "http://b"])) == [["http://a", "http://b"]]
    assert fleet.parts(fleet.address([["http://a", "http://b"], ["http://c"]])) == [["http://a", "http://b"], ["http://c"]]
    assert fleet.parts("http://a/") == [["http://a"]] and fleet.parts("") == []


def test_a_breaker_opens_after_three_failures_rests_longer_each_time_and_closes_after_one_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(fleet.random, "uniform", lambda least, most: most)
    replica = Replica("http://a")
    replica.failed(trial=False)
    replica.failed(trial=False)
    assert replica.usable
    replica.failed(trial=False)
    assert (replica.state, replica.usable, replica.due) == ("open", False, False)
    now += 0.9
    assert not replica.due
    now += 0.2
    assert replica.due and not replica.usable
    replica.probed(True)
    assert (replica.state, replica.usable) == ("half_open", True)
    replica.failed(trial=True)
    assert replica.state == "open"
    now += 1.1
    assert not replica.due, "the second rest lasts two seconds, not one"
    now += 1.0
    assert replica.due
    replica.probed(True)
    replica.succeeded(0.1)
    assert replica.state == "closed" and replica.usable


def test_searches_that_were_in_flight_when_a_replica_died_make_its_rest_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet.random, "uniform", lambda least, most: most)
    replica = Replica("http://a")
    for _ in range(256):
        replica.failed(trial=False)
    assert replica.until - time.monotonic() < 1.1


def run(urls: list[str], send: Send, times: int = 1) -> tuple[list[str], IndexPart[str]]:
    async def go() -> tuple[list[str], IndexPart[str]]:
        part: IndexPart[str] = IndexPart(urls, healthy)
        answers: list[str] = []
        for _ in range(times):
            try:
                answers.append(await part.ask(send))
            except ReplicaError:
                answers.append("down")
        return answers, part

    return asyncio.run(go())


def test_a_dead_replica_costs_no_answer_and_is_soon_left_alone() -> None:
    asked: list[str] = []

    async def send(url: str) -> str:
        asked.append(url)
        if url == "dead":
            raise down()
        return url

    answers, _ = run(["dead", "good"], send, 40)
    assert answers == ["good"] * 40
    assert 1 <= asked.count("dead") <= 4


def test_when_all_fail_the_last_failure_is_told_and_all_are_asked_again_later() -> None:
    asked: list[str] = []

    async def send(url: str) -> str:
        asked.append(url)
        raise down()

    answers, part = run(["a", "b"], send, 5)
    assert answers == ["down"] * 5 and len(asked) >= 7
    assert {replica.state for replica in part.replicas} == {"open"}


@pytest.mark.parametrize("urls", [["recovering"], ["recovering", "good"]])
def test_a_half_open_breaker_lets_one_trial_through(urls: list[str]) -> None:
    """The others ask another replica, or wait for the trial where there is none; once it succeeded all may go."""
    waiting, trial_may_end = 0, asyncio.Event()

    async def send(url: str) -> str:
        nonlocal waiting
        if url == "recovering":
            waiting += 1
            await trial_may_end.wait()
            waiting -= 1
        return url

    async def go() -> list[str]:
        part: IndexPart[str] = IndexPart(urls, healthy)
        part.replicas[0].state = "half_open"
        searches = [asyncio.create_task(part.ask(send)) for _ in range(30)]
        for _ in range(20):
            await asyncio.sleep(0)
        assert waiting == 1
        trial_may_end.set()
        answers = await asyncio.gather(*searches)
        assert part.replicas[0].state == "closed"
        return answers

    answers = asyncio.run(go())
    assert answers.count("recovering") == (30 if len(urls) == 1 else 1)


def test_searches_that_waited_for_a_failed_trial_fail_with_it() -> None:
    asked = 0

    async def send(url: str) -> str:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.01)
        raise down()

    async def go() -> list[str | BaseException]:
        part: IndexPart[str] = IndexPart(["a"], healthy)
        part.replicas[0].state = "half_open"
        return await asyncio.gather(*(part.ask(send) for _ in range(30)), return_exceptions=True)

    failures = asyncio.run(go())
    assert all(isinstance(failure, ReplicaError) and failure.fault is SearchFault.UNREACHABLE for failure in failures)
    assert asked == 1


def test_a_trial_whose_caller_left_frees_the_next_one() -> None:
    async def go() -> str:
        part: IndexPart[str] = IndexPart(["a"], healthy)
        part.replicas[0].state = "half_open"
        blocked = asyncio.create_task(part.ask(forever))
        await asyncio.sleep(0)
        after = asyncio.create_task(part.ask(at_once))
        await asyncio.sleep(0)
        blocked.cancel()
        return await after

    async def forever(url: str) -> str:
        await asyncio.Event().wait()
        return url

    async def at_once(url: str) -> str:
        return url

    assert asyncio.run(go()) == "a"


def test_what_is_late_is_said_by_the_quickest_replica_not_by_the_slow_one() -> None:
    part: IndexPart[str] = IndexPart(["slow", "quick"], healthy)
    slow, quick = part.replicas
    for _ in range(100):
        slow.succeeded(5.0)
        quick.succeeded(0.1)
    assert part._hedge_delay() == 0.1


def test_a_slow_answer_is_overtaken_by_a_second_replica() -> None:
    slow = False

    async def send(url: str) -> str:
        if url == "slow" and slow:
            await asyncio.Event().wait()
        return url

    async def go() -> None:
        nonlocal slow
        part: IndexPart[str] = IndexPart(["slow", "quick"], healthy)
        for _ in range(60):
            await part.ask(send)
        slow = True
        async with asyncio.timeout(20):
            for _ in range(10):
                assert await part.ask(send) == "quick"
        assert all(replica.in_flight == 0 for replica in part.replicas) and part.hedges > 0

    asyncio.run(go())


def test_a_replica_that_stands_still_is_left_alone_after_three_searches() -> None:
    still = False

    async def send(url: str) -> str:
        if url == "frozen" and still:
            await asyncio.Event().wait()
        return url

    async def down(url: str) -> bool:
        return False

    async def go() -> tuple[set[str], int]:
        nonlocal still
        part: IndexPart[str] = IndexPart(["frozen", "quick"], down)
        for _ in range(60):
            await part.ask(send)
        still, before = True, part.hedges
        async with asyncio.timeout(120):
            answers = {await part.ask(send) for _ in range(100)}
        return answers, part.hedges - before

    assert asyncio.run(go()) == ({"quick"}, 3), "each search after the third would cost a second request, of which there are ten"


def test_a_fleet_that_is_slow_as_a_whole_gets_few_second_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "_HEDGE_BEFORE_S", 0.001)
    requests = 0

    async def send(url: str) -> str:
        nonlocal requests
        requests += 1
        await asyncio.sleep(0.02)
        return url

    monkeypatch.setattr(fleet, "_HEDGE_FROM", 1000)
    answers, part = run(["a", "b"], send, 60)
    assert answers.count("down") == 0 and requests == 60 + part.hedges
    assert part.hedges <= 10 + 0.1 * 60


def test_parts_are_merged_by_score() -> None:
    left = [[Passage("a", "x", 0.9), Passage("b", "x", 0.2)], []]
    right = [[Passage("c", "x", 0.5)], [Passage("d", "x", 0.1)]]
    assert [[passage.id for passage in row] for row in merged([left, right], 2)] == [["a", "c"], ["d"]]
