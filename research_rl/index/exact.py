"""Exact inner-product search faster than a flat scan: scores of bf16 vectors, candidates proven sufficient, rescored in float32.

Knows vectors and rows; knows no text. Invariant: the rows returned are those of an exhaustive float32 search. With e the
largest error of an approximate score and a_k the k-th best of them, every true neighbour scores at least a_k - 2e, so
rescoring all rows above that line misses none. Rows of equal score come in row order. Scan and vectors are memory-mapped:
further workers share their pages. A processor that multiplies no bf16 is given the rows of the scan in float32, a cacheful at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from research_rl.embedding import Vectors
from research_rl.errors import DataError, ManifestError
from research_rl.index.rescore import LONGEST, SUM, merge, require_finite
from research_rl.process.cores import multiplies_bfloat16

__all__ = ["ExactScan", "scan_name", "write_scan"]

_GROUP = 64
"""Rows that share one maximum; thresholds are compared with the maxima first."""
_SCORE_BYTES = 256 << 20
"""Most bytes of approximate scores held at once."""
_ROUND = 2.0**-8
"""Bound on bf16's rounding of a score, relative to it; twice the unit roundoff."""
_TINY = 1e-35
"""Bound on what is lost where products fall below float32's normal range and are taken for zero."""
_WIDENED_BYTES = 3 << 20
"""What is brought to float32 at once, so that it is in the cache still when it is multiplied."""
_RESCORED = 1 << 14
"""Most candidates rescored at once: a query that scores all rows alike has all of them for candidates."""

Rows = npt.NDArray[np.int64]


def scan_name(number: int) -> str:
    """Return the name of a scan file of an index artifact."""
    return f"scan-{number:05d}.bf16"


def write_scan(shards: Iterable[Vectors], path: Path) -> tuple[float, float]:
    """Write the vectors [rows, dim] as bf16; return the largest norm of a rounded row and of a rounding error.

    Raises DataError for a vector that holds NaN or is too long for its products to stay finite.
    """
    norm = error = 0.0
    with path.open("wb") as stream:
        for shard in shards:
            exact = torch.from_numpy(np.array(shard, np.float32))
            rounded = exact.to(torch.bfloat16)
            lengths = rounded.float().norm(dim=1)
            if not bool((lengths <= LONGEST).all()):  # false for NaN as well
                raise DataError(f"a vector is longer than {LONGEST:g} or holds NaN; encode the passages again, normalised")
            norm = max(norm, float(lengths.max()))
            error = max(error, float((exact - rounded.float()).norm(dim=1).max()))
            # NumPy has no bfloat16; the bits are the same.
            stream.write(rounded.view(torch.int16).numpy().tobytes())
    return norm, error


class ExactScan:
    """Search over a scan file and the float32 shards it was made of; from one thread at a time. `threads` 0 leaves torch as it is."""

    def __init__(self, path: Path, shards: Sequence[Vectors], norm: float, error: float, threads: int = 0) -> None:
        self.dim = int(shards[0].shape[1])
        self.rows = sum(map(len, shards))
        if path.stat().st_size != self.rows * self.dim * 2:
            raise ManifestError(
                f"{path} has {path.stat().st_size:,} bytes, {self.rows:,} vectors of {self.dim} need {self.rows * self.dim * 2:,}; "
                "run the index stage again"
            )
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)])
        self._norm, self._error, self._threads = norm, error, threads
        self._multiplies_bfloat16 = multiplies_bfloat16()
        size = self.rows * self.dim
        self._scan = torch.from_file(str(path), shared=True, size=size, dtype=torch.bfloat16).view(self.rows, self.dim)

    def search(self, queries: Vectors, top_k: int) -> tuple[Vectors, Rows]:
        """Return scores and rows, each [len(queries), k], best first, k = min(top_k, rows). Raises DataError for NaN."""
        require_finite(queries)
        if self._threads:
            # Where the search runs: the threads that torch begins at this would keep a process that opens from being forked.
            torch.set_num_threads(self._threads)
        k = min(top_k, self.rows)
        scores = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        exact_Qd = torch.from_numpy(np.ascontiguousarray(queries, np.float32))
        # One query waits for memory rather than for products, and bf16 is half as much of it.
        narrow = self._multiplies_bfloat16 or len(queries) == 1
        given_Qd = exact_Qd.to(torch.bfloat16) if narrow else exact_Qd
        slack_Q = 2 * self._bound(exact_Qd, given_Qd)
        # A multiple of the group, so that no group but the last of all is cut.
        step = max(_GROUP, _SCORE_BYTES // (given_Qd.element_size() * max(1, len(queries))) // _GROUP * _GROUP)
        for start in range(0, self.rows, step):
            part_Nd = self._scan[start : start + step]
            part_QN = given_Qd @ part_Nd.T if narrow else _widened(given_Qd, part_Nd)
            maxima_QG = _maxima(part_QN)
            # Twice the error between two approximate scores; once where an exact score, the k-th best so far, is compared with one.
            line_Q = torch.maximum(_kth_best(part_QN, maxima_QG, k) - slack_Q, torch.from_numpy(scores[:, -1]) - slack_Q / 2)
            for query, candidates in enumerate(_above(part_QN, maxima_QG, line_Q)):
                self._merge(queries[query], candidates + start, scores[query], rows[query])
        return scores, rows

    def _bound(self, exact_Qd: torch.Tensor, given_Qd: torch.Tensor) -> torch.Tensor:
        """Return for each query the largest difference between an approximate score of `given_Qd`, bf16 or float32, and the true one."""
        norm_Q = exact_Qd.norm(dim=1)
        rounding = (exact_Qd - given_Qd.float()).norm(dim=1) * self._norm + norm_Q * self._error
        of_products = (1 + _ROUND) * _ROUND if given_Qd.dtype == torch.bfloat16 else 0.0
        return rounding + norm_Q * self._norm * (of_products + SUM) + _TINY * self.dim

    def _merge(self, query: Vectors, candidates: Rows, scores: Vectors, rows: Rows) -> None:
        """Rescore the candidates in float32 and keep the best of them and of what `scores` and `rows` hold."""
        for start in range(0, len(candidates), _RESCORED):
            some = candidates[start : start + _RESCORED]
            merge(query, self._vectors(some), some, scores, rows)

    def _vectors(self, rows: Rows) -> Vectors:
        if len(self._shards) == 1:
            return self._shards[0][rows]
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        vectors = np.empty((len(rows), self.dim), np.float32)
        for owner in np.unique(owners):
            mine = owners == owner
            vectors[mine] = self._shards[owner][rows[mine] - self._starts[owner]]
        return vectors


def _widened(queries_Qd: torch.Tensor, scan_Nd: torch.Tensor) -> torch.Tensor:
    """Return the float32 products of queries and rows of the scan, shape [queries, rows]."""
    products_QN = torch.empty(len(queries_Qd), len(scan_Nd))
    # One piece of memory for all blocks: new pages for each would cost as much as the products of a small batch.
    wide_Bd = torch.empty(max(1, _WIDENED_BYTES // (4 * scan_Nd.shape[1])), scan_Nd.shape[1])
    for start in range(0, len(scan_Nd), len(wide_Bd)):
        block_Bd = scan_Nd[start : start + len(wide_Bd)]
        rows_Bd = wide_Bd[: len(block_Bd)].copy_(block_Bd)
        products_QN[:, start : start + len(block_Bd)] = queries_Qd @ rows_Bd.T
    return products_QN


def _kth_best(scores_QN: torch.Tensor, maxima_QG: torch.Tensor, k: int) -> torch.Tensor:
    """Return a lower bound of each row's k-th best score: the k-th best of its groups' maxima, or of its scores."""
    # The k best maxima are scores of k different rows, so the k-th of them cannot lie above the k-th best row.
    source = maxima_QG if maxima_QG.shape[1] >= k else scores_QN
    if source.shape[1] < k:
        return torch.full((len(scores_QN),), -torch.inf)
    return source.float().topk(k, dim=1).values[:, -1]


def _maxima(scores_QN: torch.Tensor) -> torch.Tensor:
    """Return the largest score of each `_GROUP` rows."""
    whole = scores_QN.shape[1] // _GROUP * _GROUP
    parts = [scores_QN[:, :whole].view(len(scores_QN), -1, _GROUP).amax(-1)] if whole else []
    if whole < scores_QN.shape[1]:
        parts.append(scores_QN[:, whole:].amax(-1, keepdim=True))
    return torch.cat(parts, dim=1)


def _above(scores_QN: torch.Tensor, maxima_QG: torch.Tensor, line_Q: torch.Tensor) -> list[Rows]:
    """Return for each query the columns that score at least its line."""
    # Groups first: whole groups below the line, which are nearly all, cost one comparison.
    owners, groups = torch.nonzero(maxima_QG.float() >= line_Q[:, None], as_tuple=True)
    ends = np.searchsorted(owners.numpy(), np.arange(len(scores_QN) + 1))
    offsets = np.arange(_GROUP)
    above: list[Rows] = []
    for query in range(len(scores_QN)):
        columns = (groups.numpy()[ends[query] : ends[query + 1], None] * _GROUP + offsets).ravel()
        columns = columns[columns < scores_QN.shape[1]]
        keep = scores_QN[query][torch.from_numpy(columns)].float() >= line_Q[query]
        above.append(columns[keep.numpy()])
    return above
