from __future__ import annotations

import asyncio

import pytest

from research_rl.training.policy_env.outbox import Outbox


class Post:
    """Takes a while, keeps what it was given, refuses a batch with a zero, and says how many sendings ran at once."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.running = self.most = 0

    async def send(self, items: list[int]) -> None:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.01)
        self.running -= 1
        if 0 in items:
            raise ValueError(f"refused {items}")
        self.batches.append(items)


def test_what_comes_during_a_sending_leaves_together_and_in_order() -> None:
    async def scene() -> None:
        post = Post()
        outbox = Outbox(post.send)
        first = asyncio.create_task(outbox.put(1))
        await asyncio.sleep(0.005)
        await asyncio.gather(first, *(outbox.put(item) for item in range(2, 100)))
        assert post.batches == [[1], list(range(2, 100))]
        assert post.most == 1

    asyncio.run(scene())


def test_put_returns_only_when_its_item_was_sent() -> None:
    async def scene() -> None:
        post = Post()
        await Outbox(post.send).put(7)
        assert post.batches == [[7]]

    asyncio.run(scene())


def test_a_failed_sending_is_told_to_its_items_alone() -> None:
    async def scene() -> None:
        post = Post()
        outbox = Outbox(post.send)
        first = asyncio.create_task(outbox.put(1))
        await asyncio.sleep(0.005)
        late = await asyncio.gather(outbox.put(0), outbox.put(2), return_exceptions=True)
        await first
        await outbox.put(3)
        assert [str(error) for error in late] == ["refused [0, 2]"] * 2
        assert post.batches == [[1], [3]]

    asyncio.run(scene())


def test_one_who_is_cancelled_leaves_the_others_their_sending() -> None:
    async def scene() -> None:
        post = Post()
        outbox = Outbox(post.send)
        gone, stays = (asyncio.create_task(outbox.put(item)) for item in (1, 2))
        await asyncio.sleep(0.005)
        gone.cancel()
        await stays
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert post.batches == [[1, 2]]

    asyncio.run(scene())
