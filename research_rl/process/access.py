"""An ASGI wrapper that lets in what a server on loopback is for, and nothing a foreign web page sends. Standard library only.

A request passes when (1) its Host is one of the server's own names, so that a name which resolves to 127.0.0.1 gives no access;
(2) it was not sent by a page of another origin; (3) its body has a content type for which a browser asks before it sends it across
origins; (4) it carries the user and key, where the wrapper checks one. Refused requests are logged.
"""

from __future__ import annotations

import base64
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

__all__ = ["Guard", "local_names"]

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_NO_FRAMES = {b"x-frame-options": b"SAMEORIGIN", b"x-content-type-options": b"nosniff"}
_POLICY_VIOLATION = 1008
# uvicorn configures this logger in every server; one of our own would have no handler there.
_logger = logging.getLogger("uvicorn.error")


def local_names(port: int) -> tuple[str, str]:
    """Return the values of Host under which a server on loopback is reached."""
    return f"127.0.0.1:{port}", f"localhost:{port}"


class Refusal(Exception):
    """A request is not answered: the status, and the reason in one sentence."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Guard:
    """The wrapper around `app`. `names` are its values of Host; `user_and_key` is `user:key`, None where the application checks one.

    `open_paths` are answered without the key, for health checks.
    """

    def __init__(
        self,
        app: App,
        names: Collection[str],
        *,
        content_types: Collection[str] = ("application/json",),
        user_and_key: str | None = None,
        open_paths: Collection[str] = (),
    ) -> None:
        self._app, self._names, self._content_types, self._open_paths = app, frozenset(names), frozenset(content_types), open_paths
        self._origins = frozenset(f"http://{name}" for name in names)
        self._authorization = f"Basic {base64.b64encode(user_and_key.encode()).decode()}" if user_and_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request or websocket, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
        except Refusal as refusal:
            _logger.warning("refused %s %r from %s: %s", scope.get("method", "websocket"), scope["path"], scope.get("client"), refusal)
            await _refuse(scope, send, refusal)
            return
        await self._app(scope, receive, _with_headers(send))

    def _check(self, scope: Scope) -> None:
        headers = _Headers(scope)
        self._check_host(headers)
        self._check_origin(headers)
        self._check_body(headers)
        self._check_key(scope, headers)

    def _check_host(self, headers: _Headers) -> None:
        if headers.one("host") not in self._names:
            raise Refusal(403, f"Host {headers.one('host')!r} is not a name of this server ({', '.join(sorted(self._names))})")

    def _check_origin(self, headers: _Headers) -> None:
        origin = headers.one("origin")
        if origin is not None and origin not in self._origins:
            raise Refusal(403, f"Origin {origin!r} is not this server's own")
        # Browsers send no Origin with a GET for an image or a script, but say that another site asks for it. A followed link may pass.
        foreign = headers.one("sec-fetch-site") in ("cross-site", "same-site")
        if origin is None and foreign and headers.one("sec-fetch-mode") != "navigate":
            raise Refusal(403, "a page of another origin asks for this")

    def _check_body(self, headers: _Headers) -> None:
        if headers.one("content-length") in (None, "0") and headers.one("transfer-encoding") is None:
            return
        content_type = (headers.one("content-type") or "").partition(";")[0].strip().lower()
        if content_type not in self._content_types:
            raise Refusal(415, f"Content-Type {content_type!r} is not accepted; send {' or '.join(sorted(self._content_types))}")

    def _check_key(self, scope: Scope, headers: _Headers) -> None:
        if self._authorization is None or (scope["path"] in self._open_paths and scope.get("method") == "GET"):
            return
        given = headers.one("authorization") or ""
        if not hmac.compare_digest(given.encode("latin-1"), self._authorization.encode()):
            raise Refusal(401, "user and key are missing or wrong")


class _Headers:
    """The headers of a request; one that is given twice has no value that both readers of a request would agree on."""

    def __init__(self, scope: Scope) -> None:
        self._pairs: list[tuple[bytes, bytes]] = list(scope["headers"])

    def one(self, name: str) -> str | None:
        """Return a header's value, None when it is absent. Raises Refusal when it is given more than once."""
        values = [value.decode("latin-1") for key, value in self._pairs if key.lower() == name.encode()]
        if len(values) > 1:
            raise Refusal(400, f"header {name} is given {len(values)} times")
        return values[0] if values else None


async def _refuse(scope: Scope, send: Send, refusal: Refusal) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": str(refusal)})
        return
    headers = [(b"content-type", b"application/json"), *_NO_FRAMES.items()]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b'Basic realm="research-rl", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": str(refusal)}).encode()})


def _with_headers(send: Send) -> Send:
    """Return a `send` that keeps pages of other origins from showing this server in a frame."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", []))
            present = {name.lower() for name, _ in headers}
            message["headers"] = [*headers, *(pair for pair in _NO_FRAMES.items() if pair[0] not in present)]
        await send(message)

    return send_with_headers
