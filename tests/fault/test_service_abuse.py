"""The retriever under abuse: malformed requests by schema and by byte, 64 clients at once, SIGTERM in the middle of load.

Holds: no answer of 5xx but a deliberate 503 with Retry-After; the service lives; its memory stays; no accepted request is
lost. A sample runs by default, the long form with the marker `long`.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from research_rl.paths import CHECKOUT
from research_rl.process.services import free_port
from research_rl.retriever import TOKEN
from tests.knowledge import built, until_ready

MIB = 1 << 20
CONFIG = {"max_batch": 16, "max_queue": 48, "cache_entries": 200, "drain_s": 20.0, "verify": False}


@dataclass
class Served:
    """A running service."""

    process: psutil.Popen
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def mib(self) -> float:
        return self.process.memory_full_info().uss / MIB


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("abuse")
    built(root, 250, encoder={"dim": 128})
    return root


@pytest.fixture
def served(root: Path) -> Iterator[Served]:
    port = free_port()
    call = ["-m", "research_rl.retriever.command", "--workspace", str(root), "--config", json.dumps({"port": port, **CONFIG})]
    env = {name: value for name, value in os.environ.items() if name != TOKEN}
    with (root / "log").open("ab") as log:
        few_files = ["sh", "-c", 'ulimit -n 1024; exec "$0" "$@"', sys.executable, *call]
        process = psutil.Popen(few_files, cwd=CHECKOUT, env=env, stdout=subprocess.DEVNULL, stderr=log)
    made = Served(process, port)
    try:
        until_ready(made.process, made.url)
        yield made
    finally:
        if process.is_running():
            process.kill()
        process.wait()


def well(served: Served) -> None:
    """The service still answers a search rightly."""
    answer = httpx.post(f"{served.url}/search", json={"query": "Person7 Surname7"}, timeout=60, trust_env=False)
    assert answer.status_code == 200 and answer.json()[0]["id"] == "p7"


def deliberate(status: int, headers: Any) -> bool:
    return status < 500 or (status == 503 and "retry-after" in headers)


def by_schema(served: Served, examples: int) -> Counter[int]:
    """Send `examples` requests an operation drawn from our OpenAPI, half of the parameters and bodies wrong on purpose."""
    statuses: Counter[int] = Counter()
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    with httpx.Client(base_url=served.url, trust_env=False, timeout=60) as client:
        for result in schema.get_all_operations():
            operation = result.ok()
            for mode in modes if operation.method.upper() == "POST" else modes[:1]:
                count = examples if operation.method.upper() == "POST" else max(2, examples // 10)

                @given(case=operation.as_strategy(generation_mode=mode))
                @settings(
                    max_examples=count,
                    deadline=None,
                    database=None,
                    derandomize=True,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                def send(case: Any) -> None:
                    call = case.as_transport_kwargs()
                    call.pop("cookies", None)
                    headers = {str(name): str(value) for name, value in (call.pop("headers", None) or {}).items()}
                    try:
                        answer = client.request(
                            call.pop("method"),
                            case.formatted_path,
                            headers=headers,
                            **{key: call[key] for key in ("json", "params", "content", "data") if call.get(key) is not None},
                        )
                    except (TypeError, ValueError, UnicodeEncodeError):
                        return  # a body or header that no HTTP client can put on the wire
                    statuses[answer.status_code] += 1
                    assert deliberate(answer.status_code, answer.headers), (answer.status_code, answer.text, case)

                send()
    return statuses


def mutations(seed: int) -> Iterator[bytes]:
    """Yield malformed requests without end: requests with bytes changed, cut, doubled, and headers that lie."""
    generator = random.Random(seed)
    paths = ["/search", "/batch_search", "/retrieve", "/health", "/readyz", "/metrics", "/docs", "/", "/%00", "/" + "a" * 5000, "*"]
    values: list[Any] = [
        None,
        True,
        -1,
        0,
        1e308,
        10**30,
        "",
        " ",
        "x" * 300,
        "\ud800",
        "\x00",
        [],
        [[]],
        {},
        {"query": {}},
        "a",
        ["a"],
        ["a", None],
        3,
    ]
    while True:
        names = generator.choices(
            ["query", "queries", "top_n", "topk", "return_score", "return_scores", "timeout_s", "z"], k=generator.randint(0, 5)
        )
        body = json.dumps({name: generator.choice(values) for name in names}).encode()
        if generator.random() < 0.3:
            body = generator.choice(
                [
                    b"",
                    b"[" * 3000,
                    b"{" * 3000,
                    body[: len(body) // 2],
                    body * 3,
                    bytes(generator.randbytes(60)),
                    b'{"query": "a", "top_n": ' + b"9" * 5000 + b"}",
                ]
            )
        length = generator.choice([str(len(body))] * 6 + ["0", "-1", "99999999999", "1e3", "", str(len(body) + 5)])
        method = generator.choice(["POST"] * 6 + ["GET", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "P OST", "\x00"])
        lines = [f"{method} {generator.choice(paths)} HTTP/{generator.choice(['1.1'] * 6 + ['1.0', '0.9', '9.9', 'x'])}", "Host: localhost"]
        lines += [f"Content-Length: {length}"] if generator.random() < 0.9 else ["Transfer-Encoding: chunked"]
        lines += generator.choice(
            [["Content-Type: application/json"], ["Content-Type: text/plain"], [], ["Content-Type: multipart/form-data"]]
        )
        lines += generator.choice(
            [
                [],
                [],
                ["X-Deadline-Ms: soon"],
                ["X-Deadline-Ms: 0"],
                ["X-Deadline-Ms: " + "9" * 400],
                ["X: " + "y" * 70_000],
                ["bad header"],
                ["Expect: 100-continue"],
            ]
        )
        request = bytearray("\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + body)
        if generator.random() < 0.3:
            for _ in range(generator.randint(1, 8)):
                request[generator.randrange(len(request))] = generator.randrange(256)
        yield bytes(request)


async def by_bytes(port: int, count: int, seed: int, wait_s: float = 0.3) -> Counter[int]:
    """Send malformed requests, sixteen at a time, each on a connection of its own; return the statuses (0: closed unanswered)."""
    statuses: Counter[int] = Counter()
    requests = mutations(seed)
    slots = asyncio.Semaphore(16)

    async def one(request: bytes) -> None:
        async with slots:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(request)
                writer.write_eof()
                async with asyncio.timeout(15):
                    answer = await reader.read(1 << 16)
            except (ConnectionError, TimeoutError, OSError):
                answer = b""
            finally:
                writer.transport.abort()
            status = int(answer[9:12]) if answer[:5] == b"HTTP/" and answer[9:12].isdigit() else 0
            statuses[status] += 1
            head = answer.split(b"\r\n\r\n")[0].lower()
            assert deliberate(status, "retry-after" if b"retry-after" in head else ""), (request, answer)

    await asyncio.gather(*(one(next(requests)) for _ in range(count)))
    return statuses


def abused(served: Served, examples: int, count: int) -> Counter[int]:
    well(served)
    asyncio.run(by_bytes(served.port, 200, 1))
    before = served.mib()
    statuses = by_schema(served, examples) + asyncio.run(by_bytes(served.port, count, 2))
    assert served.process.poll() is None
    well(served)
    assert served.mib() - before < 64
    return statuses


def test_malformed_requests_are_refused_and_harm_nobody(served: Served) -> None:
    statuses = abused(served, 25, 400)
    assert statuses.total() > 500 and statuses[422] > 50 and statuses[200] > 0, statuses


@pytest.mark.long
def test_ten_thousand_malformed_requests(served: Served) -> None:
    statuses = abused(served, 1000, 6000)
    print(f"\n{statuses.total()} requests: {dict(statuses)}; {served.mib():.0f} MiB")
    assert statuses.total() >= 10_000


async def clients(port: int, number: int, seconds: float, counts: Counter[Any]) -> None:
    """Search with `number` clients at once, as fast as they are answered; count statuses, and what was not answered: by its
    error when sent before `counts["signalled"]` was set, else as refused.
    """
    until = time.monotonic() + seconds

    async def one(name: int) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            turn = 0
            while time.monotonic() < until:
                turn += 1
                size = 1 + (name + turn) % 3
                body = {"query": [f"Person{(name * turn + item) % 250} {name} {turn}" for item in range(size)], "top_n": 3}
                late = counts["signalled"]
                try:
                    answer = await client.post("/batch_search", json=body)
                except httpx.TransportError as error:
                    counts["refused" if late else type(error).__name__] += 1
                    return
                counts[answer.status_code] += 1
                assert deliberate(answer.status_code, answer.headers) and answer.status_code in (200, 503), answer.text
                if answer.status_code == 200:
                    assert len(answer.json()) == size
                else:
                    await asyncio.sleep(0.05)

    await asyncio.gather(*(one(name) for name in range(number)))


def soak(served: Served, seconds: float) -> tuple[Counter[Any], list[float]]:
    """Load the service in four equal parts; return all counts and its memory after each."""
    counts: Counter[Any] = Counter()
    memory: list[float] = []
    for _ in range(4):
        asyncio.run(clients(served.port, 64, seconds / 4, counts))
        memory.append(served.mib())
    return counts, memory


def test_64_clients_are_each_answered_and_memory_stays(served: Served) -> None:
    counts, memory = soak(served, 8.0)
    assert set(counts) <= {200, 503} and counts[200] > 50, counts
    assert memory[-1] - memory[0] < 32, memory


@pytest.mark.long
def test_64_clients_for_minutes(served: Served) -> None:
    counts, memory = soak(served, 240.0)
    print(f"\n{dict(counts)}; MiB after each minute: {[round(value, 1) for value in memory]}")
    assert set(counts) <= {200, 503}
    assert memory[-1] - memory[1] < 8, memory


def test_sigterm_under_load_loses_no_accepted_request(served: Served) -> None:
    counts: Counter[Any] = Counter()

    async def go() -> None:
        load = asyncio.create_task(clients(served.port, 32, 60.0, counts))
        while counts[200] < 100 and not load.done():
            await asyncio.sleep(0.01)
        served.process.send_signal(signal.SIGTERM)
        counts["signalled"] = 1
        await load

    asyncio.run(go())
    assert set(counts) <= {200, 503, "refused", "signalled"} and counts[200] >= 100 and counts["refused"] == 32, counts
    assert served.process.wait(30) in (0, -signal.SIGTERM)


def test_a_slow_sender_costs_only_itself(served: Served) -> None:
    head = b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 400\r\n\r\n{"
    slow = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(100)]
    for connection in slow:
        connection.sendall(head)
    well(served)
    with slow[0].makefile("rb") as answer:
        slow[0].settimeout(30)
        assert b" 408 " in answer.readline()
    for connection in slow:
        connection.close()
    well(served)


def test_connections_that_never_finish_their_headers_keep_nobody_out(served: Served) -> None:
    """More of them than the service may have files open: the oldest give way, and each is closed after its deadline."""
    ours = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, ours[1]), ours[1]))
    slow: list[socket.socket] = []
    try:
        for _ in range(1100):
            slow.append(socket.create_connection(("127.0.0.1", served.port), timeout=30))
            slow[-1].sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nX: ")
        started = time.monotonic()
        well(served)
        assert time.monotonic() - started < 10
        assert served.process.num_fds() < 1024
        assert b" 408 " in slow[-1].makefile("rb").readline(), "the newest is closed by its deadline"
    finally:
        for connection in slow:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, ours)
    well(served)


def test_an_index_file_cut_short_ends_the_service_with_the_reason(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "artifacts", tmp_path / "artifacts")
    call = ["-m", "research_rl.retriever.command", "--workspace", str(tmp_path), "--config", json.dumps({"port": free_port(), **CONFIG})]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, *call], cwd=CHECKOUT, stdout=log, stderr=log)
    try:
        until_ready(process, f"http://127.0.0.1:{json.loads(call[-1])['port']}")
        os.truncate(next((tmp_path / "artifacts" / "corpus").glob("*.arrow")), 64)
        assert process.wait(30) == 1
    finally:
        process.kill()
    assert "was cut to 64 bytes" in (tmp_path / "log").read_text()
