"""P15: what a second request for a late answer gains, with two replicas of which one stands still again and again.

Both sides are our client over the same two services; the peer never asks a second replica for an answer that is late. A replica
that stands still (a collection of garbage, a page that comes from a slow disk) is one that the kernel stops and lets go on. Searchers
think between searches, as the model of an episode does, so that the machine has cores left: where it has none, what is asked twice is
missed elsewhere.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.duel import Duel
from benchmarks.load import queries, share
from research_rl.episode.agent import SearchFailure
from research_rl.retriever import fleet
from research_rl.retriever.client import RetrieverClient
from tests.faulty import Retriever
from tests.knowledge import built

SEARCHERS, TOP_K, THOUGHT_S = 4, 5, 0.05
STILL_S, RUNS_S = 0.5, 2.0
BURSTS = (fleet._HEDGE_BURST, 0.0)
"""How many second requests may be saved up: ours, and none."""
QUANTILES = (("p50", 0.5, 0.9), ("p99", 0.99, 0.9), ("p99.8", 0.998, 2.0))
"""Name, quantile, and the goal: most must not suffer, the slowest, which meet a replica that stands still, must be clearly quicker."""


def run(quick: bool) -> Iterator[Duel]:
    """Yield for each quantile of a search's milliseconds the ratio to the client without second requests."""
    seconds, rounds = (10.0, 3) if quick else (30.0, 5)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as services:
        built(Path(folder), 2000)
        replicas = [Retriever(Path(folder)) for _ in range(2)]
        for replica in replicas:
            services.callback(replica.process.kill)
        urls = ",".join(f"http://127.0.0.1:{replica.port}" for replica in replicas)
        with standing_still(replicas[0].process.pid):
            turns = [[searched(urls, seconds, 2 * turn + side, burst) for side, burst in enumerate(BURSTS)] for turn in range(rounds)]
    ours, peer = zip(*turns, strict=True)
    for name, quantile, goal in QUANTILES:
        mine, theirs = (statistics.median(share(took, quantile) for took in side) for side in (ours, peer))
        what = f"search {name}, a replica of two still {STILL_S} of {STILL_S + RUNS_S} s"
        yield Duel("P15", what, "ms", mine, theirs, theirs / mine, goal, rounds)


def searched(urls: str, seconds: float, seed: int, burst: float) -> list[float]:
    """Return the milliseconds of every search that `SEARCHERS` tasks make in `seconds`, each after a thought; no query is asked twice."""
    kept, fleet._HEDGE_BURST = fleet._HEDGE_BURST, burst
    try:
        return asyncio.run(_searched(urls, time.monotonic() + seconds, iter(queries(seed)), random.Random(seed)))
    finally:
        fleet._HEDGE_BURST = kept


async def _searched(urls: str, ends: float, left: Iterator[str], draw: random.Random) -> list[float]:
    took: list[float] = []

    async def searcher(client: RetrieverClient) -> None:
        while time.monotonic() < ends:
            await asyncio.sleep(draw.expovariate(1 / THOUGHT_S))
            started = time.perf_counter()
            answer = await client.search([next(left)], TOP_K)
            assert not isinstance(answer, SearchFailure), answer
            took.append(1000 * (time.perf_counter() - started))

    async with RetrieverClient(urls, connections=SEARCHERS) as client:
        await asyncio.gather(*(searcher(client) for _ in range(SEARCHERS)))
    return took


@contextmanager
def standing_still(pid: int) -> Generator[None]:
    """Stop a process for STILL_S after every RUNS_S, until the block ends."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(RUNS_S):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(STILL_S)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
