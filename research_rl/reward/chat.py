"""One chat completion from an OpenAI-compatible server, within limits. Knows addresses, bytes and tries; knows no prompt, no verdict.

Invariants: (1) a request ends within `judge.timeout_s` and a reply is read up to `_MOST_BYTES`, however the server behaves; (2) at most
`judge.concurrency` requests are in flight; (3) what went wrong is a ChatError, whose text never holds the token.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self, TypeVar

import httpx
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_base

from research_rl.config import JudgeConfig
from research_rl.pipeline.json_files import parse
from research_rl.process.proxies import httpx_options

__all__ = ["TOKEN", "ChatClient", "ChatError", "ChatReply", "Fault", "json_objects"]

TOKEN = "RESEARCH_JUDGE_TOKEN"
"""Environment variable with the judge's bearer token."""
_MOST_BYTES = 1 << 20
_MOST_SEARCHED = 1 << 15
_MOST_FALSE_STARTS = 200
_SHOWN = 200
Value = TypeVar("Value")


class Fault(StrEnum):
    """Why a request brought nothing."""

    OUTAGE = "outage"
    """Nobody answered in time, or the server said that it cannot answer now."""
    DENIED = "denied"
    """Token, address or model are wrong, so that no request will be answered."""
    REJECTED = "rejected"
    """The server does not take this very request."""
    UNUSABLE = "unusable"
    """An answer came, but not what was asked for."""


class ChatError(Exception):
    """A request brought nothing; `fault` says why."""

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault

    @property
    def passing(self) -> bool:
        """Whether the same request may be answered another time."""
        return self.fault in (Fault.OUTAGE, Fault.UNUSABLE)


@dataclass(frozen=True)
class ChatReply:
    """What a model wrote, and the name under which the server says it ran, "" when it says none."""

    content: str
    model: str


class ChatClient:
    """A client of one server; use it within one event loop, and close it or use it as an async context manager."""

    def __init__(self, config: JudgeConfig, token: str | None = None) -> None:
        self._config, self._token = config, token
        self._client = httpx.AsyncClient(
            base_url=str(config.url),
            headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})},
            timeout=None,  # `_post` limits the whole request: httpx's own limits begin anew with every byte that arrives
            limits=httpx.Limits(max_connections=config.concurrency, max_keepalive_connections=config.concurrency),
            **httpx_options(config.proxy, url=str(config.url)),
        )
        self._free = asyncio.Semaphore(config.concurrency)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def ask(self, body: Mapping[str, Any], read: Callable[[ChatReply], Value], attempts: int, wait: wait_base) -> Value:
        """Send a request until `read` can use what came, at most `attempts` times, with `wait` between the tries.

        `read` raises ValueError for a completion that it cannot use. Raises ChatError, the last try's.
        """
        retrying = AsyncRetrying(stop=stop_after_attempt(attempts), wait=wait, retry=retry_if_exception(_is_passing), reraise=True)
        return await retrying(self._once, body, read)

    async def _once(self, body: Mapping[str, Any], read: Callable[[ChatReply], Value]) -> Value:
        status, raw = await self._post(body)
        if status != 200:
            raise self._refusal(status, raw)
        if len(raw) > _MOST_BYTES:
            raise ChatError(Fault.UNUSABLE, f"the judge's reply has more than {_MOST_BYTES:,} bytes")
        try:
            return read(_completion(raw))
        except ValueError as error:
            raise ChatError(Fault.UNUSABLE, f"the judge's reply {error!s:.{_SHOWN}}") from None

    async def _post(self, body: Mapping[str, Any]) -> tuple[int, bytes]:
        """Return the status and the body of a reply, of which no more than a little over `_MOST_BYTES` is read."""
        # Escaped here and not by httpx: half a surrogate pair, which a question may hold, has no UTF-8.
        content = json.dumps(body)
        try:
            async with (
                self._free,
                asyncio.timeout(self._config.timeout_s),
                self._client.stream("POST", "/chat/completions", content=content) as reply,
            ):
                return reply.status_code, await _start(reply)
        except TimeoutError:
            raise ChatError(Fault.OUTAGE, f"no whole reply within {self._config.timeout_s:g} s from {self._config.url}") from None
        except httpx.HTTPError as error:
            raise ChatError(Fault.OUTAGE, f"{type(error).__name__} from {self._config.url}") from error

    def _refusal(self, status: int, raw: bytes) -> ChatError:
        passing = status == 429 or status >= 500
        fault = Fault.OUTAGE if passing else Fault.DENIED if status in (401, 403, 404) else Fault.REJECTED
        # What a server says about a wrong request names the remedy; what it says about a token may quote it.
        said = "" if passing or status in (401, 403) else _reason(raw)
        if self._token:
            said = said.replace(self._token, "***")
        return ChatError(fault, f"HTTP {status} from {self._config.url}{said}")


def _is_passing(error: BaseException) -> bool:
    return isinstance(error, ChatError) and error.passing


async def _start(reply: httpx.Response) -> bytes:
    raw = bytearray()
    async for block in reply.aiter_bytes(1 << 16):
        raw += block
        if len(raw) > _MOST_BYTES:
            break
    return bytes(raw)


def _completion(raw: bytes) -> ChatReply:
    """Return the first choice of a chat completion. Raises ValueError."""
    try:
        tree = parse(raw)
        content, model = tree["choices"][0]["message"]["content"], tree.get("model")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("cannot be read") from None
    if not isinstance(content, str):
        raise ValueError("has no text")
    return ChatReply(content, model[:_SHOWN] if isinstance(model, str) else "")


def _reason(raw: bytes) -> str:
    """Return what the server says is wrong, as `: text`, or "" when it says nothing that can be read."""
    try:
        tree = parse(raw[:_MOST_BYTES])
        error = tree.get("error", tree)
        said = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, AttributeError):
        return ""
    return f": {' '.join(said.split())[:_SHOWN]}" if isinstance(said, str) else ""


def json_objects(content: str) -> Iterator[dict[str, Any]]:
    """Yield the outermost JSON objects in the last 32,768 characters of a text; other text is passed over.

    After 200 braces that open no object the text counts as ended.
    """
    # Unbounded, a text of nothing but opening braces would hold up for seconds whoever else uses this event loop.
    text, place, false_starts = content[-_MOST_SEARCHED:], 0, 0
    decoder = json.JSONDecoder()
    while false_starts < _MOST_FALSE_STARTS and (place := text.find("{", place)) >= 0:
        try:
            value, place = decoder.raw_decode(text, place)
            yield value
        except (ValueError, RecursionError):
            place, false_starts = place + 1, false_starts + 1
