"""Connections that send nothing whole are closed; those that are at work, web sockets too, are not."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from websockets.sync.client import connect

from research_rl.process.connections import bounded
from tests.answering import until

HEADERS_S = 0.5
UNREAD_S = 1.0
LEFT = threading.Event()


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answer a request by 200, that for /endless without an end, and on a web socket whatever was sent."""
    if scope["type"] == "http" and scope["path"] == "/endless":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not LEFT.is_set():
            await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
            await asyncio.sleep(0.001)
    elif scope["type"] == "http":
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
    if scope["type"] == "http":
        return
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"]})


@contextmanager
def served(limit: int, headers_s: float = HEADERS_S) -> Generator[tuple[int, list[str]]]:
    """Yield the port of a server with at most `limit` connections, and the reasons for which it closed some."""
    refused: list[str] = []
    protocol = bounded(limit, refused.append, headers_s, UNREAD_S)
    server = uvicorn.Server(uvicorn.Config(echo, port=0, log_level="warning", lifespan="off", http=protocol))  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1], refused
    finally:
        server.should_exit = True
        thread.join()


def unfinished(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ")
    return connection


def test_headers_that_do_not_come_to_an_end_are_answered_408() -> None:
    with served(100) as (port, refused), unfinished(port) as slow:
        assert slow.makefile("rb").readline().startswith(b"HTTP/1.1 408")
        assert refused == ["headers"]
        assert httpx.get(f"http://127.0.0.1:{port}/", trust_env=False).text == "ok"


def test_past_the_limit_the_oldest_unfinished_connection_gives_way() -> None:
    with served(3, headers_s=600.0) as (port, refused):
        slow = [unfinished(port) for _ in range(3)]
        assert httpx.get(f"http://127.0.0.1:{port}/", trust_env=False, timeout=60).text == "ok"
        assert slow[0].makefile("rb").readline().startswith(b"HTTP/1.1 503") and refused[0] == "connections"
        for connection in slow:
            connection.close()


def test_a_client_that_reads_nothing_of_its_reply_is_cut_off_and_one_that_reads_slowly_is_not() -> None:
    with served(100, headers_s=600.0) as (port, refused), socket.create_connection(("127.0.0.1", port), timeout=60) as silent:
        try:
            silent.sendall(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
            until(lambda: refused == ["unread"])
            slow = socket.create_connection(("127.0.0.1", port), timeout=60)
            slow.sendall(b"GET /endless HTTP/1.1\r\nHost: localhost\r\n\r\n")
            ends = time.monotonic() + 4 * UNREAD_S
            while time.monotonic() < ends:
                assert slow.recv(1 << 22)
                time.sleep(UNREAD_S / 20)
            assert refused == ["unread"]
            slow.close()
        finally:
            LEFT.set()


def test_a_web_socket_outlives_the_deadline_for_headers() -> None:
    """Prefect's workers and `--watch` hear of events over one that stays open for as long as they run."""
    with served(100) as (port, refused):
        with connect(f"ws://127.0.0.1:{port}/", proxy=None) as events:
            for text in ("one", "two"):
                time.sleep(3 * HEADERS_S)
                events.send(text)
                assert events.recv(60) == text
        assert refused == []
