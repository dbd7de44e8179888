"""The last step of every search that ends exactly: candidates scored in float32 and ordered. Knows vectors; knows no index.

Invariant: a row's score depends on the row and the query alone, so that equal rows get equal scores wherever they stand, and two
searches over other candidates agree on every row that both have.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from research_rl.embedding import Vectors
from research_rl.errors import DataError

__all__ = ["LONGEST", "SUM", "merge", "require_finite"]

LONGEST = 1e18
"""Longest vector accepted: no product of two leaves float32's range."""
SUM = 1e-4
"""Bound on float32 summation error, relative to the norms' product, up to some thousand dimensions."""

Rows = npt.NDArray[np.int64]


def require_finite(queries: Vectors) -> None:
    """Raises DataError for a query vector that holds NaN or is too long for its products to stay finite."""
    if not (np.linalg.norm(queries, axis=1) <= LONGEST).all():  # false for NaN as well
        raise DataError(f"a query vector is longer than {LONGEST:g} or holds NaN; encode the query again")


def merge(query: Vectors, vectors: Vectors, candidates: Rows, scores: Vectors, rows: Rows) -> None:
    """Score `candidates` by their `vectors` [n, dim] and keep the best of them and of what `scores` and `rows` [k] hold.

    Equal scores come in row order.
    """
    # Row by row, unlike a matrix product: see the invariant above.
    all_scores = np.concatenate([scores, np.einsum("nd,d->n", vectors, query)])
    all_rows = np.concatenate([rows, candidates])
    best = np.lexsort((all_rows, -all_scores))[: len(scores)]
    scores[:], rows[:] = all_scores[best], all_rows[best]
