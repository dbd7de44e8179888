"""A retriever to be killed and frozen, and a loopback proxy before it that spoils replies on demand and counts what it spoiled."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from research_rl.paths import CHECKOUT
from research_rl.process import services
from tests.knowledge import until_ready

GARBAGE = ("garbage", "truncated", "schema", "empty_list")
"""Replies that must be told from an answer by reading them."""
FAULTS = (*GARBAGE, "nothing", "busy", "server_error", "slow")


class Retriever:
    """The real service as a process that can be killed, frozen and started again on its port."""

    def __init__(self, root: Path) -> None:
        self.root, self.port = root, services.free_port()
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        command = [sys.executable, "-m", "research_rl.retriever.command", "--workspace", str(self.root), "--port", str(self.port)]
        self.process = subprocess.Popen(command, cwd=CHECKOUT)
        until_ready(self.process, f"http://127.0.0.1:{self.port}")

    def outage(self, seconds: float) -> None:
        """Kill it, and start it again on its port after a while."""
        self.process.kill()
        self.process.wait()
        time.sleep(seconds)
        self.start()

    def freeze(self, seconds: float) -> None:
        """Stop it for a while, connections open."""
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.process.send_signal(signal.SIGCONT)


class Proxy(ThreadingHTTPServer):
    """Forwards to `target`; the next searches get the faults of `plan`, one each, and `injected` counts them.

    `most_slow` is how many slow answers were under way at once.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, target: int, slow_s: float = 0.5) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target, self.slow_s = target, slow_s
        self.plan: deque[str] = deque()
        self.injected: Counter[str] = Counter()
        self.received = self.slow = self.most_slow = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing when a client left."""


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._forward(b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.received += 1
            fault = self.server.plan.popleft() if self.server.plan else ""
            if fault:
                self.server.injected[fault] += 1
        if fault == "slow":
            self._wait()
        if fault in ("", "slow"):
            self._forward(body)
        else:
            self._reply(*_spoiled(fault))

    def _wait(self) -> None:
        with self.server.lock:
            self.server.slow += 1
            self.server.most_slow = max(self.server.most_slow, self.server.slow)
        time.sleep(self.server.slow_s)
        with self.server.lock:
            self.server.slow -= 1

    def _forward(self, body: bytes) -> None:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=30)
        try:
            upstream.request(self.command, self.path, body, {"Content-Type": "application/json"})
            reply = upstream.getresponse()
            self._reply(reply.status, reply.read())
        except (OSError, http.client.HTTPException):
            self.close_connection = True  # as a dead server does: no answer at all
        finally:
            upstream.close()

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _spoiled(fault: str) -> tuple[int, bytes]:
    good = json.dumps([[[{"id": "1", "contents": "x"}]], [[1.0]]]).encode()
    return {
        "garbage": (200, b"\x00<html>out of order</html>"),
        "truncated": (200, good[: len(good) // 2]),
        "schema": (200, json.dumps({"result": [{"document": "x"}]}).encode()),
        "empty_list": (200, b"[[], []]"),
        "nothing": (200, b"[[[]], [[]]]"),
        "busy": (503, b"{}"),
        "server_error": (500, b"oops"),
    }[fault]
