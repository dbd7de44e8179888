"""Ask a search service from N clients at once and say how it went; one process, raw HTTP, so that it costs little.

`python -m benchmarks.load PORT CLIENTS SECONDS SEED` prints {answered, seconds, p50_ms, p99_ms, health_ms: [...], statuses}.
No two queries are equal. While it asks, /health is asked every 50 ms on a connection of its own.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import Counter

WORDS = """river city university film director born capital album century novel author king battle island railway company
species mountain language football championship orchestra bridge museum county painter senator treaty harbour
festival temple philosopher engineer dynasty province stadium newspaper cathedral composer physicist airport"""
STARTS = ("Who was the", "In which year did the", "What is the name of the", "Where does the", "Which", "How many people in the")


def queries(seed: int) -> list[str]:
    """Return 20,000 questions of 8 to 22 words, all different."""
    generator, words = random.Random(seed), WORDS.split()
    return [
        f"{generator.choice(STARTS)} {' '.join(generator.choices(words, k=generator.randint(4, 16)))} {seed} {number}?"
        for number in range(20_000)
    ]


class Load:
    """Closed-loop clients: each sends its next query when the last was answered."""

    def __init__(self, port: int, seconds: float, seed: int) -> None:
        self.port, self.until = port, time.perf_counter() + seconds
        self.queries = iter(queries(seed))
        self.milliseconds, self.health, self.statuses = list[float](), list[float](), Counter[int]()

    async def client(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        while time.perf_counter() < self.until:
            body = json.dumps({"query": next(self.queries), "top_n": 5}).encode()
            head = f"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            self.milliseconds.append(await self.exchange(reader, writer, head.encode() + body))
        writer.close()

    async def probe(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        while time.perf_counter() < self.until:
            self.health.append(await self.exchange(reader, writer, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"))
            await asyncio.sleep(0.05)
        writer.close()

    async def exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> float:
        started = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        lowered = head.lower()
        at = lowered.index(b"content-length:") + 15
        await reader.readexactly(int(lowered[at : lowered.index(b"\r\n", at)]))
        self.statuses[int(head.split(b" ", 2)[1])] += 1
        return 1000 * (time.perf_counter() - started)

    async def run(self, clients: int) -> None:
        await asyncio.gather(*(self.client() for _ in range(clients)), self.probe())


def share(values: list[float], part: float) -> float:
    """Return the value below which `part` of the values lie."""
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def main(port: int, clients: int, seconds: float, seed: int) -> None:
    load = Load(port, seconds, seed)
    started = time.perf_counter()
    asyncio.run(load.run(clients))
    passed = time.perf_counter() - started
    found = {"answered": len(load.milliseconds), "seconds": passed, "statuses": dict(load.statuses), "health_ms": load.health}
    print(json.dumps(found | {"p50_ms": share(load.milliseconds, 0.5), "p99_ms": share(load.milliseconds, 0.99)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
