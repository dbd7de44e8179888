"""Ask a retriever over HTTP. Knows the wire formats and time; never raises for what a server does or fails to do.

Invariants: (1) `search` answers within `timeout_s`, retries included, counted from when it has a connection, for which it waits
`timeout_s` at most; (2) waiting for a connection is no replica's failure; (3) a reply of the wrong shape is a SearchFailure;
(4) equal searches in flight are sent once, and no result is kept; (5) `take_counts` accounts for every search and every try
of it; (6) where the index is cut in parts, an answer holds the best of all parts or is a SearchFailure.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, cast

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_before_delay, wait_random_exponential

from research_rl.episode.agent import SearchFailure
from research_rl.episode.trajectory import SearchFault
from research_rl.process.proxies import httpx_options
from research_rl.retriever import replies
from research_rl.retriever.fleet import IndexPart, ReplicaError, parts
from research_rl.retriever.replies import Dialect, Passages

__all__ = ["RetrieverClient", "merged"]

_LONGEST_PAUSE_S = 2.0
_BACKOFF = wait_random_exponential(multiplier=0.1, max=_LONGEST_PAUSE_S)
_PROBE_S = 2.0
_POOL = 16
"""Connections of one httpx pool. A request costs httpx time in the square of its pool's size, so many connections need many pools."""
_IDLE_S = 4.0
"""After this long an idle connection is not used again: uvicorn closes it after 5 s, and a request sent at that moment is lost."""
_QUERY_REFUSED = frozenset({400, 413, 414, 422})
"""Refusals that this query caused; any other 4xx would meet every query."""

Key = tuple[tuple[str, ...], int]


class RetrieverClient:
    """A `Searcher` over retriever services; for one event loop, any number of tasks.

    `url` is one address, replicas `a,b`, or parts of an index with their replicas `a,b;c,d`. `connections` is the number of
    searches on the wire at once: as many as the caller has episodes in flight, so that the service can search them together.
    """

    def __init__(self, url: str, token: str | None = None, timeout_s: float = 20.0, *, connections: int = 32) -> None:
        self.url, self.timeout_s, self._connections = url.rstrip("/"), timeout_s, connections
        self._parts: list[IndexPart[Passages | SearchFailure]] = [IndexPart(urls, self._healthy) for urls in parts(url)]
        self._pools = _pools(url, token, connections)
        # One entry a connection, by the pool it belongs to. Last in, first out, so that a quiet client keeps few connections in use.
        self._free: asyncio.LifoQueue[httpx.AsyncClient] = asyncio.LifoQueue()
        for number in range(connections):
            self._free.put_nowait(self._pools[number // _POOL])
        self._in_flight: dict[Key, asyncio.Task[Passages | SearchFailure]] = {}
        self._dialects: dict[str, Dialect] = {}
        self._counts: Counter[str] = Counter()

    def take_counts(self) -> dict[str, int]:
        """Return what was counted since the last call: searches `asked`, thereof answered by an equal one in flight (`joined`) or
        given up for want of a connection (`no_connection`), tries, those that failed (`failed_tries/<fault>`), and second requests
        sent because the first was late (`hedges`).
        """
        for part in self._parts:
            self._counts["hedges"] += part.hedges
            part.hedges = 0
        counts, self._counts = {name: count for name, count in self._counts.items() if count}, Counter()
        return counts

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        for task in list(self._in_flight.values()):
            task.cancel()
        await asyncio.gather(*self._in_flight.values(), return_exceptions=True)
        for part in self._parts:
            part.close()
        for pool in self._pools:
            await pool.aclose()

    async def search(self, queries: Sequence[str], top_k: int) -> Passages | SearchFailure:
        """Return up to `top_k` passages for each query, best first, or a SearchFailure."""
        if not queries:
            return []
        key = (tuple(queries), top_k)
        self._counts["asked"] += 1
        task = self._in_flight.get(key)
        if task is not None:
            self._counts["joined"] += 1
        else:
            task = self._in_flight[key] = asyncio.create_task(self._search(key))
            task.add_done_callback(lambda _: self._in_flight.pop(key, None))
        # Others may wait for the same search: a caller that is cancelled leaves alone, and each gets lists of its own.
        answer = await asyncio.shield(task)
        return answer if isinstance(answer, SearchFailure) else [list(passages) for passages in answer]

    async def works(self) -> bool:
        """Whether the service answers a search now. The text is new each time, so that no cache on the way can answer for it."""
        return not isinstance(await self.search([f"is the retriever there {uuid.uuid4().hex}"], 1), SearchFailure)

    async def info(self) -> dict[str, dict[str, Any] | SearchFailure]:
        """Return what /info of each replica says, by address."""
        urls = [replica.url for part in self._parts for replica in part.replicas]
        return dict(zip(urls, await asyncio.gather(*(self._get(url, "/info") for url in urls)), strict=True))

    async def health(self) -> dict[str, Any] | SearchFailure:
        """Return what /health of the first replica of each part that answers says (of the last part), or a SearchFailure."""
        answer: dict[str, Any] | SearchFailure = SearchFailure("no retriever is named")
        for part in self._parts:
            for replica in part.replicas:
                answer = await self._get(replica.url, "/health")
                if not isinstance(answer, SearchFailure):
                    break
            else:
                return answer
        return answer

    async def _get(self, url: str, path: str) -> dict[str, Any] | SearchFailure:
        try:
            # Beside the counted connections, so that a question about health does not wait behind searches.
            response = await self._pools[0].get(f"{url}{path}", timeout=self.timeout_s)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            return SearchFailure(_reason(error), SearchFault.UNREACHABLE)
        if response.status_code != 200:
            return SearchFailure(f"{path} answered {response.status_code}: {replies.detail(response)}", SearchFault.DENIED)
        try:
            return cast(dict[str, Any], response.json())
        except (ValueError, RecursionError):
            return SearchFailure(f"{path} answered no JSON", SearchFault.GARBAGE)

    async def _healthy(self, url: str) -> bool:
        """Whether a replica that failed answers again; a service without /readyz answers 404, which is an answer."""
        try:
            return (await self._pools[0].get(f"{url}/readyz", timeout=_PROBE_S)).status_code < 500
        except (httpx.HTTPError, httpx.InvalidURL):
            return False

    async def _search(self, key: Key) -> Passages | SearchFailure:
        try:
            async with asyncio.timeout(self.timeout_s):
                pool = await self._free.get()
        except TimeoutError:
            self._counts["no_connection"] += 1
            return SearchFailure(
                f"none of this client's {self._connections} connections was free in {self.timeout_s:g} s", SearchFault.NO_CONNECTION
            )
        try:
            return await self._tried(key, pool)
        finally:
            self._free.put_nowait(pool)

    async def _tried(self, key: Key, pool: httpx.AsyncClient) -> Passages | SearchFailure:
        """Ask until an answer comes or the next try would begin past `timeout_s`."""
        # `reraise`: the last ReplicaError, whose fault is counted, instead of tenacity's RetryError.
        retrying = AsyncRetrying(
            stop=stop_before_delay(self.timeout_s), wait=_pause, retry=retry_if_exception_type(ReplicaError), reraise=True
        )
        deadline = time.monotonic() + self.timeout_s
        try:
            return await retrying(self._try, key, pool, deadline)
        except ReplicaError as error:
            tries = retrying.statistics["attempt_number"]
            return SearchFailure(f"{error} ({tries} tries in {self.timeout_s:g} s)", error.fault)

    async def _try(self, key: Key, pool: httpx.AsyncClient, deadline: float) -> Passages | SearchFailure:
        """Ask every part once and count how that went. Raises ReplicaError."""
        self._counts["tries"] += 1
        fault: SearchFault | None = None
        try:
            # Not below a millisecond: a timeout of 0 ends the try before anything is sent.
            async with asyncio.timeout(max(deadline - time.monotonic(), 0.001)):
                answer = await self._all_parts(key, pool, deadline)
            fault = answer.fault if isinstance(answer, SearchFailure) else None
            return answer
        except TimeoutError as error:
            fault = SearchFault.TIMEOUT
            raise ReplicaError(_reason(error), fault) from None
        except ReplicaError as error:
            fault = error.fault
            raise
        finally:
            if fault is not None:
                self._counts[f"failed_tries/{fault}"] += 1

    async def _all_parts(self, key: Key, pool: httpx.AsyncClient, deadline: float) -> Passages | SearchFailure:
        """Ask every part, failing over between its replicas; merge their passages."""

        def send(url: str) -> Coroutine[Any, Any, Passages | SearchFailure]:
            return self._post(url, key, pool, deadline)

        if len(self._parts) == 1:
            return await self._parts[0].ask(send)
        # Every part is awaited before the first failure is raised: no request goes on without an owner.
        answers = await asyncio.gather(*(part.ask(send) for part in self._parts), return_exceptions=True)
        of_parts: list[Passages] = []
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
            if isinstance(answer, SearchFailure):
                return answer
            of_parts.append(answer)
        return merged(of_parts, key[1]) if of_parts else SearchFailure("no retriever is named", SearchFault.UNREACHABLE)

    async def _post(self, url: str, key: Key, pool: httpx.AsyncClient, deadline: float) -> Passages | SearchFailure:
        """Ask a replica in the format that it speaks, which its first answer shows."""
        known = self._dialects.get(url)
        for dialect in (known,) if known else ("batch_search", "retrieve"):
            response = await self._sent(f"{url}/{dialect}", replies.request(dialect, *key), pool, deadline)
            if isinstance(response, SearchFailure):
                return response
            if response.status_code not in (404, 405):
                self._dialects[url] = dialect
                return _read(dialect, response, len(key[0]))
        # Another kind of service may stand at this address at the next try.
        self._dialects.pop(url, None)
        return SearchFailure(f"{url} has neither /batch_search nor /retrieve; name a retriever's address", SearchFault.DENIED)

    async def _sent(self, url: str, body: dict[str, Any], pool: httpx.AsyncClient, deadline: float) -> httpx.Response | SearchFailure:
        seconds = max(deadline - time.monotonic(), 0.001)
        # A service that knows when its answer is of no use any more need not search for it.
        headers = {"X-Deadline-Ms": str(max(int(1000 * seconds), 1))}
        try:
            # httpx's timeout holds for each reading and writing by itself, this one for the whole request.
            async with asyncio.timeout(seconds):
                response = await pool.post(url, json=body, headers=headers, timeout=seconds)
        except (httpx.TimeoutException, TimeoutError) as error:
            raise ReplicaError(_reason(error), SearchFault.TIMEOUT) from None
        except httpx.HTTPError as error:
            raise ReplicaError(_reason(error), SearchFault.UNREACHABLE) from None
        except httpx.InvalidURL as error:
            return SearchFailure(_reason(error), SearchFault.DENIED)
        # Half a surrogate pair in a query has no bytes in UTF-8: the fault of this query alone.
        except UnicodeEncodeError as error:
            return SearchFailure(_reason(error), SearchFault.REFUSED)
        if response.status_code >= 500 or response.status_code == 429:
            fault = SearchFault.BUSY if response.status_code in (429, 503) else SearchFault.SERVER_ERROR
            raise ReplicaError(f"retriever answered {response.status_code}", fault, replies.retry_after(response, _LONGEST_PAUSE_S))
        return response


def merged(of_parts: Sequence[Passages], top_k: int) -> Passages:
    """Return the best `top_k` of what the parts of an index gave for each query, by score; equal scores in the parts' order.

    A hybrid index scores by reciprocal ranks, so this takes the parts' best in turns.
    """
    return [
        sorted((passage for passages in answers for passage in passages), key=lambda passage: -passage.score)[:top_k]
        for answers in zip(*of_parts, strict=True)
    ]


def _pools(url: str, token: str | None, connections: int) -> list[httpx.AsyncClient]:
    """Return connection pools of up to `_POOL` connections each, for each address; proxies of the environment are not used."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    # `_free` limits the connections. In httpx's own queue the time of waiting would count as a replica's.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_IDLE_S)
    return [httpx.AsyncClient(headers=headers, limits=limits, **httpx_options(url=url)) for _ in range(0, connections, _POOL)]


def _pause(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    return max(error.pause_s if isinstance(error, ReplicaError) else 0.0, _BACKOFF(state))


def _read(dialect: Dialect, response: httpx.Response, queries: int) -> Passages | SearchFailure:
    if response.status_code == 200:
        return replies.parse(dialect, response, queries)
    fault = SearchFault.REFUSED if response.status_code in _QUERY_REFUSED else SearchFault.DENIED
    return SearchFailure(f"retriever answered {response.status_code}: {replies.detail(response)}", fault)


def _reason(error: BaseException) -> str:
    return f"retriever cannot be reached ({type(error).__name__})"
