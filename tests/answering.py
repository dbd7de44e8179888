"""The agent's real application over a scripted policy and shelf: in this process, or on loopback under uvicorn."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from research_rl.agent.answering import Backend, Lease
from research_rl.agent.feedback import Feedback
from research_rl.agent.service import AgentService
from research_rl.agent.standing import Standing
from research_rl.config import Config
from research_rl.episode.agent import Completion, SearchFailure
from research_rl.episode.trajectory import Passage
from research_rl.process.connections import bounded
from research_rl.process.draining import DrainingServer
from tests import waiting

EOS = 0
TOKEN = "t0ken"
THINK = "<think> I look it up. </think> <search> who founded Aldmoor Mill </search>"
DONE = "<think> It was Ada. </think> <answer> It is \\[ \\boxed{Ada King} \\] </answer>$"
MILL = Passage("p1", '"Aldmoor Mill"\nAldmoor Mill was founded by (Ada King), in 1801.', 0.9)
OTHER = Passage("p2", '"Borel"\nBorel is a town.', 0.4)
HEADERS = {"Authorization": f"Bearer {TOKEN}"}


class Bytes:
    """One token a byte, plus end of sequence."""

    def encode(self, text: str) -> list[int]:
        return [byte + 1 for byte in text.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(token - 1 for token in ids if token != EOS).decode(errors="replace")


class Policy:
    """Plays its turns in order in every episode, `piece` bytes at a time; "$" ends a turn by end of sequence.

    `fails` raises in the second half of a turn; `holds` keeps every turn from going on until it is set.
    """

    def __init__(self, *turns: str, piece: int = 3) -> None:
        self.turns, self.piece = turns, piece
        self.fails: Exception | None = None
        self.holds: threading.Event | None = None
        self.began = threading.Event()
        self.cancelled = threading.Event()

    async def generate(self, prompt_ids: Sequence[int], stop: Sequence[str], max_tokens: int) -> Completion:
        return await self.stream(prompt_ids, stop, max_tokens, lambda ids: None)

    async def stream(
        self, prompt_ids: Sequence[int], stop: Sequence[str], max_tokens: int, on_ids: Callable[[Sequence[int]], None]
    ) -> Completion:
        turn = self.turns[min(Bytes().decode(prompt_ids).count("</result>"), len(self.turns) - 1)]
        ids = [*Bytes().encode(turn.removesuffix("$")), *([EOS] if turn.endswith("$") else [])]
        by = "length" if len(ids) > max_tokens else "eos" if turn.endswith("$") else "stop"
        ids = ids[:max_tokens]
        for start in range(0, len(ids), self.piece):
            await self._wait(start >= len(ids) // 2)
            on_ids(ids[start : start + self.piece])
        return Completion(tuple(ids), (0.0,) * len(ids), by)

    async def _wait(self, late: bool) -> None:
        if late and self.fails:
            raise self.fails
        self.began.set()
        try:
            await asyncio.sleep(0)
            while late and self.holds and not self.holds.is_set():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise


class Shelf:
    """Answers every query with the same passages, or fails."""

    def __init__(self, *passages: Passage, failure: SearchFailure | None = None) -> None:
        self.passages, self.failure, self.queries = list(passages), failure, list[str]()

    async def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]] | SearchFailure:
        self.queries += queries
        return self.failure or [self.passages[:top_k] for _ in queries]


class Source:
    """A backend without servers; `down` says why it does not answer."""

    def __init__(self, policy: Policy, shelf: Shelf) -> None:
        self.backend = Backend(policy, shelf, Bytes(), Bytes().encode, "policy-test", version="after")
        self.down: str | None = None
        self.leased = 0

    async def __aenter__(self) -> Source:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def lease(self) -> Lease:
        self.leased += 1
        return Lease(self.backend, self._over)

    def _over(self) -> None:
        self.leased -= 1

    def standing(self) -> Standing:
        return Standing(self.backend.model, self.backend.version, 1.0)

    async def trouble(self) -> str | None:
        return self.down


class Agent:
    """A service over a script, asked in this process."""

    def __init__(self, *turns: str, shelf: Shelf | None = None, episode: dict[str, Any] | None = None, **agent: Any) -> None:
        self.policy, self.shelf = Policy(*(turns or (THINK, DONE))), shelf or Shelf(MILL, OTHER)
        self.source, self.lines = Source(self.policy, self.shelf), list[dict[str, Any]]()
        limits = {"max_result_tokens": 400, "max_response_tokens": 2000, "max_searches": 3, "top_k": 3, "wall_s": 600.0, **(episode or {})}
        config = Config.model_validate({"episode": limits, "agent": agent})
        self._folder = tempfile.TemporaryDirectory()
        self.feedback = Feedback(Path(self._folder.name) / "agent")
        self.service = AgentService(self.source, config, TOKEN, self.lines.append, self.feedback)

    def __call__(self, path: str = "/v1/responses", body: Any = None, **options: Any) -> httpx.Response:
        """Send one request, a POST where there is a body."""

        async def main() -> httpx.Response:
            transport = httpx.ASGITransport(app=self.service.app, raise_app_exceptions=False)
            headers = {**HEADERS, **options.pop("headers", {})}
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                if body is None and "content" not in options:
                    return await client.get(path, headers=headers)
                return await client.post(path, headers=headers, **({"json": body} if body is not None else {}), **options)

        return asyncio.run(main())


@contextmanager
def listening(agent: Agent, **more: Any) -> Generator[tuple[str, DrainingServer, threading.Thread]]:
    """Serve on loopback in a thread of this process, with `more` options of uvicorn; yield address, server and thread."""
    service = agent.service
    options = uvicorn.Config(service.app, port=0, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=1, **more)
    drain_s = service.config.drain_s
    server = DrainingServer(options, drain=service.drain, active=lambda: service.requests, drain_s=drain_s, cut=service.cut)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the service did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server, thread
    finally:
        if agent.policy.holds:
            agent.policy.holds.set()
        server.should_exit = True
        thread.join()


def until(true: Callable[[], Any], seconds: float = 60.0) -> None:
    """Return once `true` says so; fail after `seconds`."""
    ends = time.monotonic() + seconds
    assert waiting.until(true, over=lambda: time.monotonic() >= ends, pause_s=0.01), "what was waited for did not happen"


def main(words: int) -> None:
    """Serve from a process of its own until its standard input ends; an answer thinks as many words. Prints the address."""
    thinks = f"<think> {'word ' * words}</think> <answer> \\boxed{{Ada King}} </answer>$"
    agent = Agent(THINK, thinks, episode={"max_response_tokens": 8 * words + 2_000})
    with listening(agent, http=bounded(200, agent.service.metrics.refused, unread_s=2.0)) as (address, _, _):
        print(address, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(int(sys.argv[1]))
