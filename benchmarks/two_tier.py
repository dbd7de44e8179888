"""P16: codes in memory and vectors on disk against the exact scan: time and recall by batch, memory resident after the same searches.

Generated vectors in clusters, or those of real passages: `BENCH_CORPUS=<corpus.jsonl of FlashRAG's form>` encodes them by the lexical
encoder, each first line being a question. Both sides use one thread, and read the vectors from the page cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import faiss
import numpy as np
import torch

from benchmarks.duel import Duel, alternate, cpu_seconds, rate
from research_rl.config import IndexConfig
from research_rl.embedding.lexical import LexicalEncoder
from research_rl.index import dense
from research_rl.index.bounds import KINDS
from research_rl.index.search import EXACT, VectorSearcher
from research_rl.index.tiers import TwoTier
from research_rl.index.vectors import VectorFiles

DIM, QUERIES = 384, 256
CERTIFIED, MOST = 32, 5_000
"""Queries that are to be certified, and candidates of each at most: the proven bound of one-bit codes asks for all it may have."""
BATCHES = (1, 16, 64)
AT = (5, 20)


def run(quick: bool) -> Iterator[Duel]:
    """Yield recall at two depths, a duel of time a batch size, the resident memory, and the share certified."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows, queries = _vectors(folder, 20_000 if quick else 100_000)
        ours, scan = (_built(folder, factory) for factory in (f"RR{queries.shape[1]},RaBitQfs", EXACT))
        for k in AT:
            found, truth = ours.search(queries, k)[1], scan.search(queries, k)[1]
            share = float(np.mean([len(set(a) & set(b)) / k for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))
            yield Duel("P16", f"recall@{k}, {rows:,} vectors of {queries.shape[1]}", "share", share, 1.0, share, 0.999, 1)
        for batch in BATCHES:
            yield _time(ours, scan, queries[:batch], quick)
        mine, theirs = (_resident(folder, factory) for factory in (f"RR{queries.shape[1]},RaBitQfs", EXACT))
        yield Duel("P16", "memory of the index after all searches", "MiB", mine, theirs, theirs / mine, 4.0, 1)
        assert isinstance(ours, TwoTier)
        yield _certified(ours, queries)


def _time(ours: VectorSearcher, scan: VectorSearcher, queries: np.ndarray, quick: bool) -> Duel:
    seconds, rounds = (0.5, 3) if quick else (2.0, 5)
    what = f"top-5, batch {len(queries)}"
    mine, theirs = (partial(rate, partial(_answered, side, queries), seconds) for side in (ours, scan))
    return alternate("P16", what, "queries per CPU-second", mine, theirs, 1.0, rounds)


def _answered(side: VectorSearcher, queries: np.ndarray) -> int:
    return len(side.search(queries, 5)[0])


def _certified(ours: TwoTier, queries: np.ndarray) -> Duel:
    """The peer certifies every reply: it is exact."""
    shares: dict[str, float] = {}
    spent: dict[str, float] = {}
    for kind in KINDS:
        started = cpu_seconds()
        shares[kind] = float(np.mean([item.certified for item in ours.certified(queries[:CERTIFIED], 5, kind, MOST)[2]]))
        spent[kind] = 1000 * (cpu_seconds() - started) / CERTIFIED
    note = ", ".join(f"{kind} {shares[kind]:.3f} at {spent[kind]:.1f} CPU-ms a query" for kind in KINDS)
    share = shares["probable"]
    return Duel("P16", f"replies certified (probable), {MOST:,} candidates at most", "share", share, 1.0, share, 0.5, 1, note)


def _vectors(folder: Path, rows: int) -> tuple[int, np.ndarray]:
    """Write the vectors; return how many there are, and queries."""
    corpus = os.environ.get("BENCH_CORPUS")
    vectors, queries = _encoded(Path(corpus), rows) if corpus else _clustered(rows)
    for number, part in enumerate(np.array_split(vectors, 8)):
        np.save(folder / f"vectors-{number:05d}.npy", part)
    return len(vectors), queries


def _encoded(corpus: Path, rows: int) -> tuple[np.ndarray, np.ndarray]:
    with corpus.open(encoding="utf-8") as stream:
        texts = [json.loads(line)["contents"] for line in islice(stream, rows)]
    encoder = LexicalEncoder.fit([texts], DIM)
    chosen = np.random.default_rng(1).choice(len(texts), QUERIES, replace=False)
    return encoder.encode_passages(texts), encoder.encode_queries([texts[row].split("\n")[0] for row in chosen])


def _clustered(rows: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((rows // 100, DIM))
    vectors = centres[draw.integers(0, len(centres), rows)] + draw.standard_normal((rows, DIM))
    queries = vectors[draw.integers(0, rows, QUERIES)] + 0.7 * draw.standard_normal((QUERIES, DIM))
    vectors, queries = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (vectors, queries))
    return vectors.astype(np.float32), queries.astype(np.float32)


def _built(folder: Path, factory: str) -> VectorSearcher:
    """Build, where it does not stand yet, and open an index of one file over the vectors of `folder`."""
    config = IndexConfig(factory=factory, refine=factory != EXACT or None)
    files = VectorFiles(sorted(folder.glob("vectors-*.npy")), DIM)
    record = folder / f"{factory.partition(',')[0]}.json"
    if not record.exists():
        empty = None if factory == EXACT else dense.learn(config, files)
        facts = {"factory": factory, "bounds": [dense.write(config, empty, files, 0, 0, len(files), folder)]}
        record.write_text(json.dumps(facts | ({"candidates": config.candidates} if config.refine else {})))
    return dense.open_vectors(folder, json.loads(record.read_text()), files, [(0, len(files))], 1, numbers=[0])


def _resident(folder: Path, factory: str) -> float:
    """Return the MiB by which a process grows that opens an index and searches it."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.two_tier", str(folder), factory], check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def _grown(folder: Path, factory: str) -> float:
    """Open, search at each batch size, and return the growth of resident memory, mapped pages included, in MiB."""
    import psutil

    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    torch.mm(torch.ones(64, 64).bfloat16(), torch.ones(64, 64).bfloat16())
    queries = _clustered(1000)[1]
    before = psutil.Process().memory_info().rss
    index = _built(folder, factory)
    for batch in BATCHES:
        index.search(queries[:batch], 5)
    return (psutil.Process().memory_info().rss - before) / 2**20


if __name__ == "__main__":
    print(_grown(Path(sys.argv[1]), sys.argv[2]))
