"""Who may ask the retriever: by Host, by the page that sent the browser, by network and by token. Reads headers only.

Invariants: (1) a page of another site is refused, whatever name of this machine it uses; (2) /health and /readyz need neither
token nor network, and say nothing about what is served.
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Mapping
from typing import NamedTuple

from starlette.types import Scope

from research_rl.config import RetrieverConfig
from research_rl.retriever import LOOPBACK, TOKEN

__all__ = ["Access", "Refused"]

_OPEN = ("/health", "/readyz")


class Refused(NamedTuple):
    """Why a request is refused: status, a word for the counter, and a text for its sender."""

    status: int
    reason: str
    detail: str


class Access:
    """The rules of one service. `token` is what clients must send, unless `retriever.auth` is none."""

    def __init__(self, config: RetrieverConfig, token: str | None) -> None:
        self._bearer = f"Bearer {token}".encode() if token and config.auth == "token" else None
        self._networks = [ipaddress.ip_network(network, strict=False) for network in config.allow]
        self._names = {"localhost", *(name.lower().strip("[]") for name in (config.host, *config.hosts))}
        self._outside = config.host not in LOOPBACK

    def refused(self, scope: Scope) -> Refused | None:
        """Return why a request may not be answered; None when it may."""
        headers: dict[bytes, bytes] = dict(scope["headers"])
        if answer := self._foreign_host(headers) or self._foreign_page(headers, scope["method"]):
            return answer
        if scope["path"] in _OPEN:
            return None
        return self._foreign_network(scope) or self._no_token(headers)

    def _foreign_host(self, headers: Mapping[bytes, bytes]) -> Refused | None:
        """A page whose name was made to resolve to this machine (DNS rebinding) still sends its own name as Host."""
        host = headers.get(b"host", b"localhost").decode("latin-1")
        if self._own(_name(host)):
            return None
        return Refused(421, "host", f"Host {host[:80]!r} is not a name of this service; add it to retriever.hosts or use its address")

    def _own(self, name: str) -> bool:
        if name in self._names:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback or self._outside
        except ValueError:
            # A name without a dot is one of the local network (a compose service, a pod): nobody can register it.
            return self._outside and "." not in name and name != ""

    def _foreign_page(self, headers: Mapping[bytes, bytes], method: str) -> Refused | None:
        origin, host = headers.get(b"origin"), headers.get(b"host", b"")
        site, mode = headers.get(b"sec-fetch-site", b"none"), headers.get(b"sec-fetch-mode", b"")
        foreign = origin is not None and origin.partition(b"://")[2] != host
        followed_link = mode == b"navigate" and method == "GET"
        if foreign or (site not in (b"none", b"same-origin") and not followed_link):
            sender = (origin or site).decode("latin-1")[:80]
            return Refused(403, "origin", f"a web page of another origin ({sender}) may not ask this service; call it without a browser")
        return None

    def _foreign_network(self, scope: Scope) -> Refused | None:
        if not self._networks:
            return None
        sender = ipaddress.ip_address(scope["client"][0].partition("%")[0])
        sender = getattr(sender, "ipv4_mapped", None) or sender
        if sender.is_loopback or any(sender in network for network in self._networks):
            return None
        return Refused(403, "network", f"{sender} is in none of the networks of retriever.allow; add its network")

    def _no_token(self, headers: Mapping[bytes, bytes]) -> Refused | None:
        if self._bearer is None or secrets.compare_digest(headers.get(b"authorization", b""), self._bearer):
            return None
        return Refused(401, "token", f"the bearer token is missing or wrong; set {TOKEN} to the service's")


def _name(host: str) -> str:
    """Return a Host header's name without port, brackets and final dot."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rsplit(":", 1)[0].lower().rstrip(".") if host.count(":") == 1 else host.lower().rstrip(".")
