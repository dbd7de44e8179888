"""The simulated latency of a fleet against a real one: four parts of an index, two services each, on one machine."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import psutil
import pytest

from research_rl.episode.agent import SearchFailure
from research_rl.paths import CHECKOUT
from research_rl.pipeline.stages import Workspace
from research_rl.planning.simulation import Fleet, poisson, simulate
from research_rl.process.services import free_port
from research_rl.retriever import TOKEN
from research_rl.retriever.client import RetrieverClient
from tests.encoder_model import write_model
from tests.knowledge import built, until_ready

PARTS, REPLICAS, ROWS = 4, 2, 400
HIDDEN, LAYERS = 768, 12
QUERIES, WARM_UP, SIZES, REPEATS = 250, 25, (1, 2, 4, 8), 15
BUSY = 0.3
"""Share of the machine's cores that the searches are to take: more would leave too little to client and HTTP."""

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the fleet's address; each search takes tens of milliseconds of one core, for its vector: HTTP and client are a small part."""
    if (load := os.getloadavg()[0]) > 1.5 * (psutil.cpu_count() or 1):
        pytest.skip(f"latencies mean nothing at a load of {load:.1f}")
    folder = tmp_path_factory.mktemp("fleet")
    encoder = {"kind": "sentence", "model": str(write_model(folder / "encoder", HIDDEN, LAYERS))}
    workspace: Workspace = built(folder / "workspace", ROWS, encoder=encoder, index={"shard_rows": ROWS // PARTS})
    started: list[tuple[subprocess.Popen[bytes], str]] = []
    env = {name: value for name, value in os.environ.items() if name != TOKEN} | {"OMP_NUM_THREADS": "1"}
    try:
        for part in range(PARTS):
            for _ in range(REPLICAS):
                told = {"port": (port := free_port()), "verify": False, "threads": 1, "cache_entries": 0, "log_requests": False}
                call = ["-m", "research_rl.retriever.command", "--workspace", str(workspace.root), "--part", f"{part + 1}/{PARTS}"]
                process = subprocess.Popen([sys.executable, *call, "--config", json.dumps(told)], cwd=CHECKOUT, env=env)
                started.append((process, f"http://127.0.0.1:{port}"))
        for process, url in started:
            until_ready(process, url)
        urls = [url for _, url in started]
        yield ";".join(",".join(urls[part * REPLICAS : (part + 1) * REPLICAS]) for part in range(PARTS))
    finally:
        for process, _ in started:
            process.kill()
            process.wait()


def beside(urls: Sequence[str]) -> dict[int, list[float]]:
    """Return the seconds of joint searches by their size, asked of several services at once, one for each core.

    Two cores of a virtual machine may be one of the real machine: a search beside another then takes half as long again.
    """

    def ask(url: str) -> list[tuple[int, float]]:
        taken: list[tuple[int, float]] = []
        with httpx.Client(trust_env=False, timeout=60) as client:
            for number in range(REPEATS + 3):
                for size in SIZES:
                    started = time.perf_counter()
                    queries = [f"Person{number} alone {size} {each}" for each in range(size)]
                    assert client.post(f"{url}/batch_search", json={"query": queries, "top_n": 5}).status_code == 200
                    taken.append((size, time.perf_counter() - started))
        return taken[3 * len(SIZES) :]

    with ThreadPoolExecutor(len(urls)) as pool:
        taken = [one for each in pool.map(ask, urls) for one in each]
    return {size: [seconds for asked, seconds in taken if asked == size] for size in SIZES}


async def real(address: str, arrivals: Sequence[float]) -> tuple[list[float], int]:
    """Return the seconds of every query that is sent when it comes, and the second requests."""
    async with RetrieverClient(address, timeout_s=60.0, connections=64) as client:
        begun = time.perf_counter()

        async def one(number: int, when: float) -> float:
            await asyncio.sleep(max(0.0, begun + when - time.perf_counter()))
            answer = await client.search([f"Person{number} Surname{number} asked"], 5)
            assert not isinstance(answer, SearchFailure), answer
            # Since it should have been sent: a client that is late is part of what a query waits for.
            return time.perf_counter() - begun - when

        seconds = await asyncio.gather(*(one(number, when) for number, when in enumerate(arrivals)))
        return seconds, client.take_counts().get("hedges", 0)


def test_the_simulated_latency_is_within_a_quarter_of_a_real_fleets(address: str) -> None:
    cores = psutil.cpu_count() or 1
    taken = beside([part.split(",")[0] for part in address.split(";")][:cores])
    usual = [float(np.median(taken[size])) for size in SIZES]
    spread = [seconds / usual[0] for seconds in taken[1]]

    def service(queries: int, draw: random.Random) -> float:
        return float(np.interp(queries, SIZES, usual)) * draw.choice(spread)

    arrivals = poisson(BUSY * cores / (PARTS * usual[0]), QUERIES, seed=1)
    outcome = simulate(Fleet(PARTS, REPLICAS, service, cores=cores), arrivals, seed=2)
    simulated = outcome.latencies
    measured, hedges = asyncio.run(real(address, arrivals))
    print(f"second requests: simulated {outcome.hedges}, measured {hedges}")
    for quantile in (0.5, 0.95):
        expected, found = (float(np.quantile(each[WARM_UP:], quantile)) for each in (simulated, measured))
        print(f"quantile {quantile}: simulated {1000 * expected:.1f} ms, measured {1000 * found:.1f} ms")
        assert found == pytest.approx(expected, rel=0.25), f"quantile {quantile}: simulated {expected:.4f} s, measured {found:.4f} s"
