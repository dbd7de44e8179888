"""What the rules of access let in and refuse, for a server on loopback behind the wrapper."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from research_rl.process.access import Access, Guard, Message, Receive, Scope, Send, basic

RULES = Access(content_types=("application/json",))
URL = "http://127.0.0.1:4200"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer 200 to whatever arrives."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"in"})


def ask(guard: Guard, method: str = "POST", path: str = "/api/flows", **options: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url=URL) as client:
            return await client.request(method, path, **options)

    return asyncio.run(main())


JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (JSON, 200),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({**JSON, "Origin": URL, "Sec-Fetch-Site": "same-origin"}, 200),
        ({**JSON, "Host": "localhost:4200", "Origin": "http://localhost:4200"}, 200),
        ({**JSON, "Origin": "http://localhost:4200", "Sec-Fetch-Site": "cross-site"}, 200),
        ({**JSON, "Origin": "https://evil.example"}, 403),
        ({**JSON, "Origin": "http://127.0.0.1:8000"}, 403),
        ({**JSON, "Origin": "null"}, 403),
        ({**JSON, "Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}, 200),
        ({**JSON, "Host": "[::1]:4200", "Origin": "http://localhost:4200"}, 200),
        ({**JSON, "Host": "evil.example:4200"}, 421),
        ({**JSON, "Host": "evil.example:4200", "Origin": "http://evil.example:4200"}, 421),
        ({**JSON, "Host": "0.0.0.0:4200"}, 421),
        ({**JSON, "Host": "4200"}, 421),
        ({**JSON, "Host": ""}, 421),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "text/plain, application/json"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({}, 415),
    ],
)
def test_a_body_passes_only_from_the_servers_own_pages_or_a_program(headers: dict[str, str], status: int) -> None:
    assert ask(Guard(echo, RULES), headers=headers, content=b"{}").status_code == status


def test_a_header_given_twice_is_refused() -> None:
    twice = [("Host", "127.0.0.1:4200"), ("Host", "evil.example"), *JSON.items()]
    assert ask(Guard(echo, RULES), headers=twice, content=b"{}").status_code == 400


@pytest.mark.parametrize("name", ["Origin", "Authorization", "Content-Type", "Sec-Fetch-Site"])
def test_no_header_that_decides_may_be_given_twice(name: str) -> None:
    assert ask(Guard(echo, RULES), "GET", headers=[(name, "a"), (name, "b")]).status_code == 400


@pytest.mark.parametrize("path", ["/health", "/HEALTH", "/health/", "/health%00"])
def test_a_health_check_without_host_or_key_is_answered_and_nothing_beside_it(path: str) -> None:
    guard = Access(authorization=basic("research:k"), open_paths=("/health",))
    refused = guard.refused({"type": "http", "method": "GET", "path": path, "headers": []})
    assert (refused is None) == (path == "/health")


def test_a_page_is_not_taken_for_the_servers_own_because_nothing_names_the_server() -> None:
    refused = RULES.refused({"type": "http", "method": "GET", "path": "/", "headers": [(b"origin", b"null")]})
    assert refused is not None and refused.reason == "origin"


@pytest.mark.parametrize(
    ("site", "mode", "status"),
    [("cross-site", "no-cors", 403), ("same-site", "no-cors", 403), ("cross-site", "navigate", 200), ("none", "navigate", 200)],
)
def test_a_foreign_page_may_link_to_the_server_but_load_nothing_from_it(site: str, mode: str, status: int) -> None:
    reply = ask(Guard(echo, RULES), "GET", "/", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": mode})
    assert reply.status_code == status and reply.headers["x-frame-options"] == "SAMEORIGIN"


def test_the_key_is_asked_for_everywhere_but_on_the_open_paths() -> None:
    guard = Guard(echo, Access(authorization=basic("research:k"), open_paths=("/health",)))
    assert ask(guard, "GET", "/health").status_code == 200
    for method, path in (("GET", "/"), ("POST", "/health"), ("GET", "/health/"), ("GET", "/api")):
        refused = ask(guard, method, path)
        assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic"), "a browser must ask the user"
    assert ask(guard, "GET", "/api", auth=("research", "wrong")).status_code == 401
    assert ask(guard, "GET", "/api", headers={"Authorization": b"Basic \xe9"}).status_code == 401
    assert ask(guard, "GET", "/api", auth=("research", "k")).status_code == 200


def websocket(guard: Guard, *headers: tuple[bytes, bytes]) -> list[str]:
    sent: list[str] = []

    async def send(message: Message) -> None:
        sent.append(message["type"])

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    scope = {"type": "websocket", "path": "/api/events/out", "client": None, "headers": [(b"host", b"127.0.0.1:4200"), *headers]}
    asyncio.run(guard(scope, receive, send))
    return sent


def test_a_websocket_of_a_foreign_page_is_closed_before_it_opens() -> None:
    assert websocket(Guard(echo, RULES), (b"origin", b"https://evil.example")) == ["websocket.close"]
    assert websocket(Guard(echo, RULES)) != ["websocket.close"]
