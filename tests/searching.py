"""The retriever's real application on loopback over a search function of the test, and an engine that searches a few times."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import uvicorn

from research_rl.config import RetrieverConfig
from research_rl.episode.agent import Completion
from research_rl.episode.trajectory import Passage
from research_rl.retriever.app import RetrieverService
from research_rl.retriever.retriever import Retriever

Search = Callable[[Sequence[str], int], list[list[Passage]]]


class Shelf:
    """A retriever without an index: it answers as `search` says, and as `search.certified` where that is there."""

    def __init__(self, search: Search, facts: dict[str, Any]) -> None:
        self.certified = getattr(search, "certified", None)
        self.search = search
        self.close = lambda: None
        self.facts: dict[str, Any] = {"rows": 1, "manifests": {"index": "i" * 64, "embed": "e" * 64, "corpus": "c" * 64}, **facts}


@contextmanager
def served(search: Search, *, facts: dict[str, Any] | None = None, **config: Any) -> Generator[str]:
    """Yield the address of a service that answers by `search` and adds `facts` to its own, in a thread of this process."""
    service = RetrieverService(lambda: cast(Retriever, Shelf(search, facts or {})), RetrieverConfig.model_validate(config))
    server = uvicorn.Server(uvicorn.Config(service.gateway, port=0, log_level="warning", access_log=False, lifespan="on"))
    thread = threading.Thread(target=server.run)
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0002)  # client and service share one interpreter lock: at 5 ms a switch every packet would wait for it
    thread.start()
    while not (server.started and service.ready):
        assert thread.is_alive(), "the service did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        sys.setswitchinterval(before)


class Bytes:
    """One token a byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")


class Engine:
    """Searches `searches` times for words that no other episode asks for, `turn_s` seconds a turn, then answers."""

    def __init__(self, name: str, searches: int, turn_s: float = 0.0) -> None:
        self.name, self.searches, self.turn_s, self.turns = name, searches, turn_s, 0

    async def generate(self, prompt_ids: Sequence[int], stop: Sequence[str], max_tokens: int) -> Completion:
        await asyncio.sleep(self.turn_s)
        self.turns += 1
        last = self.turns > self.searches
        text = "<answer>\\boxed{a}</answer>" if last else f"<search>Person{self.turns} {self.name}</search>"
        ids = tuple(text.encode())
        return Completion(ids, (0.0,) * len(ids), "eos" if last else "stop")
