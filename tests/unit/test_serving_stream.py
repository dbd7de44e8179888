"""A streamed turn is the same completion as a whole one, in vLLM's and in SGLang's form, and a stream that breaks off is an error."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, Literal

import pytest
import uvicorn

from research_rl.episode.agent import Completion
from research_rl.errors import ServiceError
from research_rl.process.server_events import data_of
from research_rl.process.services import Endpoint
from research_rl.serving.client import HttpEngine, Pieces, Sampling, parse_sglang, parse_vllm

STOP = ("</search>",)


def vllm(ids: Sequence[int], finish: str | None = None, stop: str | None = None, logprobs: bool = True) -> dict[str, Any]:
    values = {"token_logprobs": [-0.5] * len(ids), "tokens": ["x"] * len(ids)} if logprobs else None
    # The text holds ends of lines of every kind that JSON leaves as they are.
    choice = {"index": 0, "text": "\u2028\x85", "token_ids": list(ids), "logprobs": values, "finish_reason": finish, "stop_reason": stop}
    return {"id": "cmpl-1", "object": "text_completion", "choices": [choice]}


def sglang(ids: Sequence[int], total: int, finish: dict[str, Any] | None = None) -> dict[str, Any]:
    tokens = [[-0.5, token, None] for token in ids]
    return {"text": "x", "meta_info": {"output_token_logprobs": tokens, "completion_tokens": total, "finish_reason": finish}}


def taken(engine: Literal["vllm", "sglang"], *messages: dict[str, Any]) -> tuple[list[list[int]], Completion]:
    pieces = Pieces(engine, STOP)
    return [list(pieces.take(message)) for message in messages], pieces.completion()


@pytest.mark.parametrize(("finish", "stop"), [("stop", "</search>"), ("stop", None), ("length", None)])
@pytest.mark.parametrize("logprobs", [True, False])
def test_pieces_of_vllm_make_the_whole(finish: str, stop: str | None, logprobs: bool) -> None:
    new, completion = taken(
        "vllm",
        vllm([1, 2], logprobs=logprobs),
        vllm([], logprobs=logprobs),
        vllm([3], finish, stop, logprobs),
        {"choices": [], "usage": {}},
    )
    assert new == [[1, 2], [], [3], []]
    assert completion == parse_vllm(vllm([1, 2, 3], finish, stop, logprobs), STOP)


def test_pieces_of_sglang_make_the_whole_whether_it_repeats_them_or_not() -> None:
    end = {"type": "stop", "matched": "</search>"}
    whole = parse_sglang(sglang([1, 2, 3], 3, end), STOP)
    for messages in (
        (sglang([1], 1), sglang([1, 2], 2), sglang([1, 2, 3], 3, end)),
        (sglang([1], 1), sglang([2], 2), sglang([3], 3, end)),
    ):
        assert taken("sglang", *messages) == ([[1], [2], [3]], whole)


def test_a_stream_without_an_end_is_an_error() -> None:
    with pytest.raises(ServiceError, match="ended after 2 tokens without a finish_reason"):
        taken("vllm", vllm([1, 2]))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_data_of_events_is_read_however_it_is_cut(size: int) -> None:
    text = ': waiting\n\nevent: a\ndata: {"a": "\u2028\x85"}\r\n\r\ndata:1\n\ndata: [DONE]\n\ndata: never\n'.encode()

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(text), size):
            yield text[start : start + size]

    async def main() -> list[str]:
        return [data async for data in data_of(chunks())]

    assert asyncio.run(main()) == ['{"a": "\u2028\x85"}', "1"]


class Server:
    """Streams `messages`, then drops the connection, fails, or ends as told; the first `busy` requests get 503."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.drops, self.busy, self.asked = False, 0, list[dict[str, Any]]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while (message := await receive()).get("more_body"):
            body += message["body"]
        self.asked.append(json.loads(body + message["body"]))
        if len(self.asked) <= self.busy:
            await send({"type": "http.response.start", "status": 503, "headers": []})
            await send({"type": "http.response.body", "body": b"busy"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for event in self.messages:
            data = f"data: {json.dumps(event, ensure_ascii=False)}\n\n".encode()
            await send({"type": "http.response.body", "body": data, "more_body": True})
        if self.drops:
            raise ConnectionResetError("the test drops this connection")
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


@pytest.fixture
def server() -> Iterator[tuple[Server, str]]:
    app = Server()
    running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    yield app, f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.should_exit = True
    thread.join()


def streamed(url: str, engine: Literal["vllm", "sglang"] = "vllm") -> tuple[list[int], Completion]:
    told: list[int] = []

    async def main() -> Completion:
        async with HttpEngine(Endpoint(url, "t", "m"), Sampling(), engine=engine, attempts=2) as client:
            return await client.stream([1], ["</search>"], 9, told.extend)

    return told, asyncio.run(main())


def test_a_turn_is_streamed_over_http_and_asked_again_while_nothing_came(server: tuple[Server, str]) -> None:
    app, url = server
    app.messages, app.busy = [vllm([1, 2], logprobs=False), vllm([3], "stop", "</search>", False)], 1
    assert streamed(url) == ([1, 2, 3], Completion((1, 2, 3), (0.0,) * 3, "stop"))
    assert [body["stream"] for body in app.asked] == [True, True] and app.asked[0]["return_token_ids"] is True
    app.messages = [sglang([4], 1), sglang([4, 5], 2, {"type": "length"})]
    assert streamed(url, "sglang")[1] == Completion((4, 5), (-0.5, -0.5), "length")


def test_a_turn_that_breaks_off_is_not_asked_again(server: tuple[Server, str]) -> None:
    app, url = server
    app.messages, app.drops = [vllm([1, 2])], True
    with pytest.raises(ServiceError, match="broke off within a turn"):
        streamed(url)
    assert len(app.asked) == 1


def test_a_server_that_stays_busy_is_given_up_with_its_last_refusal(server: tuple[Server, str]) -> None:
    app, url = server
    app.busy = 2
    with pytest.raises(ServiceError, match=r"failed 2 times at /v1/completions, last: HTTP 503: busy"):
        streamed(url)

    async def whole() -> Completion:
        async with HttpEngine(Endpoint(url, "t", "m"), Sampling(), attempts=2) as client:
            return await client.generate([1], ["</search>"], 9)

    app.busy = 4
    with pytest.raises(ServiceError, match=r"failed 2 times at /v1/completions, last: HTTP 503: busy"):
        asyncio.run(whole())
    assert len(app.asked) == 4


def test_a_turn_that_its_reader_leaves_ends_at_once(server: tuple[Server, str]) -> None:
    app, url = server
    app.messages = [vllm([1, 2])]

    def leave(ids: Sequence[int]) -> None:
        raise KeyError(ids[0])

    async def main() -> Completion:
        async with HttpEngine(Endpoint(url, "t", "m"), Sampling(), attempts=2) as client:
            return await client.stream([1], ["</search>"], 9, leave)

    with pytest.raises(KeyError):
        asyncio.run(main())
    assert len(app.asked) == 1, "what a reader raises is no failure of the server"


def test_an_error_that_is_streamed_is_told(server: tuple[Server, str]) -> None:
    app, url = server
    app.messages = [vllm([1]), {"error": {"message": "the engine died", "code": 500}}]
    with pytest.raises(ServiceError, match=r"failed within a turn: .*the engine died"):
        streamed(url)
