"""A web server that misbehaves on order: it drops, truncates, refuses, lies about lengths and sends other content."""

from __future__ import annotations

import hashlib
import re
import socket
import time
import urllib.request
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import pytest

from research_rl.config import addresses

_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass
class Site:
    """Files by path, and for each path the faults of its next replies that carry more than one byte, in order.

    Faults: ("drop", n) closes after n bytes; ("short", n) announces n bytes too few; ("long", n) n too many; ("status", code);
    ("content", byte) sends that byte throughout; ("change", bytes) puts a new version in place first; ("call", (n, function))
    calls the function after n bytes.
    """

    files: dict[str, bytes]
    faults: dict[str, deque[tuple[str, Any]]] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    ranges: bool = True
    etags: bool = True
    sent: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)
    requested: int = 0
    connections: int = 0
    lock: Any = field(default_factory=Lock)
    url: str = ""


@contextmanager
def serve(site: Site) -> Iterator[Site]:
    """Serve the site on a free port of loopback."""
    handler = type("Handler", (_Handler,), {"site": site})
    server = _Server(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()


def localhost_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the resolver answer that localhost is a public host, so that its redirect to 127.0.0.1 leads from outside to inside."""
    answer = socket.getaddrinfo

    def resolver(host: str, *rest: Any, **named: Any) -> Any:
        public = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("93.184.216.34", 0))]
        # A port is named by the connection itself, which must reach the server of the test.
        return public if host == "localhost" and not (rest and rest[0]) else answer(host, *rest, **named)

    monkeypatch.setattr(addresses.socket, "getaddrinfo", resolver)


def settle(site: Site) -> None:
    """Wait until the requests of a client that is gone have all been answered.

    Connections are taken in order, so once a new one is answered all earlier ones are counted.
    """
    with urllib.request.urlopen(urllib.request.Request(f"{site.url}/{next(iter(site.files))}", headers={"Range": "bytes=0-0"})) as reply:
        reply.read()
    while site.connections:
        time.sleep(0.01)


class _Server(ThreadingHTTPServer):
    """Counts the connections it has taken and not yet ended."""

    def process_request(self, request: Any, client_address: Any) -> None:
        self._count(1)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self._count(-1)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that are killed are what this server is for."""

    def _count(self, change: int) -> None:
        site: Site = self.RequestHandlerClass.site
        with site.lock:
            site.connections += change


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        name = self.path.split("?")[0].lstrip("/")
        if name in self.site.redirects:
            self._reply(302, {"Content-Length": "0", "Location": self.site.redirects[name]}, b"")
            return
        if name not in self.site.files:
            self._reply(404, {"Content-Length": "0"}, b"")
            return
        wanted = _RANGE.fullmatch(self.headers.get("Range", ""))
        probe = bool(wanted) and wanted[2] == "0"
        queue = self.site.faults.get(name, deque())
        with self.site.lock:
            fault = queue.popleft() if queue and not probe else ("", None)
        if fault[0] == "change":
            self.site.files[name] = fault[1]
        content = self.site.files[name]
        etag = f'"{hashlib.md5(content).hexdigest()}"'
        headers = {**({"ETag": etag} if self.site.etags else {}), **self.site.headers.get(name, {})}
        start, stop, status = 0, len(content), 200
        condition = self.headers.get("If-Range")
        if wanted and self.site.ranges and condition in (None, etag):
            start = int(wanted[1])
            stop = min(int(wanted[2]) + 1, len(content)) if wanted[2] else len(content)
            if start >= len(content):
                self._reply(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"}, b"")
                return
            status, headers = 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        if not probe:
            with self.site.lock:
                self.site.asked.append((name, start))
                self.site.requested += stop - start
        self._answer(name, fault, status, headers, content[start:stop], probe)

    def _answer(self, name: str, fault: tuple[str, Any], status: int, headers: dict[str, str], body: bytes, probe: bool) -> None:
        kind, value = fault
        length = len(body)
        if kind == "status":
            self._reply(value, {"Content-Length": "0", "Retry-After": "0"}, b"")
            return
        if kind == "content":
            body = value * length
        elif kind == "drop":
            body = body[:value]
        elif kind == "call":
            body = body[: value[0]]
        elif kind == "short":
            length = max(0, length - value)
            body = body[:length]
        elif kind == "long":
            length += value
        if not probe:
            with self.site.lock:
                self.site.sent[name] = self.site.sent.get(name, 0) + len(body)
        self._reply(status, {**headers, "Content-Length": str(length)}, body)
        if kind == "call":
            value[1]()
        if len(body) < length:
            self.close_connection = True

    def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class _Recorder(BaseHTTPRequestHandler):
    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(f"{self.requestline}\n{self.headers}")
        self.send_error(502)

    do_POST = do_PUT = do_HEAD = do_CONNECT = do_GET

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def recording_proxy() -> Generator[tuple[str, list[str]]]:
    """Run a proxy that passes nothing on; yield its address and what reached it, request lines with headers."""
    requests: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Recorder", (_Recorder,), {"requests": requests}))
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
