"""P20: one service of two workers against the same service of one: queries a second of 32 clients, and memory on one large index.

Two indexes: 1,000 passages, where the event loop and JSON take the time of a request, and one-bit codes of generated vectors (200 MB,
200,000 passages), where the search does. Memory is the proportional set size of all processes of a service after the load: pages that
several processes share count once in the sum. The queries come from one process on the same machine. `BENCH_LARGE=FOLDER` keeps the
large index, and finds it there the next time.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import faiss
import httpx
import numpy as np
import psutil

from benchmarks.duel import Duel
from research_rl.config import Config
from research_rl.corpus import build as corpus
from research_rl.embedding import build as embed
from research_rl.embedding import load_encoder
from research_rl.index import build as index
from research_rl.paths import CHECKOUT
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import STAGES, Context, Workspace, silent
from research_rl.process.services import free_port

CLIENTS, WORKERS = 32, 2
SMALL, LARGE = 1_000, 200_000
DIM, LARGE_DIM = 256, 8_192
_ADDED = 4_000
_START_S = 600.0
_MIB = 1 << 20


def run(quick: bool) -> Iterator[Duel]:
    """Yield throughput on the small index and on the large one, and the memory of the large one."""
    seconds, rounds = (4.0, 3) if quick else (10.0, 5)
    with tempfile.TemporaryDirectory() as folder:
        small = _workspace(Path(folder) / "small", SMALL, {"encoder": {"dim": DIM}})
        large = _large(Path(os.environ.get("BENCH_LARGE", f"{folder}/large")))
        yield from _duels(small, f"{SMALL:,} passages", seconds, rounds)
        yield from _duels(large, f"{LARGE:,} passages, one-bit codes of 200 MB", seconds, rounds)


def _duels(made: Workspace, what: str, seconds: float, rounds: int) -> Iterator[Duel]:
    with _serving(made, WORKERS) as ours, _serving(made, 1) as peer:
        turns = [[_load(*service, seconds, turn) for service in (ours, peer)] for turn in range(rounds)]
        mine, theirs = (sum(_pss(process)) for _, process in (ours, peer))
        each = ", ".join(f"{size:.0f}" for size in _pss(ours[1]))
    rate, p99, cpu = ([statistics.median(turn[side][key] for turn in turns) for side in (0, 1)] for key in ("per_s", "p99_ms", "cpu_ms"))
    note = f"p99 {p99[0]:.0f} ms against {p99[1]:.0f}, {cpu[0]:.2f} CPU-ms a query against {cpu[1]:.2f}; "
    note += f"load average {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores"
    yield Duel("P20", f"throughput, {CLIENTS} clients, {what}", "queries/s", rate[0], rate[1], rate[0] / rate[1], 1.0, rounds, note)
    index = sum(entry.size for entry in manifest.load(made.folder("index"), verify=False).files) / _MIB
    needed = index + WORKERS * (theirs - index)
    note = f"the index of {index:.0f} MiB once and the rest of one process twice are {needed:.0f}; parent, keeper, workers: {each}"
    yield Duel("P20", f"memory of all processes, {what}", "MiB", mine, theirs, needed / mine, 0.8, 1, note)


def _workspace(root: Path, rows: int, tree: dict[str, Any]) -> Workspace:
    """Build corpus, embeddings and, where they hold vectors, the index."""
    made = Workspace(root)
    with manifest.publish(made.folder("download"), "download", "x", {}) as staging, (staging.path / "corpus.jsonl").open("w") as stream:
        staging.counts["corpus"] = rows
        for row in range(rows):
            text = f'"Person{row}"\nPerson{row} Surname{row} lives in town {row % 97} since {1000 + row % 1000}.'
            stream.write(json.dumps({"id": str(row), "contents": text}) + "\n")
    with manifest.publish(made.folder("validate"), "validate", "x", {"download": manifest.load(made.folder("download"), verify=False)}):
        pass
    corpus.run(_context("corpus", made, tree))
    embed.run(_context("embed", made, tree))
    if tree["encoder"].get("vectors", True):
        index.run(_context("index", made, tree))
    return made


def _large(root: Path) -> Workspace:
    """Build the large index of generated vectors, those of the canaries excepted, unless it stands."""
    made, tree = Workspace(root), {"encoder": {"dim": LARGE_DIM, "vectors": False}}
    if (made.folder("index") / manifest.MANIFEST).is_file():
        return made
    _workspace(root, LARGE, tree)
    folder = made.folder("embed")
    found = manifest.load(folder, verify=False)
    encoder = load_encoder(folder, found)
    own = {item["row"]: encoder.encode_queries([item["query"]])[0] for item in found.facts["canaries"]}
    generator = np.random.default_rng(0)
    codes: Any = faiss.index_factory(LARGE_DIM, "RaBitQfs", faiss.METRIC_INNER_PRODUCT)
    for start in range(0, LARGE, _ADDED):
        # Of unit length, as good as: the variance of numbers between -0.5 and 0.5 is a twelfth.
        vectors = (generator.random((_ADDED, LARGE_DIM), np.float32) - 0.5) * np.float32((12 / LARGE_DIM) ** 0.5)
        for row in own.keys() & range(start, start + _ADDED):
            vectors[row - start] = own[row]
        if not start:
            codes.train(vectors)
        codes.add(vectors)
    faiss.write_index(codes, str(root / "codes.faiss"))
    index.run(_context("index", made, {**tree, "index": {"prebuilt": str(root / "codes.faiss")}}))
    return made


def _context(stage: str, made: Workspace, tree: dict[str, Any]) -> Context:
    parents = {name: manifest.load(made.folder(name), verify=False) for name in STAGES[stage].parents}
    return Context(STAGES[stage], Config.model_validate(tree), made, parents, silent)


@contextmanager
def _serving(made: Workspace, workers: int) -> Generator[tuple[int, psutil.Popen]]:
    """Run a service for a block; yield its port and its first process."""
    port = free_port()
    config = json.dumps({"port": port, "workers": workers, "cache_entries": 0, "verify": False, "log_requests": False})
    command = [sys.executable, "-m", "research_rl.retriever.command", "--workspace", str(made.root), "--config", config]
    with (made.root / "server.log").open("ab") as log:
        process = psutil.Popen(command, cwd=CHECKOUT, env={**os.environ, "RESEARCH_RETRIEVER_TOKEN": ""}, stdout=log, stderr=log)
    try:
        _ready(process, port)
        yield port, process
    finally:
        process.terminate()
        process.wait(60)


def _ready(process: psutil.Popen, port: int) -> None:
    while process.poll() is None and time.time() < process.create_time() + _START_S:
        try:
            if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=60, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"no answer at port {port} (exit code {process.poll()})")


def _load(port: int, process: psutil.Popen, seconds: float, seed: int) -> dict[str, Any]:
    before = _cpu(process)
    command = [sys.executable, "-m", "benchmarks.load", str(port), str(CLIENTS), str(seconds), str(seed)]
    found = json.loads(subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True).stdout)
    assert set(found["statuses"]) == {"200"}, found["statuses"]
    return found | {"per_s": found["answered"] / found["seconds"], "cpu_ms": 1000 * (_cpu(process) - before) / found["answered"]}


def _cpu(process: psutil.Popen) -> float:
    """CPU-seconds that a service's processes used so far."""
    return sum(times.user + times.system for times in (one.cpu_times() for one in (process, *process.children(recursive=True))))


def _pss(process: psutil.Popen) -> list[float]:
    """Return the MiB of each of a service's processes; what several share is divided among them."""
    return [one.memory_full_info().pss / _MIB for one in (process, *process.children(recursive=True))]
