"""The batcher joins what waits, bounds its queue, and lets no caller's fate touch another's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest

from research_rl.retriever.batching import Busy, MicroBatcher
from research_rl.trajectory import Passage


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
        assert ids(await first) == [["a-0"]]
        assert [ids(found) for found in await asyncio.gather(*rest)] == [[["b-0", "b-1"], ["c-0", "c-1"]], [["b-0"]], [["d-0"]]]
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
        assert ids(await batcher.search(["e", "f"], 1)) == [["e-0"], ["f-0"]]
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
        assert ids(await batcher.search(["b"], 1)) == [["b-0"]]
        assert searches.batches == [["bad"], ["b"]]
        batcher.close()

    asyncio.run(check())
