"""P3: exact top-5 over 100,000 x 768 vectors, our bf16 scan against faiss's flat index at its better setting, one thread."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import torch

from benchmarks.duel import Duel, alternate, rate
from research_rl.index.exact import ExactScan, scan_name, write_scan

ROWS, DIM, TOP = 100_000, 768, 5
BATCHES = (1, 8, 32, 128, 512)
BLAS, SCAN_ALWAYS = 1, 2**31 - 1


def run(quick: bool) -> Iterator[Duel]:
    """Yield one duel a batch size; raises AssertionError when ids differ from the flat index's for any query."""
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    vectors, queries = _clustered(np.random.default_rng(0))
    flat = faiss.IndexFlatIP(DIM)
    flat.add(vectors)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / scan_name(0)
        norm, error = write_scan([vectors], path)
        scan = ExactScan(path, [vectors], norm, error)
        _same_ids(scan, flat, queries)
        for batch in BATCHES:
            yield _duel(scan, flat, queries[:batch], quick)


def _duel(scan: ExactScan, flat: faiss.IndexFlatIP, queries: np.ndarray, quick: bool) -> Duel:
    seconds, rounds = (0.5, 3) if quick else (2.0, 5)

    def ours() -> float:
        return rate(lambda: len(scan.search(queries, TOP)[0]), seconds)

    def theirs(threshold: int) -> float:
        faiss.cvar.distance_compute_blas_threshold = threshold
        return rate(lambda: len(flat.search(queries, TOP)[0]), seconds)

    def peer() -> float:
        return max(theirs(BLAS), theirs(SCAN_ALWAYS))

    goal = 1.0 if len(queries) == 1 else 1.7
    return alternate("P3", f"exact top-{TOP}, batch {len(queries)}", "queries per CPU-second", ours, peer, goal, rounds)


def _same_ids(scan: ExactScan, flat: faiss.IndexFlatIP, queries: np.ndarray) -> None:
    faiss.cvar.distance_compute_blas_threshold = BLAS
    _, expected = flat.search(queries, TOP)
    for batch in BATCHES:
        _, found = scan.search(queries[:batch], TOP)
        assert (found == expected[:batch]).all(), f"ids differ at batch {batch}"


def _clustered(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    centres = generator.standard_normal((300, DIM)).astype(np.float32)
    vectors = centres[generator.integers(0, 300, ROWS)] + generator.standard_normal((ROWS, DIM)).astype(np.float32)
    queries = vectors[generator.integers(0, ROWS, max(BATCHES))] + 0.02 * generator.standard_normal((max(BATCHES), DIM)).astype(np.float32)
    return tuple(rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (vectors, queries))  # type: ignore[return-value]
