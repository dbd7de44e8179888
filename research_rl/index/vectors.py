"""The vector files of an embeddings artifact, read by row. Maps one file at a time, so that memory stays flat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from research_rl.embedding import Vectors

__all__ = ["VectorFiles"]

Rows = npt.NDArray[np.int64]


class VectorFiles:
    """Rows of several .npy files as one sequence of vectors."""

    def __init__(self, paths: Sequence[Path], dim: int) -> None:
        self.paths, self.dim = list(paths), dim
        self.starts = [0, *np.cumsum([len(_map(path)) for path in paths]).tolist()]

    def __len__(self) -> int:
        return self.starts[-1]

    def batches(self, start: int, stop: int, size: int) -> Iterator[tuple[int, Vectors]]:
        """Yield first row and vectors [at most size, dim] of consecutive batches of rows `start` to `stop` - 1."""
        for path, first, last in zip(self.paths, self.starts, self.starts[1:], strict=False):
            low, high = max(start, first), min(stop, last)
            if low < high:
                mapped = _map(path)
                for row in range(low, high, size):
                    # A copy, so that the map, and with it the pages it keeps in memory, goes with its file.
                    yield row, np.array(mapped[row - first : min(row + size, high) - first], np.float32)

    def take(self, rows: Rows) -> Vectors:
        """Return the vectors at `rows` (ascending), shape [len(rows), dim]."""
        owners = np.searchsorted(self.starts, rows, side="right") - 1
        parts = [_map(self.paths[owner])[rows[owners == owner] - self.starts[owner]] for owner in np.unique(owners)]
        return np.concatenate(parts).astype(np.float32) if parts else np.empty((0, self.dim), np.float32)

    def spread(self, most: int) -> Rows:
        """Return at most `most` rows at equal distances."""
        return np.arange(0, len(self), max(1, -(-len(self) // most)))

    def mapped(self, start: int, stop: int) -> list[Vectors]:
        """Return memory-mapped views that together hold rows `start` to `stop` - 1."""
        spans = zip(self.paths, self.starts, self.starts[1:], strict=False)
        return [_map(path)[max(start - first, 0) : stop - first] for path, first, last in spans if first < stop and start < last]


def _map(path: Path) -> Vectors:
    return np.load(path, mmap_mode="r")
