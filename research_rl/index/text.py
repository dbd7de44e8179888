"""Search a built index with text: by vectors, by words, or by both joined by rank. What the retriever needs of an index."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from research_rl.embedding import Encoder, Vectors, load_encoder, vector_shards
from research_rl.errors import ConfigError, ManifestError
from research_rl.index.bounds import Kind
from research_rl.index.search import VectorSearcher
from research_rl.index.tiers import Certificate, TwoTier
from research_rl.index.vectors import VectorFiles
from research_rl.pipeline.manifest import Manifest

__all__ = ["Dense", "Hybrid", "IndexSearcher", "open_index", "part_rows", "reads_vectors"]

Rows = npt.NDArray[np.int64]
Part = tuple[int, int]


class IndexSearcher(Protocol):
    """An index searched with text; from one thread at a time."""

    @property
    def rows(self) -> int:
        """Passages in the index."""
        ...

    def search(self, queries: Sequence[str], top_k: int) -> tuple[Vectors, Rows]:
        """Return scores and rows, each [len(queries), k], best first, k = min(top_k, rows); row -1 where too few were found."""
        ...


class Dense:
    """Vectors of an encoder, searched with its query vectors."""

    def __init__(self, encoder: Encoder, vectors: VectorSearcher) -> None:
        if encoder.dim != vectors.dim:
            raise ManifestError(
                f"the index holds vectors of {vectors.dim}, the encoder makes {encoder.dim}; run the embed and index stages again"
            )
        self.encoder, self.vectors = encoder, vectors

    @property
    def rows(self) -> int:
        """Passages in the index."""
        return self.vectors.rows

    def search(self, queries: Sequence[str], top_k: int) -> tuple[Vectors, Rows]:
        """Return inner products and rows, see `IndexSearcher`."""
        return self.vectors.search(self.encoder.encode_queries(queries), top_k)

    def certified(self, queries: Sequence[str], top_k: int, kind: Kind, budget: int) -> tuple[Vectors, Rows, list[Certificate]]:
        """Return what `search` returns and how sure each reply is, see `TwoTier.certified`; an index of one tier is not sure."""
        if isinstance(self.vectors, TwoTier):
            return self.vectors.certified(self.encoder.encode_queries(queries), top_k, kind, budget)
        return *self.search(queries, top_k), [Certificate(False, self.rows, 0)] * len(queries)


class Hybrid:
    """Reciprocal rank fusion (Cormack et al. 2009): a passage scores the sum of 1 / (offset + rank) over both rankings."""

    def __init__(self, sides: Sequence[IndexSearcher], depth: int, offset: int) -> None:
        self._sides, self._depth, self._offset = sides, depth, offset

    @property
    def rows(self) -> int:
        """Passages in the index."""
        return self._sides[0].rows

    def search(self, queries: Sequence[str], top_k: int) -> tuple[Vectors, Rows]:
        """Return fused scores and rows, see `IndexSearcher`; no passage beyond the first `depth` of both rankings is found.

        A passage with a score of exactly 0 has nothing in common with the query on that side and has no rank there.
        """
        k = min(top_k, self.rows)
        scores, rows = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        # At least as deep as what is asked for; else the last places would stay empty.
        rankings = [_ranked(*side.search(queries, max(self._depth, k))) for side in self._sides]
        for query, lists in enumerate(zip(*rankings, strict=True)):
            fused = self._fused(lists)[:k]
            rows[query, : len(fused)] = [row for row, _ in fused]
            scores[query, : len(fused)] = [score for _, score in fused]
        return scores, rows

    def _fused(self, rankings: Sequence[Sequence[int]]) -> list[tuple[int, float]]:
        fused: dict[int, float] = {}
        for ranking in rankings:
            for rank, row in enumerate(ranking, self._offset + 1):
                fused[row] = fused.get(row, 0.0) + 1 / rank
        # -1, which stands for no passage, was ranked like one.
        fused.pop(-1, None)
        return sorted(fused.items(), key=lambda hit: (-hit[1], hit[0]))


def _ranked(scores: Vectors, rows: Rows) -> list[list[int]]:
    """Return the rows of each query in order, -1 in place of those that score 0."""
    return np.where(scores == 0, -1, rows).tolist()


def open_index(
    folder: Path, index: Manifest, embed_folder: Path, embed: Manifest, threads: int = 0, *, part: Part = (0, 1)
) -> IndexSearcher:
    """Open the index artifact in `folder`, or the i-th of n parts of it (`part`, whole files each).

    Raises ManifestError for an artifact that cannot be opened and ConfigError for more parts than files.
    """
    return open_files(folder, index.facts, index.counts, embed_folder, embed, threads, part=part)


def open_files(
    folder: Path,
    facts: dict[str, Any],
    counts: dict[str, int],
    embed_folder: Path,
    embed: Manifest,
    threads: int = 0,
    *,
    part: Part = (0, 1),
    keep: bool = True,
) -> IndexSearcher:
    """Open index files by the facts and counts of their manifest; see `open_index` and `Joined` for `keep`."""
    ranges = ranges_of(counts["passages"], counts["shard_rows"])
    numbers = _numbers(len(ranges), part)
    sides: list[IndexSearcher] = []
    if facts["kind"] != "bm25":
        from research_rl.index.dense import open_vectors

        files = VectorFiles(vector_shards(embed_folder, embed), counts["dim"])
        vectors = open_vectors(folder, facts, files, ranges, threads, numbers=numbers, keep=keep)
        sides.append(Dense(load_encoder(embed_folder, embed), vectors))
    if facts["kind"] != "dense":
        from research_rl.index.bm25 import Bm25

        sides.append(Bm25.open(folder, ranges, numbers))
    return sides[0] if len(sides) == 1 else Hybrid(sides, facts["depth"], facts["rank_offset"])


def reads_vectors(index: Manifest) -> bool:
    """Return whether searching this index reads the passage vectors of the embeddings artifact."""
    return "bounds" in index.facts or "candidates" in index.facts


def ranges_of(rows: int, shard_rows: int) -> list[tuple[int, int]]:
    """Return the range of rows of each index file."""
    return [(start, min(start + shard_rows, rows)) for start in range(0, rows, shard_rows)]


def part_rows(counts: dict[str, int], part: Part) -> tuple[int, int]:
    """Return the range of rows that a part of an index answers for."""
    ranges = ranges_of(counts["passages"], counts["shard_rows"])
    numbers = _numbers(len(ranges), part)
    return ranges[numbers[0]][0], ranges[numbers[-1]][1]


def _numbers(files: int, part: Part) -> list[int]:
    number, of = part
    if not 0 <= number < of:
        raise ConfigError(f"part {number} of {of} does not exist; parts are 0 to {of - 1}")
    if of > files:
        raise ConfigError(f"the index has {files} files and cannot be cut into {of} parts; lower index.shard_rows and build it again")
    # Rounded down at both ends, parts differ by one file at most and leave none out.
    return list(range(files * number // of, files * (number + 1) // of))
