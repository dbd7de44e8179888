"""Calls to a real model server, and what it leaves behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import psutil

from research_rl.episode.agent import Completion
from research_rl.process.services import Endpoint
from research_rl.serving.client import EngineName, HttpEngine, Sampling
from tests.waiting import ended

__all__ = ["SEARCH_END", "ask", "children", "once"]

SEARCH_END = ("</search>",)


def children() -> set[int]:
    """Return the ids of this process's living descendants."""
    return {child.pid for child in psutil.Process().children(recursive=True) if not ended(child.pid)}


def ask(
    endpoint: Endpoint, sampling: Sampling, call: Callable[[HttpEngine], Awaitable[list[Completion]]], engine: EngineName = "vllm"
) -> list[Completion]:
    async def main() -> list[Completion]:
        async with HttpEngine(endpoint, sampling, engine=engine) as client:
            return await call(client)

    return asyncio.run(main())


def once(endpoint: Endpoint, ids: Sequence[int], limit: int, sampling: Sampling | None = None, engine: EngineName = "vllm") -> Completion:
    async def call(client: HttpEngine) -> list[Completion]:
        return [await client.generate(ids, SEARCH_END, limit)]

    return ask(endpoint, sampling or Sampling(logprobs=True), call, engine)[0]
