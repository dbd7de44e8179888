"""Ask the trained policy in a terminal: one question, a prompt, or a pipe of questions. The loop is `episode.agent.run_episode`.

A running agent service answers where there is one for this policy; else its servers are started for as long as questions come.

Invariant: a pipe is read no further than a fixed number of questions past the first one whose answer is not written.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import aclosing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, Self, cast

import httpx

from research_rl.agent import answering
from research_rl.agent.command import Address, recorded_address
from research_rl.agent.piped import Line, in_thread
from research_rl.agent.printed import Printed
from research_rl.agent.responses import Response
from research_rl.config import Config, located
from research_rl.episode.agent import Limits
from research_rl.episode.prompts import encode_prompt, load_tokenizer
from research_rl.errors import ConfigError, DataError, ResearchError, ServiceError
from research_rl.pipeline import json_files
from research_rl.pipeline.stages import Workspace
from research_rl.process.proxies import httpx_options
from research_rl.process.server_events import data_of
from research_rl.process.tokens import token_from
from research_rl.serving.model import served_name
from research_rl.terminal import say, say_json

__all__ = ["Asker", "ServiceAsker", "ask", "ask_lines", "converse"]

_PROBE_S = 2.0
_PROMPT = "question> "
_BUSY_TRIES = 20
_WINDOW = 8
"""Answers of a pipe that may wait for a slower one before them, for each question that is answered at once."""
Json = dict[str, Any]
Note = Callable[[str], None]


class Asker(Protocol):
    """Answers questions within one event loop."""

    async def __aenter__(self) -> Self:
        """Open its connections."""
        ...

    async def __aexit__(self, *_: object) -> None:
        """Close them."""
        ...

    def events(self, question: str) -> AsyncGenerator[Json]:
        """Yield the events of the Responses format, the last one with the whole response. Raises ResearchError."""
        ...


OpenAsker = Callable[[], Asker]


def ask(config: Config, workspace: Workspace, question: str, model: Path | None, note: Note, *, as_json: bool = False) -> None:
    """Answer one question on standard output: as it arrives, or as one JSON object.

    `note` hears what takes time. Raises ConfigError for a question that is too long, ServiceError when a server fails.
    """
    from research_rl.agent.backend import policy_folder

    placed = located(config, workspace.root)
    if not config.agent.url:
        # Before any service starts: a question that is too long is refused at once.
        encode_prompt(load_tokenizer(policy_folder(workspace, model)), question, placed.prompt)
    with _asker(config, workspace, model, note) as opened:
        status = asyncio.run(_one(opened, question, None if as_json else Printed(sys.stdout)))
    if status == "failed":
        raise ServiceError("the model server failed while it answered; ask again, or look at its log in .services")


def converse(config: Config, workspace: Workspace, model: Path | None, note: Note) -> None:
    """Ask for questions until the end of the input; Ctrl-C stops an answer, and at the prompt it ends."""
    with _asker(config, workspace, model, note) as opened:
        for question in _typed():
            try:
                asyncio.run(_one(opened, question, Printed(sys.stdout)))
            except KeyboardInterrupt:
                print("\nstopped", file=sys.stderr)
            except ResearchError as error:
                say(f"research: {error}", sys.stderr)


def ask_lines(config: Config, workspace: Workspace, lines: Iterator[Line], model: Path | None, note: Note) -> None:
    """Answer a question a line as they come, several at once; write one JSON object a line in the order of the questions.

    Raises ServiceError at the end when a question could not be answered; its line says why.
    """
    # Without a question nothing is started.
    if (first := next(lines, None)) is None:
        return
    with _asker(config, workspace, model, note) as opened:
        total, failed = asyncio.run(_all(opened, chain([first], lines), config.agent.concurrency))
    if failed:
        raise ServiceError(f"{failed} of {total} questions could not be answered; `error` in their lines says why")


@contextmanager
def _asker(config: Config, workspace: Workspace, model: Path | None, note: Note) -> Generator[OpenAsker]:
    from research_rl.agent.backend import WorkspaceSource, free_name, policy_folder, servers
    from research_rl.agent.chosen import of_folder

    if address := _running(config, workspace, model, note):
        note(f"asking {address.model} at {address.url}")
        yield lambda: ServiceAsker(address, config)
        return
    folder = of_folder(policy_folder(workspace, model))
    note("no agent service runs here; `research serve-agent` keeps one up, so that only the first question waits")
    with servers(config, workspace, folder, note, free_name(workspace, "ask")) as running:
        yield lambda: _LocalAsker(config, WorkspaceSource(config, workspace, folder, running, config.agent.concurrency))


def _running(config: Config, workspace: Workspace, model: Path | None, note: Note) -> Address | None:
    """Return a running service for this policy: the one of `agent.url`, else the workspace's own."""
    from research_rl.agent.backend import policy_folder
    from research_rl.agent.command import TOKEN

    if url := config.agent.url:
        if model:
            raise ConfigError(f"--model={str(model)!r} is not what {url} answers with; leave --model out, or clear agent.url")
        return Address(url.rstrip("/").removesuffix("/v1"), token_from(TOKEN), "the policy")
    address = recorded_address(workspace)
    if address is None or not _ready(address.url):
        return None
    if (name := served_name(policy_folder(workspace, model))) != address.model:
        note(f"the service at {address.url} answers with {address.model} and not with {name}")
        return None
    return address


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=_PROBE_S, **httpx_options()).is_success
    except (httpx.HTTPError, httpx.InvalidURL):
        return False


def _typed() -> Iterator[str]:
    # Gives the prompt a history and the arrow keys.
    import readline  # noqa: F401  # pyright: ignore[reportUnusedImport]

    while True:
        try:
            line = input(_PROMPT).strip()
        except EOFError:
            print()
            return
        if line:
            yield line


async def _one(opened: OpenAsker, question: str, printed: Printed | None) -> str:
    """Answer one question; return the response's status."""
    status = ""
    try:
        async with opened() as asker, aclosing(asker.events(question)) as events:
            async for event in events:
                if printed:
                    printed.take(event)
                if response := event.get("response"):
                    status = str(response["status"])
                    if not printed and status != "in_progress":
                        say_json({"question": question, **response})
    finally:
        if printed:
            printed.stop()
    return status


async def _all(opened: OpenAsker, lines: Iterator[Line], at_once: int) -> tuple[int, int]:
    """Write the answers in order as soon as each and those before it are there; return how many there are and how many failed."""
    places, total, failed = asyncio.Semaphore(at_once), 0, 0
    begun, in_order = set[asyncio.Task[Json]](), asyncio.Queue[asyncio.Task[Json] | None](at_once * _WINDOW)
    async with opened() as asker, aclosing(in_thread(lines)) as arriving:

        async def answered(line: Line) -> Json:
            async with places:
                return await _whole(asker, line)

        async def begin() -> None:
            async for line in arriving:
                task = asyncio.create_task(answered(line))
                begun.add(task)
                await in_order.put(task)
            await in_order.put(None)

        async def write() -> None:
            nonlocal total, failed
            while task := await in_order.get():
                line = await task
                begun.discard(task)
                total, failed = total + 1, failed + (line.get("error") is not None)
                say_json(line)

        both = [asyncio.create_task(begin()), asyncio.create_task(write())]
        try:
            await asyncio.gather(*both)
        finally:
            for task in (*both, *begun):
                task.cancel()
            await asyncio.gather(*both, *begun, return_exceptions=True)
    return total, failed


async def _whole(asker: Asker, line: Line) -> Json:
    last: Json = {}
    try:
        if line.fault:
            raise DataError(line.fault)
        async with aclosing(asker.events(line.text)) as events:
            async for event in events:
                last = event
    except ResearchError as error:
        return {"question": line.text, "error": {"message": str(error)}}
    return {"question": line.text, **last["response"]}


class _LocalAsker:
    """Plays the episodes in this process."""

    def __init__(self, config: Config, source: Any) -> None:
        self._limits, self._source = Limits(**config.episode.model_dump()), source

    async def __aenter__(self) -> Self:
        await self._source.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._source.__aexit__()

    async def events(self, question: str) -> AsyncGenerator[Json]:
        backend = self._source.backend
        prompt = await asyncio.to_thread(backend.encode, question)
        response = Response(secrets.token_hex(12), backend.model, self._limits, {"ignored_messages": 0})
        for event in response.begin():
            yield event
        async with aclosing(answering.answer(backend, prompt, self._limits)) as parts:
            async for part in parts:
                for event in response.take(part):
                    yield event


class ServiceAsker:
    """Asks an agent service."""

    def __init__(self, address: Address, config: Config) -> None:
        headers = {"Authorization": f"Bearer {address.token}"} if address.token else {}
        self._url, episode = address.url, config.episode
        self._limits = {"max_searches": episode.max_searches, "top_k": episode.top_k, "wall_s": episode.wall_s}
        # An event comes at least every agent.keep_alive_s seconds; the episode's own limit ends it.
        self._client = httpx.AsyncClient(base_url=address.url, headers=headers, timeout=episode.wall_s + 30.0, **httpx_options())

    async def __aenter__(self) -> Self:
        """Open nothing yet: the first question does."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def events(self, question: str) -> AsyncGenerator[Json]:
        """Yield the events of the service; a full one is asked again when it says. Raises ServiceError."""
        body = {"input": question, "stream": True, **self._limits}
        try:
            for _ in range(_BUSY_TRIES):
                async with self._client.stream("POST", "/v1/responses", json=body) as reply:
                    if reply.is_success:
                        last: Json = {}
                        async for data in data_of(reply.aiter_bytes()):
                            yield (last := _object(data))
                        # A stream may end cleanly although a proxy, or the service's own end, cut it off.
                        if (last.get("response") or {}).get("status") in (None, "in_progress"):
                            raise ServiceError(f"{self._url} ended its stream before the answer was whole; ask again")
                        return
                    await reply.aread()
                if reply.status_code != 429:
                    raise ServiceError(f"{self._url} refused the question (HTTP {reply.status_code}): {_reason(reply)}")
                await asyncio.sleep(_pause_s(reply))
        except httpx.HTTPError as error:
            raise ServiceError(f"{self._url} does not answer ({type(error).__name__}: {error}); start it again and ask again") from None
        raise ServiceError(f"{self._url} was full {_BUSY_TRIES} times; ask again later, or raise agent.concurrency")


def _pause_s(reply: httpx.Response) -> float:
    text = reply.headers.get("retry-after", "1")
    return min(float(text), 60.0) if text.isascii() and text.isdigit() else 1.0


def _reason(reply: httpx.Response) -> str:
    """Return what a refusal says, in the format of OpenAI or of a guard before it."""
    try:
        content = json_files.parse(reply.content)
    except ValueError:
        return reply.text[:300]
    error: Any = cast(Json, content).get("error") or content if isinstance(content, dict) else content
    return str(error.get("message") or error.get("detail") or error)[:300] if isinstance(error, dict) else str(error)[:300]


def _object(data: str) -> Json:
    try:
        event = json_files.parse(data)
    except ValueError:
        event = None
    if not isinstance(event, dict) or "type" not in event:
        raise ServiceError(f"the service streamed {data[:80]!r}, which is no event; name the address of an agent service as agent.url")
    return cast(Json, event)
