"""One guard against redirects into the network of this machine, in every client that goes after redirects."""

from __future__ import annotations

import ast
import socket
from typing import Any

import httpx
import pytest

from research_rl.config import addresses
from research_rl.errors import DataError
from research_rl.paths import CHECKOUT
from research_rl.process.redirects import stay_outside

HOSTS = {"public.example": "93.184.216.34", "other.example": "93.184.216.35", "rebound.example": "10.0.0.7", "mirror.example": "10.0.0.8"}


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the resolver know `HOSTS`."""
    answer = socket.getaddrinfo

    def resolver(host: str, *rest: Any) -> Any:
        return answer(HOSTS.get(host, host), *rest)

    monkeypatch.setattr(addresses.socket, "getaddrinfo", resolver)


def redirect(source: str, target: str) -> httpx.Response:
    return httpx.Response(302, headers={"Location": target}, request=httpx.Request("GET", source))


@pytest.mark.parametrize(
    "target",
    [
        *(
            "http://127.0.0.1:4200/api",
            "http://[::1]/",
            "http://169.254.169.254/latest/meta-data",
            "http://192.168.1.1/",
            "http://10.1.2.3/",
        ),
        *("http://rebound.example/", "//rebound.example/x", "http://[::ffff:127.0.0.1]/", "http://0.0.0.0/"),
    ],
)
def test_from_outside_to_inside_is_refused_without_the_secrets_of_the_address(target: str) -> None:
    with pytest.raises(DataError, match=r"^https://public\.example/a redirects to the internal address .*; name that address itself"):
        stay_outside(redirect("https://user:secret@public.example/a?sig=secret", target))


def test_other_replies_pass() -> None:
    stay_outside(redirect("https://public.example/a", "https://other.example/b"))
    stay_outside(redirect("https://public.example/a", "/b"))
    stay_outside(redirect("http://mirror.example/a", "http://127.0.0.1/b"))
    stay_outside(httpx.Response(200, request=httpx.Request("GET", "https://public.example/a")))


def test_every_client_that_follows_redirects_has_the_guard() -> None:
    calls = [
        (path, node)
        for folder in ("research_rl", "tasks", "flows")
        for path in (CHECKOUT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and any(item.arg == "follow_redirects" for item in node.keywords)
    ]
    assert {path.name for path, _ in calls} == {"http.py", "hub.py"}
    for path, call in calls:
        hooks = next((item.value for item in call.keywords if item.arg == "event_hooks"), None)
        assert hooks is not None, f"{path}:{call.lineno} follows redirects without the guard"
        assert "stay_outside" in path.read_text() or "STAY_OUTSIDE" in ast.unparse(hooks)
