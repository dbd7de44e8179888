"""Who may search: names, networks and tokens by the service's settings, and what a token may hold."""

from __future__ import annotations

from typing import Any

import pytest

from research_rl.config import RetrieverConfig
from research_rl.errors import ConfigError
from research_rl.process.tokens import checked_token, require_token_outside
from research_rl.retriever import TOKEN
from research_rl.retriever.gateway import access


def status(config: dict[str, Any], client: str = "127.0.0.1", path: str = "/search", token: str | None = "t", **headers: str) -> int:
    """Return the status of the refusal, 200 when there is none."""
    sent = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"path": path, "method": "GET" if path in ("/health", "/readyz") else "POST", "headers": sent, "client": (client, 1)}
    refused = access(RetrieverConfig.model_validate(config), token).refused(scope)
    return refused.status if refused else 200


OUTSIDE = {"host": "0.0.0.0", "auth": "none"}


@pytest.mark.parametrize(
    ("config", "host", "expected"),
    [
        ({}, "localhost:8000", 200),
        ({}, "127.0.0.1:8000", 200),
        ({}, "LOCALHOST.", 200),
        ({}, "10.0.0.1", 421),
        ({}, "retriever", 421),
        (OUTSIDE, "10.0.0.1:8080", 200),
        (OUTSIDE, "retriever:8080", 200),
        (OUTSIDE, "retriever.example.org", 421),
        ({**OUTSIDE, "hosts": ["retriever.example.org"]}, "retriever.example.org:80", 200),
        ({"host": "search.lan.example", "auth": "none"}, "search.lan.example", 200),
    ],
)
def test_the_names_by_which_a_service_may_be_addressed(config: dict[str, Any], host: str, expected: int) -> None:
    assert status(config, token=None, host=host) == expected


def test_a_refusal_names_the_setting_to_change() -> None:
    def told(config: dict[str, Any], **headers: str) -> str:
        scope = {"path": "/search", "method": "POST", "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
        refused = access(RetrieverConfig.model_validate(config), "t").refused({**scope, "client": ("192.168.0.1", 1)})
        assert refused
        return refused.detail

    assert "add it to retriever.hosts" in told({}, host="search.example") and "'search.example'" in told({}, host="search.example")
    assert "add its network to retriever.allow" in told({"allow": ["10.0.0.0/8"]}) and "RESEARCH_RETRIEVER_TOKEN" in told({})


def test_a_page_of_another_machine_of_the_network_may_not_search() -> None:
    host = "10.0.0.5:8080"
    assert status(OUTSIDE, token=None, host=host, origin=f"http://{host}") == 200
    for origin in ("http://10.0.0.6:8080", "http://10.0.0.5:80", "http://localhost:8080", "null"):
        assert status(OUTSIDE, token=None, host=host, origin=origin) == 403, origin


def test_only_allowed_networks_and_this_machine_may_search() -> None:
    config = {**OUTSIDE, "allow": ["10.0.0.0/8", "fd00::/8"]}
    senders = {"10.1.2.3": 200, "fd00::1": 200, "::ffff:10.1.2.3": 200, "127.0.0.1": 200, "192.168.0.1": 403, "fe80::1%eth0": 403}
    assert {sender: status(config, sender, token=None) for sender in senders} == senders
    assert status(config, "192.168.0.1", path="/health") == 200
    with pytest.raises(ValueError, match="is no network; write it as"):
        RetrieverConfig(allow=("everyone",))


def test_a_token_is_required_unless_that_is_switched_off() -> None:
    assert status({}, authorization="Bearer t") == 200 and status({}) == 401 and status({}, path="/readyz") == 200
    assert status({"auth": "none"}) == 200


def test_a_service_for_others_needs_a_token_or_says_that_it_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"no token is set.*retriever\.auth=none and retriever\.allow"):
        require_token_outside("retriever", RetrieverConfig(host="0.0.0.0"), None, TOKEN)
    require_token_outside("retriever", RetrieverConfig(host="0.0.0.0"), "t", TOKEN)
    assert capsys.readouterr().err == ""
    require_token_outside("retriever", RetrieverConfig(host="0.0.0.0", auth="none"), None, TOKEN)
    assert "warning: retriever.auth=none: 0.0.0.0 answers whoever reaches it" in capsys.readouterr().err


def test_a_token_is_taken_without_line_end_and_refused_when_no_header_carries_it() -> None:
    assert checked_token("secret\n", "the file") == "secret" and checked_token(" \n", "the file") is None
    for token in ("gehéim", "two words", "a\nb", "a\x00b"):
        with pytest.raises(ConfigError, match=r"the file has the character U\+[0-9A-F]{4} at position \d+") as refused:
            checked_token(token, "the file")
        assert token not in str(refused.value)
