"""Search vectors. Knows vectors, rows and scores; knows no text.

Deviation from faiss's defaults: batches of four or more queries go through matrix multiplication. The library's own
threshold leaves batches of up to some hundred queries on the slow path, the very sizes a micro-batching service sees;
below four queries the plain scan stays faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
import numpy.typing as npt

from research_rl.embedding import Vectors
from research_rl.errors import ManifestError
from research_rl.process.cores import cores

__all__ = ["EXACT", "Joined", "VectorIndex", "VectorSearcher", "file_name"]

_BLAS_FROM = 4
"""Smallest batch that is faster as a matrix product."""
_SMALL_BYTES = 64 << 20
_MANY = 1_000_000
"""Vectors whose search takes so long that beginning a thread for it counts for nothing."""

Rows = npt.NDArray[np.int64]

EXACT = "Exact"
"""Factory of the exact bf16 scan (`exact.py`), beside faiss's own factory strings."""


class VectorSearcher(Protocol):
    """An index over vectors, or a range of its rows."""

    @property
    def rows(self) -> int:
        """Vectors in the index."""
        ...

    @property
    def dim(self) -> int:
        """Length of a vector."""
        ...

    def search(self, queries: Vectors, top_k: int) -> tuple[Vectors, Rows]:
        """Return scores and rows, each [len(queries), k], best first, k = min(top_k, rows); row -1 where too few were found."""
        ...


def file_name(number: int) -> str:
    """Return the name of a faiss file of an index artifact."""
    return f"index-{number:05d}.faiss"


def threads_for(size: int) -> int:
    """Return the threads for work over `size` bytes of vectors: helpers that wait for each other cost more than they do."""
    return 1 if size < _SMALL_BYTES else cores()


class VectorIndex:
    """A faiss index with its row count and dimension; searches from one thread at a time.

    An index of squared Euclidean distances d gives 1 - d / 2: the inner product where vectors and queries have unit length, and
    in any case a score that falls with the distance.
    """

    def __init__(self, index: Any, threads: int = 0) -> None:
        self._index = index
        self._distances: bool = self.metric == faiss.METRIC_L2
        self._threads = threads or threads_for(self.rows * self.dim * 4)
        # One number for the whole process: the index that is opened last sets it.
        faiss.cvar.distance_compute_blas_threshold = _BLAS_FROM * self.dim

    @classmethod
    def open(cls, path: Path, threads: int = 0) -> VectorIndex:
        """Open an index file, memory-mapped where its kind allows it. Raises ManifestError."""
        try:
            return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC), threads)
        except (RuntimeError, MemoryError) as error:
            reason = (str(error).strip().splitlines() or ["unknown"])[-1]
            raise ManifestError(f"{path} cannot be opened as a faiss index ({reason}); run the index stage again") from None

    @property
    def rows(self) -> int:
        """Vectors in the index."""
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self._index.d)

    @property
    def kind(self) -> str:
        """Name of the index's class, such as IndexFlatIP."""
        return type(self._index).__name__

    @property
    def metric(self) -> int:
        """faiss's number of what the index compares by."""
        return int(self._index.metric_type)

    @property
    def faiss_index(self) -> Any:
        """The index itself."""
        return self._index

    def identifiers(self) -> Iterator[npt.NDArray[np.int64]]:
        """Yield the ids that vectors were added under; nothing where they are numbered in order, as their kind does by itself."""
        inner = self._index
        if isinstance(inner, faiss.IndexIDMap | faiss.IndexIDMap2):
            yield faiss.vector_to_array(inner.id_map)
            return
        ivf: Any = faiss.try_extract_index_ivf(inner)
        if ivf is not None:
            lists = ivf.invlists
            for number in range(lists.nlist):
                if size := lists.list_size(number):
                    # A copy, as the view ends with the list that it points into.
                    yield faiss.rev_swig_ptr(lists.get_ids(number), size).copy()

    def search(self, queries: Vectors, top_k: int) -> tuple[Vectors, Rows]:
        """Return scores and rows, each [len(queries), k], best first, k = min(top_k, rows); row -1 where too few were found."""
        faiss.omp_set_num_threads(self._threads)  # holds for the calling thread alone, so it is said where the search runs
        scores, rows = self._index.search(np.ascontiguousarray(queries, np.float32), min(top_k, self.rows))
        return 1 - scores / 2 if self._distances else scores, rows


Opener = Callable[[], VectorSearcher]


class Joined:
    """Several indexes over consecutive ranges of rows, searched as one.

    With `keep` off each is opened for every search and closed again: slow, but in the memory of the largest alone.
    A query that comes alone is searched in up to `threads` of them side by side: faiss gives one query one thread.
    """

    def __init__(
        self, openers: Sequence[Opener], starts: Sequence[int], rows: int, dim: int, threads: int = 1, *, keep: bool = True
    ) -> None:
        self.rows, self.dim = rows, dim
        self._starts = list(starts)
        self._openers: list[Opener] = [_constant(opener()) for opener in openers] if keep else list(openers)
        self._threads = min(threads, len(openers)) if keep and rows >= _MANY else 1

    def first(self) -> VectorSearcher:
        """Return the first of the indexes."""
        return self._openers[0]()

    def search(self, queries: Vectors, top_k: int) -> tuple[Vectors, Rows]:
        """Return scores and rows, each [len(queries), k], best first, k = min(top_k, rows); rows count from the corpus's first."""

        def one(opener: Opener, start: int) -> tuple[Vectors, Rows]:
            scores, rows = opener().search(queries, top_k)
            return scores, np.where(rows < 0, -1, rows + start)

        if self._threads > 1 and len(queries) == 1:
            # Threads of this search alone: a service may be forked after its first one, and threads do not come along.
            with ThreadPoolExecutor(self._threads, thread_name_prefix="files") as pool:
                hits = list(pool.map(one, self._openers, self._starts))
        else:
            hits = list(map(one, self._openers, self._starts))
        return merged([scores for scores, _ in hits], [rows for _, rows in hits], min(top_k, self.rows))


def merged(scores: Sequence[Vectors], rows: Sequence[Rows], top_k: int) -> tuple[Vectors, Rows]:
    """Return the best `top_k` of several lists of hits, each [queries, any]; equal scores keep the order of the lists."""
    if len(scores) == 1:
        return scores[0][:, :top_k], rows[0][:, :top_k]
    all_scores, all_rows = np.concatenate(scores, axis=1), np.concatenate(rows, axis=1)
    # Row -1 is a place that was not filled: it goes last, whatever number stands there for a score.
    order = np.argsort(-np.where(all_rows < 0, -np.inf, all_scores), axis=1, kind="stable")[:, :top_k]
    return np.take_along_axis(all_scores, order, axis=1), np.take_along_axis(all_rows, order, axis=1)


def _constant(searcher: VectorSearcher) -> Opener:
    return lambda: searcher
