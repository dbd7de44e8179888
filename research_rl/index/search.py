"""Search a built index. Knows vectors, rows and scores; knows no text.

Deviation from faiss's defaults: batches of four or more queries go through matrix multiplication. The library's own
threshold leaves batches of up to some hundred queries on the slow path, the very sizes a micro-batching service sees;
below four queries the plain scan stays faster.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
import numpy.typing as npt

from research_rl.embedding import Vectors
from research_rl.errors import ManifestError
from research_rl.manifest import Manifest

__all__ = ["INDEX", "VectorIndex"]

INDEX = "index.faiss"
_BLAS_FROM = 4
"""Smallest batch that is faster as a matrix product."""
_SMALL_BYTES = 64 << 20

Rows = npt.NDArray[np.int64]

EXACT = "Exact"
"""Factory of the exact bf16 scan (`exact.py`), beside faiss's own factory strings."""


class Searcher(Protocol):
    """What the retriever needs of an index."""

    @property
    def rows(self) -> int:
        """Vectors in the index."""
        ...

    @property
    def dim(self) -> int:
        """Length of a vector."""
        ...

    def search(self, queries: Vectors, top_k: int) -> tuple[Vectors, Rows]:
        """Return scores and rows, each [len(queries), k], best first."""
        ...


def open_index(folder: Path, found: Manifest, shards: Sequence[Path], threads: int = 0) -> Searcher:
    """Open the index artifact in `folder`; `shards` are the vector files it was built from. Raises ManifestError."""
    if found.facts["factory"] != EXACT:
        return VectorIndex.open(folder / INDEX, threads)
    import torch

    from research_rl.index.exact import SCAN, ExactScan

    torch.set_num_threads(threads or os.cpu_count() or 1)
    vectors = [np.load(path, mmap_mode="r") for path in shards]
    return ExactScan(folder / SCAN, vectors, found.facts["norm"], found.facts["error"])


class VectorIndex:
    """A faiss index with its row count and dimension; searches from one thread at a time."""

    def __init__(self, index: Any, threads: int = 0) -> None:
        self._index = index
        small = self.rows * self.dim * 4 < _SMALL_BYTES
        self._threads = threads or (1 if small else os.cpu_count() or 1)
        faiss.cvar.distance_compute_blas_threshold = _BLAS_FROM * self.dim

    @classmethod
    def open(cls, path: Path, threads: int = 0) -> VectorIndex:
        """Open an index file, memory-mapped where its kind allows it. Raises ManifestError."""
        try:
            return cls(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC), threads)
        except RuntimeError as error:
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

    def search(self, queries: Vectors, top_k: int) -> tuple[Vectors, Rows]:
        """Return scores and rows, each [len(queries), k], best first, k = min(top_k, rows); row -1 where too few were found."""
        faiss.omp_set_num_threads(self._threads)  # holds for the calling thread alone, so it is said where the search runs
        scores, rows = self._index.search(np.ascontiguousarray(queries, np.float32), min(top_k, self.rows))
        return scores, rows
