"""Malformed requests for any of our services: drawn from its own OpenAPI, and made of bytes that are nearly HTTP."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

MIB = 1 << 20
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1e308, 10**30, "", " ", "x" * 300, "\ud800", "\x00", [], [[]], {}, {"query": {}}),
    *("a", ["a"], ["a", None], 3, [{"role": "user", "content": "a"}], [{"role": "user"}], [{"content": [{"type": "text"}]}]),
)


def deliberate(status: int, headers: Any) -> bool:
    return status < 500 or (status == 503 and "retry-after" in headers)


def by_schema(url: str, examples: int, headers: Mapping[str, str] | None = None) -> Counter[int]:
    """Send `examples` requests an operation drawn from our OpenAPI, half of the parameters and bodies wrong on purpose."""
    statuses: Counter[int] = Counter()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json", headers=dict(headers or {}))
    modes = [schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE]
    with httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=60) as client:
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
                    except (TypeError, ValueError, UnicodeEncodeError, httpx.LocalProtocolError):
                        return  # a body or header that no HTTP client can put on the wire
                    statuses[answer.status_code] += 1
                    assert deliberate(answer.status_code, answer.headers), (answer.status_code, answer.text, case)

                # An operation that describes no parameters and no body has none that could be wrong.
                with suppress(Unsatisfiable):
                    send()
    return statuses


def mutations(paths: Sequence[str], names: Sequence[str], seed: int, header: str = "X: y") -> Iterator[bytes]:
    """Yield malformed requests without end: requests with bytes changed, cut, doubled, and headers that lie.

    Bodies are objects of `names`; `header` is sent with every request.
    """
    generator = random.Random(seed)
    paths = [*paths, "/health", "/readyz", "/metrics", "/docs", "/", "/%00", "/" + "a" * 5000, "*"]
    while True:
        chosen = generator.choices(names, k=generator.randint(0, 5))
        body = json.dumps({name: generator.choice(VALUES) for name in chosen}).encode()
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
        lines = [
            f"{method} {generator.choice(paths)} HTTP/{generator.choice(['1.1'] * 6 + ['1.0', '0.9', '9.9', 'x'])}",
            "Host: localhost",
            header,
        ]
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


async def by_bytes(port: int, requests: Iterator[bytes], count: int) -> Counter[int]:
    """Send malformed requests, sixteen at a time, each on a connection of its own; return the statuses (0: closed unanswered)."""
    statuses: Counter[int] = Counter()
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
