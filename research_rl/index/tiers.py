"""Search in two tiers: codes in memory name candidates, full vectors on disk decide among them. Knows vectors; knows no text.

Invariants: (1) a score is the one that an exact search gives, ties in row order, so that with as many candidates as rows a reply is
the exact one; (2) a reply that is called certified is the exact one as far as the bound of its kind holds (`bounds.py`); (3) memory
for full vectors is bounded, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from research_rl.embedding import Vectors
from research_rl.index.bounds import Bound, Kind
from research_rl.index.gather import Gather
from research_rl.index.rescore import merge, require_finite
from research_rl.index.search import VectorSearcher

__all__ = ["Certificate", "TwoTier"]

_HELD_BYTES = 64 << 20
"""Most bytes of full vectors held at once."""
_EXTENDED = 5
"""How many times more candidates the next round of a certified search takes."""

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Certificate:
    """How sure a reply is: whether no other row can belong to it, else how many rows at most were not ruled out.

    `candidates` rows were compared exactly.
    """

    certified: bool
    open: int
    candidates: int


class TwoTier:
    """Rows found by `codes`, scored by the vectors that `vectors` reads; from one thread at a time.

    `bound` returns the codes' error bound, None where they have none; it is asked for at the first certified search.
    """

    def __init__(self, codes: VectorSearcher, vectors: Gather, candidates: int, bound: Callable[[], Bound | None]) -> None:
        self.rows, self.dim = codes.rows, codes.dim
        self.candidates = candidates
        self._codes, self._vectors, self._bound_of = codes, vectors, bound

    def search(self, queries: Vectors, top_k: int) -> tuple[Vectors, Rows]:
        """Return scores and rows, each [len(queries), k], best first, k = min(top_k, rows); row -1 where too few were found.

        Raises DataError for NaN, ManifestError for a vector file that was cut short.
        """
        require_finite(queries)
        _, candidates = self._codes.search(queries, max(self.candidates, top_k))
        return self._rescored(queries, candidates, min(top_k, self.rows))

    def certified(self, queries: Vectors, top_k: int, kind: Kind, budget: int) -> tuple[Vectors, Rows, list[Certificate]]:
        """Return what `search` returns and how sure each reply is, with up to `budget` candidates a query.

        A reply is certified when its k-th score lies above what any row behind the last candidate can score.
        """
        require_finite(queries)
        k, bound = min(top_k, self.rows), self._bound_of()
        scores, rows = _empty(len(queries), k)
        certificates = [Certificate(False, self.rows, 0)] * len(queries)
        margin = np.full(len(queries), np.inf) if bound is None else bound.margin(queries, kind)
        waiting, size = np.arange(len(queries)), max(self.candidates, k)
        while len(waiting):
            coded, candidates = self._codes.search(queries[waiting], size)
            scores[waiting], rows[waiting] = self._rescored(queries[waiting], candidates, k)
            looked_at = (candidates >= 0).sum(axis=1)
            sure = (looked_at == self.rows) | (scores[waiting, -1] > coded[:, -1] + margin[waiting])
            for query, certain, count in zip(waiting.tolist(), sure.tolist(), looked_at.tolist(), strict=True):
                certificates[query] = Certificate(certain, 0 if certain else self.rows - count, count)
            if size >= min(budget, self.rows):
                break
            waiting, size = waiting[~sure], min(_EXTENDED * size, budget)
        return scores, rows, certificates

    def _rescored(self, queries: Vectors, candidates: Rows, k: int) -> tuple[Vectors, Rows]:
        scores, rows = _empty(len(queries), k)
        # As many queries together as the memory for their vectors allows: what several of them name is read once.
        some = max(1, _HELD_BYTES // (4 * self.dim * max(1, candidates.shape[1])))
        for start in range(0, len(queries), some):
            named = candidates[start : start + some]
            distinct = np.unique(named[named >= 0])
            vectors = self._vectors.take(distinct)
            for query, mine in enumerate(named, start):
                mine = np.sort(mine[mine >= 0])
                places = np.searchsorted(distinct, mine)
                # Nothing is copied for a query that is alone.
                own = vectors if len(places) == len(distinct) else vectors[places]
                merge(queries[query], own, mine, scores[query], rows[query])
        return scores, rows


def _empty(queries: int, k: int) -> tuple[Vectors, Rows]:
    return np.full((queries, k), -np.inf, np.float32), np.full((queries, k), -1, np.int64)
