"""Ask a retriever over HTTP. Knows the wire format and time; never raises for what a server does or fails to do.

Invariants: (1) `search` answers within `timeout_s`, retries included; (2) a reply of the wrong shape is a SearchFailure;
(3) equal searches in flight are sent once, and failures are never kept; (4) `take_counts` accounts for every search and
every try of it; (5) where the index is cut in parts, an answer holds the best of all parts or is a SearchFailure.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, cast

import httpx

from research_rl.episode.agent import SearchFailure
from research_rl.episode.trajectory import Passage, SearchFault
from research_rl.retriever.fleet import Part, parts

__all__ = ["RetrieverClient", "merged"]

_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
_PROBE_S = 2.0
_CACHED = 4096
_CONNECTIONS = 8
"""Requests on the wire at once; more wait their turn here, because the pool of httpx slows down and turns unfair with its size."""

Found = list[list[Passage]]


class _Again(Exception):
    """A failure worth another try, after `pause` seconds where the server named them."""

    def __init__(self, reason: str, fault: SearchFault, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.fault, self.pause = fault, pause


class RetrieverClient:
    """A `Searcher` over retriever services; for one event loop, any number of tasks.

    `url` is one address, replicas `a,b`, or parts of an index with their replicas `a,b;c,d`.
    """

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 20.0) -> None:
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self._parts: list[Part[Found | SearchFailure]] = [Part(urls, self._well) for urls in parts(url)]
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.AsyncClient(headers=headers, trust_env=False)
        self._slots = asyncio.Semaphore(_CONNECTIONS)
        self._flying: dict[tuple[tuple[str, ...], int], asyncio.Task[Found | SearchFailure]] = {}
        self._kept: OrderedDict[tuple[tuple[str, ...], int], Found] = OrderedDict()
        self._counts: Counter[str] = Counter()

    def take_counts(self) -> dict[str, int]:
        """Return what was counted since the last call: searches `asked`, thereof answered from the cache (`cached`) or by an
        equal one in flight (`joined`), requests sent (`tries`) and those that failed (`failed_tries/<fault>`).
        """
        counts, self._counts = dict(self._counts), Counter()
        return counts

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        for task in list(self._flying.values()):
            task.cancel()
        for part in self._parts:
            part.close()
        await self._http.aclose()

    async def search(self, queries: Sequence[str], top_k: int) -> Found | SearchFailure:
        """Return up to `top_k` passages for each query, best first, or a SearchFailure within `timeout_s`."""
        if not queries:
            return []
        key = (tuple(queries), top_k)
        self._counts["asked"] += 1
        if key in self._kept:
            self._counts["cached"] += 1
            self._kept.move_to_end(key)
            return [list(passages) for passages in self._kept[key]]
        task = self._flying.get(key)
        if task is not None:
            self._counts["joined"] += 1
        else:
            task = self._flying[key] = asyncio.create_task(self._ask(key))
            task.add_done_callback(lambda _: self._flying.pop(key, None))
        found = await asyncio.shield(task)
        return found if isinstance(found, SearchFailure) else [list(passages) for passages in found]

    async def health(self) -> dict[str, Any] | SearchFailure:
        """Return what /health of the first replica of each part that answers says (of the last part), or a SearchFailure."""
        found: dict[str, Any] | SearchFailure = SearchFailure("no retriever is named")
        for part in self._parts:
            for replica in part.replicas:
                found = await self._health(replica.url)
                if not isinstance(found, SearchFailure):
                    break
            else:
                return found
        return found

    async def _health(self, url: str) -> dict[str, Any] | SearchFailure:
        try:
            response = await self._http.get(f"{url}/health", timeout=self.timeout_s)
            return cast(dict[str, Any], response.raise_for_status().json())
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError) as error:
            return SearchFailure(_reason(error), SearchFault.UNREACHABLE)

    async def _well(self, url: str) -> bool:
        """Whether a replica that failed answers again; a service without /readyz answers 404, which is an answer."""
        try:
            return (await self._http.get(f"{url}/readyz", timeout=_PROBE_S)).status_code < 500
        except (httpx.HTTPError, httpx.InvalidURL):
            return False

    async def _ask(self, key: tuple[tuple[str, ...], int]) -> Found | SearchFailure:
        deadline = time.monotonic() + self.timeout_s
        pause, tries = _FIRST_PAUSE_S, 0
        while True:
            tries += 1
            self._counts["tries"] += 1
            try:
                found = await self._once(*key, deadline - time.monotonic())
            except _Again as error:
                self._counts[f"failed_tries/{error.fault}"] += 1
                wait = max(error.pause, random.uniform(pause / 2, pause))
                if time.monotonic() + wait >= deadline:
                    return SearchFailure(f"{error} ({tries} tries in {self.timeout_s:g} s)", error.fault)
                await asyncio.sleep(wait)
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            if isinstance(found, SearchFailure):
                self._counts[f"failed_tries/{found.fault}"] += 1
            elif all(found):  # a retriever that finds nothing may only be ill
                self._keep(key, found)
            return found

    async def _once(self, queries: tuple[str, ...], top_k: int, seconds: float) -> Found | SearchFailure:
        """Ask every part once, failing over between its replicas; merge what they found."""
        until = time.monotonic() + seconds

        def post(url: str) -> Coroutine[Any, Any, Found | SearchFailure]:
            return self._post(url, queries, top_k, until - time.monotonic())

        if len(self._parts) == 1:
            return await self._parts[0].ask(post, _Again)
        answers = await asyncio.gather(*(part.ask(post, _Again) for part in self._parts), return_exceptions=True)
        found: list[Found] = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            if isinstance(answer, SearchFailure):
                return answer
            found.append(answer)
        return merged(found, top_k) if found else SearchFailure("no retriever is named")

    async def _post(self, url: str, queries: tuple[str, ...], top_k: int, seconds: float) -> Found | SearchFailure:
        body = {"query": list(queries), "top_n": top_k, "return_score": True}
        headers = {"X-Deadline-Ms": str(max(int(1000 * seconds), 1))}
        try:
            async with asyncio.timeout(max(seconds, 0.001)), self._slots:
                response = await self._http.post(f"{url}/batch_search", json=body, headers=headers, timeout=max(seconds, 0.001))
        except (httpx.TimeoutException, TimeoutError) as error:
            raise _Again(_reason(error), SearchFault.TIMEOUT) from None
        except httpx.HTTPError as error:
            raise _Again(_reason(error), SearchFault.UNREACHABLE) from None
        except (httpx.InvalidURL, UnicodeEncodeError) as error:
            return SearchFailure(_reason(error), SearchFault.REFUSED)
        if response.status_code >= 500 or response.status_code == 429:
            fault = SearchFault.BUSY if response.status_code in (429, 503) else SearchFault.SERVER_ERROR
            raise _Again(f"retriever answered {response.status_code}", fault, _retry_after(response))
        if response.status_code != 200:
            return SearchFailure(f"retriever answered {response.status_code}: {_detail(response)}", SearchFault.REFUSED)
        return _parse(response, len(queries))

    def _keep(self, key: tuple[tuple[str, ...], int], found: Found) -> None:
        self._kept[key] = found
        while len(self._kept) > _CACHED:
            self._kept.popitem(last=False)


def merged(found: Sequence[Found], top_k: int) -> Found:
    """Return the best `top_k` of what the parts of an index found for each query, by score; equal scores in the parts' order.

    A hybrid index scores by reciprocal ranks, so this takes the parts' best in turns.
    """
    return [
        sorted((passage for passages in answers for passage in passages), key=lambda passage: -passage.score)[:top_k]
        for answers in zip(*found, strict=True)
    ]


def _parse(response: httpx.Response, queries: int) -> Found | SearchFailure:
    """Read `[[[{id, contents}]], [[score]]]`."""
    try:
        documents, scores = response.json()
        found = [
            [Passage(_text(document["id"]), _text(document["contents"]), float(score)) for document, score in zip(*pair, strict=True)]
            for pair in zip(documents, scores, strict=True)
        ]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        return SearchFailure(f"retriever's reply is not understood ({type(error).__name__})", SearchFault.GARBAGE)
    if len(found) != queries:
        return SearchFailure(f"retriever gave {len(found)} replies to {queries} queries", SearchFault.GARBAGE)
    return found


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(max(float(response.headers.get("retry-after", 0)), 0.0), _LONGEST_PAUSE_S)
    except ValueError:
        return 0.0


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])[:200]
    except (ValueError, TypeError, KeyError, RecursionError):
        return response.text[:200]


def _reason(error: BaseException) -> str:
    return f"retriever cannot be reached ({type(error).__name__})"
