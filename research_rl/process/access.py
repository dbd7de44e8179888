"""Who may ask a server of this project: by Host, by the page that sent the browser, by network, body and key. Standard library only.

A request passes when (1) its Host is one of the server's own names, so that a name which was made to resolve to this machine gives no
access (DNS rebinding); (2) it was not sent by a page of another origin; (3) it comes from an allowed network; (4) its body has a content
type for which a browser asks before it sends it across origins; (5) it carries the key. Each rule but the first two is optional.
Headers alone are read, and only once: one that two readers could understand differently is refused.
"""

from __future__ import annotations

import base64
import hmac
import ipaddress
import json
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from typing import Any, NamedTuple

from research_rl.process.proxies import LOOPBACK

__all__ = ["Access", "Guard", "Refused", "basic", "bearer"]

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_NO_FRAMES = {b"x-frame-options": b"SAMEORIGIN", b"x-content-type-options": b"nosniff"}
_POLICY_VIOLATION = 1008
_READ = ("host", "origin", "sec-fetch-site", "sec-fetch-mode", "content-type", "authorization")
_SHOWN = 80
# uvicorn configures this logger in every server; one of our own would have no handler there.
_logger = logging.getLogger("uvicorn.error")


def basic(user_and_key: str) -> str:
    """Return the header Authorization for `user:key`."""
    return f"Basic {base64.b64encode(user_and_key.encode()).decode()}"


def bearer(token: str) -> str:
    """Return the header Authorization for a token."""
    return f"Bearer {token}"


class Refused(NamedTuple):
    """Why a request is refused: status, a word for counters, and a text for its sender."""

    status: int
    reason: str
    detail: str


class Access:
    """The rules of one server.

    `names` are the host names under which it is addressed, without port; loopback's always are. `outside` says that it is bound for
    other machines: any address and any name without a dot, which nobody can register, are its own then. `authorization` is the header
    that carries the key, for every path but GET of the `open_paths`; None where the application checks one. `remedies` follow the
    text of a refusal by its word: they name the setting to change.
    """

    def __init__(
        self,
        names: Collection[str] = (),
        *,
        outside: bool = False,
        networks: Collection[Network] = (),
        content_types: Collection[str] = (),
        authorization: str | None = None,
        open_paths: Collection[str] = (),
        remedies: Mapping[str, str] | None = None,
    ) -> None:
        self._names = {*LOOPBACK, *(_name(name) for name in names)}
        self._outside, self._networks, self._open_paths = outside, tuple(networks), frozenset(open_paths)
        self._content_types, self._remedies = frozenset(content_types), remedies or {}
        self._authorization = authorization

    @property
    def challenge(self) -> str:
        """The header WWW-Authenticate of a 401: a browser asks the user for user and key, a program learns that a token is needed."""
        basic = self._authorization is not None and self._authorization.startswith("Basic ")
        return 'Basic realm="research-rl", charset="UTF-8"' if basic else "Bearer"

    def refused(self, scope: Scope) -> Refused | None:
        """Return why a request, or the opening of a websocket, may not be answered; None when it may."""
        sent = [(key.decode("latin-1").lower(), value.decode("latin-1")) for key, value in scope["headers"]]
        headers = dict(sent)
        refused = self._twice([key for key, _ in sent]) or self._foreign_host(headers)
        refused = refused or self._foreign_page(headers, scope.get("method", "websocket")) or self._foreign_body(headers)
        if refused is None and not (scope["path"] in self._open_paths and scope.get("method") in ("GET", "HEAD")):
            refused = self._foreign_network(scope) or self._no_key(headers)
        if refused is None:
            return None
        remedy = self._remedies.get(refused.reason)
        return refused._replace(detail=f"{refused.detail}; {remedy}") if remedy else refused

    def _twice(self, names: list[str]) -> Refused | None:
        twice = [name for name in _READ if names.count(name) > 1]
        return Refused(400, "header", f"the header {twice[0]} is given {names.count(twice[0])} times; send it once") if twice else None

    def _foreign_host(self, headers: dict[str, str]) -> Refused | None:
        host = headers.get("host")
        # Every browser sends Host; what sends none is a health check of HTTP/1.0.
        if host is None or self._own(_name(host)):
            return None
        return Refused(421, "host", f"Host {host[:_SHOWN]!r} is not a name of this server")

    def _own(self, name: str) -> bool:
        if name in self._names:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback or self._outside
        except ValueError:
            return self._outside and "." not in name and name != ""

    def _foreign_page(self, headers: dict[str, str], method: str) -> Refused | None:
        origin, host = headers.get("origin"), headers.get("host", "")
        site, mode = headers.get("sec-fetch-site", "none"), headers.get("sec-fetch-mode")
        if origin is not None:
            foreign = not host or not _same(origin.partition("://")[2], host)
        else:  # browsers send no Origin with a GET for an image or a script, but say that another site asks for it
            followed_link = mode == "navigate" and method == "GET"
            foreign = site not in ("none", "same-origin") and not followed_link
        if not foreign:
            return None
        sender = (origin or site)[:_SHOWN]
        return Refused(403, "origin", f"a web page of another origin ({sender}) may not ask this server; call it without a browser")

    def _foreign_body(self, headers: dict[str, str]) -> Refused | None:
        if not self._content_types or (headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers):
            return None
        content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type in self._content_types:
            return None
        accepted = " or ".join(sorted(self._content_types))
        return Refused(415, "type", f"Content-Type {content_type[:_SHOWN]!r} is not accepted; send {accepted}")

    def _foreign_network(self, scope: Scope) -> Refused | None:
        if not self._networks:
            return None
        sender = ipaddress.ip_address(scope["client"][0].partition("%")[0])
        sender = getattr(sender, "ipv4_mapped", None) or sender
        if sender.is_loopback or any(sender in network for network in self._networks):
            return None
        return Refused(403, "network", f"{sender} is in none of the allowed networks")

    def _no_key(self, headers: dict[str, str]) -> Refused | None:
        if self._authorization is None:
            return None
        if hmac.compare_digest(headers.get("authorization", "").encode("latin-1"), self._authorization.encode("latin-1")):
            return None
        kind = "bearer token is" if self.challenge == "Bearer" else "user and key are"
        return Refused(401, "token", f"the {kind} missing or wrong")


def _name(host: str) -> str:
    """Return a Host header's name without port, brackets and final dot."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.rsplit(":", 1)[0].lower().rstrip(".") if host.count(":") == 1 else host.lower().rstrip(".")


def _same(origin: str, host: str) -> bool:
    """Whether a page at `origin` belongs to the server at `host`; one may be opened as localhost and ask the address that it stands for."""
    ports = [text.rpartition("]")[2].partition(":")[2] for text in (origin, host)]
    return origin == host or (ports[0] == ports[1] and _name(origin) in LOOPBACK and _name(host) in LOOPBACK)


class Guard:
    """The ASGI wrapper that holds the rules of `access` for an application that knows none. Refused requests are logged and `told`."""

    def __init__(self, app: App, access: Access, on_refused: Callable[[Refused], None] = lambda refused: None) -> None:
        self._app, self._access, self._on_refused = app, access, on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request or websocket, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
        elif refused := self._access.refused(scope):
            _logger.warning(
                "refused %s %r from %s: %s", scope.get("method", "websocket"), scope["path"], scope.get("client"), refused.detail
            )
            self._on_refused(refused)
            await _refuse(scope, send, refused, self._access.challenge)
        else:
            await self._app(scope, receive, _with_headers(send))


async def _refuse(scope: Scope, send: Send, refused: Refused, challenge: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": refused.detail})
        return
    headers = [(b"content-type", b"application/json"), *_NO_FRAMES.items()]
    if refused.status == 401:
        headers.append((b"www-authenticate", challenge.encode()))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": refused.detail}).encode()})


def _with_headers(send: Send) -> Send:
    """Return a `send` that keeps pages of other origins from showing this server in a frame."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            present = {name.lower() for name, _ in headers}
            message["headers"] = [*headers, *(pair for pair in _NO_FRAMES.items() if pair[0] not in present)]
        await send(message)

    return send_with_headers
