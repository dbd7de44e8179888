"""The batcher joins what waits, bounds its queue, and lets no caller's fate touch another's."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

from research_rl.episode.trajectory import Passage
from research_rl.retriever.batching import Busy, Late, MicroBatcher


class Searches:
    """A search that waits for leave and records what it was asked."""

    def __init__(self) -> None:
        self.go, self.entered, self.batches = threading.Event(), threading.Event(), list[list[str]]()

    def __call__(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        self.batches.append(list(queries))
        self.entered.set()
        assert self.go.wait(10)
        if "bad" in queries:
            raise ValueError("no such word")
        return [[Passage(f"{query}-{n}", query) for n in range(top_k)] for query in queries]


async def entered(searches: Searches) -> None:
    await asyncio.to_thread(searches.entered.wait, 10)


def ids(found: list[list[Passage]]) -> list[list[str]]:
    return [[passage.id for passage in passages] for passages in found]


def test_what_waits_is_searched_together_once_each() -> None:
    async def check() -> None:
        searches = Searches()
        batcher = MicroBatcher(searches, max_batch=3, max_queue=100)
        first = asyncio.create_task(batcher.search(["a"], 1))
        await entered(searches)
        assert not batcher.idle
        rest = [asyncio.create_task(batcher.search(queries, k)) for queries, k in ((["b", "c"], 2), (["b"], 1), (["d"], 1))]
        await asyncio.sleep(0.05)
        searches.go.set()
        assert ids((await first)[0]) == [["a-0"]]
        assert [ids(found) for found, _ in await asyncio.gather(*rest)] == [[["b-0", "b-1"], ["c-0", "c-1"]], [["b-0"]], [["d-0"]]]
        assert searches.batches == [["a"], ["b", "c"], ["d"]]
        batcher.close()
        assert batcher.idle

    asyncio.run(check())


def test_a_full_queue_refuses_and_recovers() -> None:
    async def check() -> None:
        searches = Searches()
        batcher = MicroBatcher(searches, max_batch=4, max_queue=4)
        first = asyncio.create_task(batcher.search(["a"], 1))
        await entered(searches)
        waiting = asyncio.create_task(batcher.search(["b", "c", "d"], 1))
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="3 queries wait"):
            await batcher.search(["e", "f"], 1)
        searches.go.set()
        await asyncio.gather(first, waiting)
        assert ids((await batcher.search(["e", "f"], 1))[0]) == [["e-0"], ["f-0"]]
        batcher.close()
        with pytest.raises(Busy):
            await batcher.search(["g"], 1)

    asyncio.run(check())


def test_a_failed_batch_and_a_departed_caller_leave_the_worker_alive() -> None:
    async def check() -> None:
        searches = Searches()
        batcher = MicroBatcher(searches, max_batch=4, max_queue=100)
        first = asyncio.create_task(batcher.search(["bad"], 1))
        await entered(searches)
        gone = asyncio.create_task(batcher.search(["gone"], 1))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        searches.go.set()
        with pytest.raises(ValueError, match="no such word"):
            await first
        assert ids((await batcher.search(["b"], 1))[0]) == [["b-0"]]
        assert searches.batches == [["bad"], ["b"]]
        batcher.close()

    asyncio.run(check())


def test_what_waited_past_its_deadline_is_not_searched() -> None:
    async def check() -> None:
        searches = Searches()
        sizes: list[int] = []
        batcher = MicroBatcher(searches, max_batch=8, max_queue=100, watch=lambda size, seconds: sizes.append(size))
        first = asyncio.create_task(batcher.search(["a"], 1))
        await entered(searches)
        late = asyncio.create_task(batcher.search(["late"], 1, time.monotonic() + 0.05))
        soon = asyncio.create_task(batcher.search(["b"], 1, time.monotonic() + 60))
        await asyncio.sleep(0.1)
        searches.go.set()
        await first
        with pytest.raises(Late, match="past its deadline"):
            await late
        assert (await soon)[1] == 1
        assert searches.batches == [["a"], ["b"]]
        batcher.close()
        assert sizes == [1, 1]

    asyncio.run(check())
