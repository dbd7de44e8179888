"""A model server in the place of vLLM's: started by the same command, over real HTTP, with answers that the model folder names.

The folder's `turns.json` is {"first": ids, "last": ids, "ends": id, "reads": id, "pause_s": seconds, "fault": null | "start" | "turn"}:
`first` is written until the prompt holds the id `reads`, `last` after it. A fault ends the process at its start, or every turn with 500.
Standard library only: it starts in a tenth of a second.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any


def interpreter(folder: Path) -> Path:
    """Return a file that stands in for the interpreter of the serving environment and starts this server."""
    path = folder / "interpreter"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {Path(__file__).resolve()} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


class Handler(BaseHTTPRequestHandler):
    """Answers as vLLM does, whole or in pieces."""

    protocol_version = "HTTP/1.1"
    turns: dict[str, Any]
    name: str
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._reply(200, {"data": [{"id": self.name}]})
        else:
            self._reply(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers.get("Authorization") != f"Bearer {os.environ['VLLM_API_KEY']}":
            self._reply(401, {"error": "the token is wrong"})
        elif self.turns["fault"] == "turn":
            self._reply(500, {"error": "the weights are broken"})
        else:
            self._turn(body)

    def _turn(self, body: dict[str, Any]) -> None:
        last = self.turns["reads"] in body["prompt"]
        ids = [*self.turns["last"], self.turns["ends"]] if last else self.turns["first"]
        finish = {"finish_reason": "stop", "stop_reason": None if last else "</search>"}
        half = len(ids) // 2
        if not body.get("stream"):
            time.sleep(2 * self.turns["pause_s"])
            self._reply(200, {"choices": [{"token_ids": ids, "logprobs": None, **finish}]})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece, more in ((ids[:half], {"finish_reason": None}), (ids[half:], finish)):
            time.sleep(self.turns["pause_s"])
            self._piece(json.dumps({"choices": [{"token_ids": piece, "logprobs": None, **more}]}))
        self._piece("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _piece(self, data: str) -> None:
        content = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(content), content))

    def _reply(self, status: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


class Server(ThreadingHTTPServer):
    """Takes as many connections at once as a burst of clients opens."""

    request_queue_size = 256
    daemon_threads = True


def main(command: list[str]) -> None:
    """Serve the model of a command line of vLLM."""
    options = dict(pairwise(command))
    Handler.turns = json.loads((Path(options["--model"]) / "turns.json").read_text())
    Handler.name = options["--served-model-name"]
    if Handler.turns["fault"] == "start":
        sys.exit("the weights do not fit the memory")
    Server((options["--host"], int(options["--port"])), Handler).serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
