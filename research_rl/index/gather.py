"""Read single vectors of an embeddings artifact from disk, many at once. Knows files and rows; scores nothing.

What is in the system's page cache is copied at once; what is not is read by several threads side by side, because a disk answers
many small reads in the time of one. Unlike a memory map, none of it counts as memory of this process.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from research_rl.embedding import Vectors
from research_rl.errors import ConfigError, ManifestError
from research_rl.index.vectors import VectorFiles
from research_rl.process.open_files import file_limit

__all__ = ["Gather"]

_READERS = 16
"""Reads under way at once; what a disk of this kind (NVMe, network) answers side by side."""

Rows = npt.NDArray[np.int64]
_Piece = tuple[int, int, memoryview]
"""A file's number, the first byte, and where the bytes go."""


class Gather:
    """Rows of the vector files by `pread`, any number of them in one call; for one thread at a time.

    Raises ConfigError for more files than the process may hold open, ManifestError for one that is no array of float32.
    """

    def __init__(self, vectors: VectorFiles) -> None:
        if len(vectors.paths) > (most := file_limit()):
            raise ConfigError(
                f"the embeddings have {len(vectors.paths):,} vector files, this process may hold {most:,} open; raise `ulimit -n`, or "
                "raise encoder.shard_rows and encode again"
            )
        self.dim = vectors.dim
        self._starts = np.array(vectors.starts)
        self._paths = vectors.paths
        self._offsets = np.array([_first_byte(path, vectors.dim) for path in vectors.paths], np.int64)
        self._files = [os.open(path, os.O_RDONLY) for path in vectors.paths]
        for handle in self._files:
            # Rows that lie anywhere: what the system would read ahead is read for nothing.
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        self._peeks = True
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="gather")

    def __del__(self) -> None:
        for handle in getattr(self, "_files", ()):
            os.close(handle)

    def take(self, rows: Rows) -> Vectors:
        """Return the vectors at `rows` (ascending, each once), shape [len(rows), dim]. Raises ManifestError for a file cut short."""
        taken = np.empty((len(rows), self.dim), np.float32)
        missing = [piece for piece in self._pieces(rows, taken) if not self._in_memory(piece)]
        if missing:
            share = -(-len(missing) // _READERS)
            # One task a reader, not one a row: handing over a task takes as long as reading several rows.
            parts = [missing[start : start + share] for start in range(0, len(missing), share)]
            for _ in self._pool.map(self._read, parts):
                pass
        return taken

    def _pieces(self, rows: Rows, taken: Vectors) -> Iterable[_Piece]:
        """Cut the rows into runs that follow each other in one file: each is a single read."""
        if not len(rows):
            return ()
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        firsts = np.flatnonzero(np.concatenate([[True], (np.diff(rows) != 1) | (np.diff(owners) != 0)]))
        size = self.dim * 4
        begins = self._offsets[owners[firsts]] + (rows[firsts] - self._starts[owners[firsts]]) * size
        ends = np.append(firsts[1:], len(rows)) * size
        view = taken.data.cast("B")
        places = zip(owners[firsts].tolist(), begins.tolist(), (firsts * size).tolist(), ends.tolist(), strict=True)
        return ((owner, begin, view[low:high]) for owner, begin, low, high in places)

    def _in_memory(self, piece: _Piece) -> bool:
        """Read a piece if that needs no disk; whether it was read whole."""
        owner, begin, target = piece
        if not self._peeks:
            return False
        try:
            return os.preadv(self._files[owner], [target], begin, os.RWF_NOWAIT) == len(target)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            self._peeks = False  # a file system that cannot say what is in memory
            return False

    def _read(self, pieces: Iterable[_Piece]) -> None:
        for owner, begin, target in pieces:
            done = 0
            while done < len(target):
                count = os.preadv(self._files[owner], [target[done:]], begin + done)
                if not count:
                    path = self._paths[owner]
                    raise ManifestError(f"{path} ends before byte {begin + len(target):,}; remove {path.parent} and run embed again")
                done += count


def _first_byte(path: Path, dim: int) -> int:
    """Return where the numbers of an .npy file begin. Raises ManifestError."""
    array: np.memmap[tuple[int, ...], np.dtype[np.float32]] = np.load(path, mmap_mode="r")
    if array.dtype != np.float32 or not array.flags.c_contiguous or array.ndim != 2 or array.shape[1] != dim:
        raise ManifestError(
            f"{path} holds {array.dtype} of shape {array.shape}, rows of {dim} float32 are needed; run the embed stage again"
        )
    return array.offset
