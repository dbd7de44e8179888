"""How good and how fast an approximate index is: recall against exact search, certified replies, latency. Knows vectors; knows no text.

Passages serve as queries, each left out of its own result. Exact search reads the vector files one after the other.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt

from research_rl.embedding import Vectors
from research_rl.index.bounds import KINDS, Kind
from research_rl.index.search import VectorSearcher
from research_rl.index.tiers import Certificate, TwoTier
from research_rl.index.vectors import VectorFiles

__all__ = ["certified", "exact", "latency", "recall"]

_AT = (1, 5, 10, 20)
_BATCHES = (1, 32)
_BLOCK = 8192
_CERTIFIED_AT, _MOST = 5, 50
"""Depth of the replies that are to be certified; the largest budget, times the index's own candidates."""
_PROBES = 8
_SECONDS = 2.0
_TIMES = 200

Rows = npt.NDArray[np.int64]


def recall(index: VectorSearcher, vectors: VectorFiles, sample: int) -> dict[str, float]:
    """Return the share of the exact k nearest that the index finds, by k as text."""
    own = vectors.spread(sample)
    queries = vectors.take(own)
    # One hit more than is compared: each query's own passage is taken out.
    truth = _without(own, exact(queries, vectors, max(_AT) + 1))
    approximate = _without(own, index.search(queries, max(_AT) + 1)[1])
    return {str(k): _share(truth[:, :k], approximate[:, :k]) for k in _AT if k <= truth.shape[1]}


def certified(index: TwoTier, queries: Vectors) -> dict[str, dict[str, float]]:
    """Return the share of replies, five passages each, that are certified within a number of candidates, by kind of bound and number.

    A kind that certifies none of the first few queries is not asked of the others: each reads all candidates it may, for nothing.
    """
    shares: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        certificates = _certificates(index, queries[:_PROBES], kind)
        if any(certificate.certified for certificate in certificates):
            certificates += _certificates(index, queries[_PROBES:], kind)
        looked_at = sorted({certificate.candidates for certificate in certificates})
        shares[kind] = {
            str(most): round(float(np.mean([item.certified and item.candidates <= most for item in certificates])), 4) for most in looked_at
        }
    return shares


def _certificates(index: TwoTier, queries: Vectors, kind: Kind) -> list[Certificate]:
    return index.certified(queries, _CERTIFIED_AT, kind, _MOST * index.candidates)[2]


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


def exact(queries: Vectors, vectors: VectorFiles, k: int) -> Rows:
    """Return the rows of the k largest products [queries, k], equal ones in row order; row -1 where there are fewer rows."""
    scores, rows = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
    for start, block in vectors.batches(0, len(vectors), _BLOCK):
        products = queries @ block.T
        # After some blocks next to nothing is above the k-th so far, and a look at each product is all that is left to do.
        above = products > scores[:, -1:]
        for query in np.flatnonzero(above.any(axis=1)).tolist():
            places = np.flatnonzero(above[query])
            best_scores = np.concatenate([scores[query], products[query, places]])
            order = np.argsort(-best_scores, kind="stable")[:k]
            scores[query], rows[query] = best_scores[order], np.concatenate([rows[query], places + start])[order]
    return rows[:, : min(k, len(vectors))]


def _without(own: Rows, rows: Rows) -> Rows:
    """Return each row of hits without the query's own passage: one column less."""
    keep = rows != own[:, None]
    # A passage that did not find itself loses its last hit, so that all rows are of one width.
    keep[keep.all(axis=1), -1] = False
    return rows[keep].reshape(len(rows), -1)


def _share(truth: Rows, approximate: Rows) -> float:
    hits = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(truth, approximate, strict=True)]
    return round(float(np.sum(hits) / max(truth.size, 1)), 4)
