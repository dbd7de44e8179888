"""P1: a search service under 1, 16 and 64 clients, ours against the blocking pattern: CPU a query, queries a second, p99."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.duel import Duel
from benchmarks.servers import Server, ours, peer, workspace

CLIENTS = (1, 16, 64)
FIGURES = (("cpu_ms", "server CPU", "ms a query", True), ("per_s", "throughput", "queries/s", False), ("p99_ms", "p99", "ms", True))
GOALS = {"cpu_ms": 2.5, "per_s": 3.0, "p99_ms": 3.0}


def run(quick: bool) -> Iterator[Duel]:
    """Yield three duels a number of clients; both servers stay up and are loaded in turns."""
    seconds, rounds = (4.0, 3) if quick else (10.0, 5)
    with tempfile.TemporaryDirectory() as folder:
        made = workspace(Path(folder))
        with ours(made) as mine, peer(made) as theirs:
            for server in (mine, theirs):
                server.load(16, 2.0, 0)
            for clients in CLIENTS:
                yield from _duels(clients, *_measured(mine, theirs, clients, seconds, rounds), rounds)


def _measured(mine: Server, theirs: Server, clients: int, seconds: float, rounds: int) -> tuple[list[Any], list[Any]]:
    pairs = [
        (mine.load(clients, seconds, 1000 * clients + turn), theirs.load(clients, seconds, 1000 * clients + turn)) for turn in range(rounds)
    ]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _duels(clients: int, mine: list[Any], theirs: list[Any], rounds: int) -> Iterator[Duel]:
    who = f"{clients} client{'s' if clients > 1 else ''}"
    for key, name, unit, less in FIGURES:
        a, b = (statistics.median(found[key] for found in side) for side in (mine, theirs))
        yield Duel("P1", f"{name}, {who}", unit, a, b, b / a if less else a / b, 1.0 if clients == 1 else GOALS[key], rounds)
