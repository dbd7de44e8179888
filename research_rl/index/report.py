"""How good and how fast an approximate index is: recall against exact search, latency. Knows vectors; knows no text.

Passages serve as queries, each left out of its own result. Exact search reads the vector files one after the other.
"""

from __future__ import annotations

import time

import faiss
import numpy as np
import numpy.typing as npt

from research_rl.embedding import Vectors
from research_rl.index.search import VectorSearcher, merged
from research_rl.index.vectors import VectorFiles

__all__ = ["latency", "recall"]

_AT = (1, 5, 10, 20)
_BATCHES = (1, 32)
_BLOCK = 8192
_SECONDS = 2.0
_TIMES = 200

Rows = npt.NDArray[np.int64]


def recall(index: VectorSearcher, vectors: VectorFiles, sample: int) -> dict[str, float]:
    """Return the share of the exact k nearest that the index finds, by k as text."""
    own = vectors.spread(sample)
    queries = vectors.take(own)
    # One hit more than is compared: each query's own passage is taken out.
    truth = _without(own, _exact(queries, vectors, max(_AT) + 1))
    found = _without(own, index.search(queries, max(_AT) + 1)[1])
    return {str(k): _share(truth[:, :k], found[:, :k]) for k in _AT if k <= truth.shape[1]}


def latency(index: VectorSearcher, queries: Vectors, top_k: int = 5) -> dict[str, dict[str, float]]:
    """Return milliseconds a search takes, by batch size as text: its median and its 99th percentile."""
    # Not measured: the first search reads pages and starts threads.
    index.search(queries[:1], top_k)
    return {str(size): _times(index, queries, size, top_k) for size in _BATCHES}


def _times(index: VectorSearcher, queries: Vectors, size: int, top_k: int) -> dict[str, float]:
    taken: list[float] = []
    deadline = time.monotonic() + _SECONDS
    while not taken or (len(taken) < _TIMES and time.monotonic() < deadline):
        # Wrapped around where the sample has fewer queries than the rounds ask for.
        batch = np.take(queries, np.arange(len(taken) * size, (len(taken) + 1) * size), axis=0, mode="wrap")
        started = time.perf_counter()
        index.search(batch, top_k)
        taken.append(1000 * (time.perf_counter() - started))
    return {"p50_ms": round(float(np.percentile(taken, 50)), 3), "p99_ms": round(float(np.percentile(taken, 99)), 3)}


def _exact(queries: Vectors, vectors: VectorFiles, k: int) -> Rows:
    scores, rows = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    for start, block in vectors.batches(0, len(vectors), _BLOCK):
        block_scores, places = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
        scores, rows = merged([scores, block_scores], [rows, places + start], k)
    return rows


def _without(own: Rows, rows: Rows) -> Rows:
    """Return each row of hits without the query's own passage: one column less."""
    keep = rows != own[:, None]
    # A passage that did not find itself loses its last hit, so that all rows are of one width.
    keep[keep.all(axis=1), -1] = False
    return rows[keep].reshape(len(rows), -1)


def _share(truth: Rows, found: Rows) -> float:
    hits = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(truth, found, strict=True)]
    return round(float(np.sum(hits) / max(truth.size, 1)), 4)
