"""P2: how long /health takes while 64 clients search, ours against the blocking pattern and against a limit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.duel import Duel
from benchmarks.load import share
from benchmarks.servers import Server, ours, peer, workspace

CLIENTS = 64
LIMITS = (("p50", 0.5, 40.0), ("p99", 0.99, 200.0))


def run(quick: bool) -> Iterator[Duel]:
    """Yield for p50 and p99 the ratio to the peer and the ratio of the limit to ours."""
    seconds, rounds = (5.0, 3) if quick else (15.0, 5)
    with tempfile.TemporaryDirectory() as folder:
        made = workspace(Path(folder))
        with ours(made) as mine, peer(made) as theirs:
            for server in (mine, theirs):
                server.load(16, 2.0, 0)
            pairs = [(_health(mine, seconds, turn), _health(theirs, seconds, turn)) for turn in range(rounds)]
    a, b = (sorted(value for found in side for value in found) for side in zip(*pairs, strict=True))
    for name, part, limit in LIMITS:
        yield Duel(
            "P2", f"/health {name}, {CLIENTS} clients", "ms", share(a, part), share(b, part), share(b, part) / share(a, part), 10, rounds
        )
        yield Duel(
            "P2", f"/health {name}, {CLIENTS} clients, peer: the limit", "ms", share(a, part), limit, limit / share(a, part), 1, rounds
        )


def _health(server: Server, seconds: float, seed: int) -> list[float]:
    return server.load(CLIENTS, seconds, 7000 + seed)["health_ms"]
