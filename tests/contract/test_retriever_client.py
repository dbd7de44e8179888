"""Whatever a server does, the client answers in time: passages, or a SearchFailure that says why. Never an exception."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from research_rl.episode.agent import SearchFailure
from research_rl.episode.trajectory import Passage, SearchFault
from research_rl.retriever.client import RetrieverClient

GOOD = [[[{"id": "1", "contents": "x"}]], [[0.5]]]
Reply = tuple[int, bytes, dict[str, str]]


class Server(ThreadingHTTPServer):
    """Gives the scripted replies in order, the last one for ever."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.asked, self.pause = list[Reply](), list[dict[str, Any]](), 0.0
        self.url = f"http://127.0.0.1:{self.server_port}"

    def then(self, status: int, body: Any, **headers: str) -> Server:
        self.script.append((status, body if isinstance(body, bytes) else json.dumps(body).encode(), headers))
        return self


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({"path": self.path, "token": self.headers.get("Authorization"), **asked})
        time.sleep(self.server.pause)
        status, body, headers = self.server.script[min(len(self.server.asked), len(self.server.script)) - 1]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def ask(url: str, work: Callable[[RetrieverClient], Awaitable[Any]], **options: Any) -> Any:
    async def run() -> Any:
        async with RetrieverClient(url, **options) as client:
            return await work(client)

    return asyncio.run(run())


def test_it_asks_in_the_original_format_and_keeps_no_result(server: Server) -> None:
    server.then(200, GOOD)

    async def twice(client: RetrieverClient) -> Any:
        first = await client.search(["q"], 3)
        assert isinstance(first, list)
        first[0].clear()
        return await client.search(["q"], 3)

    assert ask(server.url, twice, token="t") == [[Passage("1", "x", 0.5)]]
    assert server.asked == [{"path": "/batch_search", "token": "Bearer t", "query": ["q"], "top_n": 3, "return_score": True}] * 2


def test_equal_searches_in_flight_are_sent_once_and_one_may_leave(server: Server) -> None:
    server.then(200, GOOD).pause = 0.3

    async def eight(client: RetrieverClient) -> Any:
        tasks = [asyncio.create_task(client.search(["q"], 1)) for _ in range(8)]
        await asyncio.sleep(0.1)
        tasks[0].cancel()
        return await asyncio.gather(*tasks[1:])

    assert ask(server.url, eight) == [[[Passage("1", "x", 0.5)]]] * 7
    assert len(server.asked) == 1


def test_many_searches_at_once_all_come_back(server: Server) -> None:
    server.then(200, GOOD).pause = 0.02

    async def many(client: RetrieverClient) -> Any:
        return await asyncio.gather(*(client.search([f"q{n}"], 1) for n in range(64)))

    assert ask(server.url, many, timeout_s=300.0) == [[[Passage("1", "x", 0.5)]]] * 64


def test_it_tries_again_after_503_and_500(server: Server) -> None:
    server.then(503, {"detail": "full"}, Retry_After="0").then(500, b"oops").then(200, GOOD)
    assert ask(server.url, lambda client: client.search(["q"], 1)) == [[Passage("1", "x", 0.5)]]
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    "body",
    [
        b"not json", b"", [], {}, None, [[], []], [[[{"id": "1"}]], [[0.5]]], [[[{"id": 1, "contents": "x"}]], [[0.5]]],
        [[[{"id": "1", "contents": "x"}]], [[0.5, 0.1]]], [[[{"id": "1", "contents": "x"}]], [["high"]]], [[["x"]], [[1]]],
        [GOOD[0] * 2, GOOD[1] * 2], b"\xff" * 100, b"[" * 5000,
    ],
)  # fmt: skip
def test_a_garbled_reply_is_a_failure_at_once(server: Server, body: Any) -> None:
    server.then(200, body)
    found = ask(server.url, lambda client: client.search(["q"], 1))
    assert isinstance(found, SearchFailure)
    assert len(server.asked) == 1


def test_a_truncated_reply_and_a_lasting_500_end_in_time(server: Server) -> None:
    server.then(200, b'[[[{"id"', Content_Length="1000")
    started = time.monotonic()
    found = ask(server.url, lambda client: client.search(["q"], 1), timeout_s=1.0)
    assert isinstance(found, SearchFailure)
    assert "cannot be reached" in found.reason
    assert "tries in 1 s" in found.reason
    assert time.monotonic() - started < 3


def test_a_silent_server_and_an_absent_one_end_in_time(server: Server) -> None:
    server.then(200, GOOD).pause = 3.0
    for url in (server.url, "http://127.0.0.1:9", "http://no.such.host.invalid", "nonsense"):
        started = time.monotonic()
        found = ask(url, lambda client: client.search(["q"], 1), timeout_s=0.5)
        assert isinstance(found, SearchFailure), url
        assert time.monotonic() - started < 2.5


def test_a_refused_request_is_not_repeated_and_says_why(server: Server) -> None:
    server.then(422, {"detail": "top_n=500 exceeds 100"})
    assert ask(server.url, lambda client: client.search(["q"], 500)) == SearchFailure(
        "retriever answered 422: top_n=500 exceeds 100", SearchFault.REFUSED
    )
    assert len(server.asked) == 1


def test_failures_are_not_kept_and_odd_queries_do_no_harm(server: Server) -> None:
    server.then(422, {"detail": "no"}).then(200, GOOD)

    async def twice(client: RetrieverClient) -> Any:
        return [
            await client.search(["q"], 1),
            await client.search(["q"], 1),
            await client.search([], 1),
            await client.search(["\ud800"], 1),
        ]

    failed, found, none, odd = ask(server.url, twice)
    assert isinstance(failed, SearchFailure)
    assert found == [[Passage("1", "x", 0.5)]]
    assert none == []
    assert isinstance(odd, SearchFailure | list)
    assert isinstance(ask("http://127.0.0.1:9", lambda client: client.health()), SearchFailure)


def test_every_search_and_every_try_is_accounted_for(server: Server) -> None:
    server.then(503, {}).then(200, [[[]], [[]]]).then(200, [[], []]).then(200, GOOD).pause = 0.05

    async def work(client: RetrieverClient) -> Any:
        empty = await asyncio.gather(*(client.search(["q"], 1) for _ in range(4)))
        garbage = await client.search(["q"], 1)
        good = [await client.search(["q"], 1) for _ in range(3)]
        return empty, garbage, good, client.take_counts(), client.take_counts()

    empty, garbage, good, counts, after = ask(server.url, work)
    assert empty == [[[]]] * 4 and good == [[[Passage("1", "x", 0.5)]]] * 3
    assert garbage.fault is SearchFault.GARBAGE
    assert counts == {"asked": 8, "joined": 3, "tries": 6, "failed_tries/busy": 1, "failed_tries/garbage": 1}
    assert after == {} and len(server.asked) == 6


def test_a_server_of_search_r1_is_spoken_to_in_its_own_format(server: Server) -> None:
    """It has /retrieve only, gives no /health, and its corpora hold numbers as ids, or none."""
    hits = [{"document": {"id": 7, "contents": '"A"\nB'}, "score": 0.75}, {"document": {"contents": "C"}, "score": 0.5}]
    server.then(404, {"detail": "Not Found"}).then(200, {"result": [hits]}).then(200, {"result": [hits]})

    async def twice(client: RetrieverClient) -> Any:
        return [await client.search([query], 2) for query in ("q", "r")]

    assert ask(server.url, twice) == [[[Passage("7", '"A"\nB', 0.75), Passage("", "C", 0.5)]]] * 2
    assert [request["path"] for request in server.asked] == ["/batch_search", "/retrieve", "/retrieve"]
    assert {name: server.asked[1][name] for name in ("queries", "topk", "return_scores")} == {
        "queries": ["q"],
        "topk": 2,
        "return_scores": True,
    }


def test_an_address_that_is_no_retriever_and_a_wrong_token_are_named(server: Server) -> None:
    server.then(404, {"detail": "Not Found"}).then(404, {"detail": "Not Found"}).then(401, {"detail": "the bearer token is wrong"})

    async def twice(client: RetrieverClient) -> Any:
        return [await client.search([query], 2) for query in ("q", "r")]

    absent, denied = ask(server.url, twice)
    assert absent == SearchFailure(f"{server.url} has neither /batch_search nor /retrieve; name a retriever's address", SearchFault.DENIED)
    assert denied == SearchFailure("retriever answered 401: the bearer token is wrong", SearchFault.DENIED)
