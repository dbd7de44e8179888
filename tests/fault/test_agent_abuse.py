"""The agent under abuse: malformed requests by schema and by byte, and clients that ask for a stream and never read it.

Holds: no answer of 5xx but a deliberate 503 with Retry-After; the service lives and answers others; its memory stays. A sample runs by
default, the long form with the marker `long`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from research_rl.paths import CHECKOUT
from tests.abuse import MIB, by_bytes, by_schema, mutations
from tests.answering import HEADERS, until

PATHS = ("/v1/responses", "/v1/chat/completions", "/v1/feedback", "/v1/models", "/info")
NAMES = (
    "response_id",
    "verdict",
    "comment",
    "answer",
    "input",
    "messages",
    "model",
    "stream",
    "max_searches",
    "top_k",
    "wall_s",
    "n",
    "max_output_tokens",
    "previous_response_id",
    "z",
)
SILENT = 40


@dataclass
class Served:
    """The agent's real application over a scripted policy, in a process of its own."""

    process: psutil.Popen
    url: str

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or 0

    def mib(self) -> float:
        return self.process.memory_full_info().uss / MIB

    def well(self) -> None:
        answer = httpx.post(f"{self.url}/v1/responses", json={"input": "who?"}, headers=HEADERS, timeout=120, trust_env=False)
        assert answer.status_code == 200 and answer.json()["research"]["answer"] == "Ada King", answer.text

    def metrics(self) -> list[str]:
        return httpx.get(f"{self.url}/metrics", headers=HEADERS, timeout=60, trust_env=False).text.splitlines()

    def active(self) -> int:
        return int(float(next(line.split()[-1] for line in self.metrics() if line.startswith("agent_active_episodes "))))

    def read(self) -> int:
        """Return how many bodies the service has read and judged by what stands in them."""
        routes = [f'route="{path}",status="{status}"' for path in PATHS[:3] for status in (200, 400)]
        return sum(int(float(line.split()[-1])) for line in self.metrics() if any(route in line for route in routes))


@contextmanager
def serving(words: int) -> Iterator[Served]:
    """Serve answers of so many words."""
    command = [sys.executable, "-m", "tests.answering", str(words)]
    process = psutil.Popen(command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield Served(process, process.stdout.readline().strip())
    finally:
        process.stdin.close()
        process.wait(60)


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(1) as found:
        yield found


def abused(served: Served, examples: int, count: int) -> Counter[int]:
    header = f"Authorization: {HEADERS['Authorization']}"
    served.well()
    asyncio.run(by_bytes(served.port, mutations(PATHS, NAMES, 1, header), 200))
    before = served.mib()
    statuses = by_schema(served.url, examples, HEADERS) + asyncio.run(by_bytes(served.port, mutations(PATHS, NAMES, 2, header), count))
    assert served.process.poll() is None
    served.well()
    assert served.mib() - before < 64
    # Most requests must get past HTTP, or the service's own reading is not tried.
    assert served.read() > 3 * 2 * examples // 2, (served.read(), statuses)
    return statuses


def test_malformed_requests_are_refused_and_harm_nobody(served: Served) -> None:
    statuses = abused(served, 15, 300)
    assert statuses.total() > 300 and statuses[400] + statuses[422] > 50 and statuses[200] > 0, statuses


@pytest.mark.long
def test_ten_thousand_malformed_requests(served: Served) -> None:
    statuses = abused(served, 1000, 10_000)
    print(f"\n{statuses.total()} requests: {dict(statuses)}; {served.mib():.0f} MiB")
    assert statuses.total() >= 10_000


def test_clients_that_never_read_their_stream_cost_only_themselves() -> None:
    body = json.dumps({"input": "who?", "stream": True}).encode()
    head = f"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nAuthorization: {HEADERS['Authorization']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with serving(20_000) as served, ExitStack() as silent:
        before = served.mib()
        for _ in range(SILENT):
            connection = silent.enter_context(socket.socket())
            # A small buffer: what the service writes does not fit into it.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", served.port))
            connection.sendall(head.encode() + body)
        until(lambda: served.active() > 0, 120)
        # As many as are answered at once hold every place, until it is seen that they read nothing.
        until(lambda: served.active() == 0, 300)
        assert served.mib() - before < 128
        served.well()
