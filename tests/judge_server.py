"""A judge over real HTTP that answers by what the prompt holds, and misbehaves question by question as told."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["JudgeServer", "running"]

_STATUS = {"500": 500, "429": 429, "400": 400, "401": 401, "404": 404}
_PREDICTION = re.compile(r"Predicted answer: (.*)|\"candidate\": \"(.*?)\"|\[Response\]\n(.*)")


class JudgeServer(ThreadingHTTPServer):
    """Calls right whatever begins with P. `faults` maps the number in `Question N?` to what goes wrong there, "*" to what does everywhere.

    `says` maps such a number to the content of its reply. `asked` holds (number, seconds, body, authorization) of each request.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults: dict[str, str] = {}
        self.says: dict[str, Any] = {}
        self.asked: list[tuple[str, float, dict[str, Any], str | None]] = []
        self.slowness = 0.0
        self.over = threading.Event()

    @property
    def url(self) -> str:
        """The address up to the version."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def take(self) -> list[str]:
        """Return the numbers of the questions asked about, in order, and forget them."""
        found = [number for number, *_ in self.asked]
        self.asked.clear()
        return found

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gives up is part of the test."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: JudgeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        number = re.search(r"Question (\w+)\?", text)[1]  # type: ignore[index]
        self.server.asked.append((number, time.monotonic(), body, self.headers.get("Authorization")))
        time.sleep(self.server.slowness)
        fault = self.server.faults.get(number) or self.server.faults.get("*", "")
        if fault in _STATUS:
            return self._send(_STATUS[fault], json.dumps({"error": {"message": f"no: {self.headers.get('Authorization')}"}}).encode())
        if fault == "hang":
            self.server.over.wait(60)
        if fault == "drip":
            return self._drip()
        if fault == "cut":
            return self._cut()
        if fault == "html":
            return self._send(200, b"<html>gateway</html>")
        content: Any = self.server.says.get(number, _reply(text, body))
        if fault == "huge":
            content = "x" * (2 << 20)
        self._send(200, json.dumps({"model": "served-1", "choices": [{"message": {"content": content}}]}).encode())

    def _send(self, status: int, raw: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def _drip(self) -> None:
        """Send a byte now and then, so that no single wait is long."""
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        while not self.server.over.wait(0.1):
            self.wfile.write(b" ")

    def _cut(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"choices": [')
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None: ...


def _reply(text: str, body: Mapping[str, Any]) -> str:
    """Return the verdict in the form that the prompt asks for."""
    found = _PREDICTION.search(text)
    right = bool(found) and next((group for group in found.groups() if group), "").startswith("P")  # type: ignore[union-attr]
    if "judgement" in text:
        return json.dumps({"rationale": "because", "judgement": "correct" if right else "incorrect"})
    if "extracted_final_answer" in text:
        return json.dumps({"extracted_final_answer": "P", "reasoning": "so", "correct": "yes" if right else "no", "confidence": 80})
    return "Here you are:\n```json\n" + json.dumps({"reason": "a {brace}", "correct": right}) + "\n```"


@contextmanager
def running() -> Iterator[JudgeServer]:
    """Serve until the block ends."""
    server = JudgeServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()
