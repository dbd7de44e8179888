"""Memory of an index build, planned before it starts. Knows sizes; touches no data.

Every figure is an upper estimate in bytes of resident memory; docs/experiments.md compares them with measured peaks.
"""

from __future__ import annotations

from collections.abc import Sequence

from research_rl.config import IndexConfig
from research_rl.errors import ConfigError

__all__ = ["files_held", "peak", "shard_rows"]

_MIB = 1 << 20
_BASE = 170 * _MIB
"""Interpreter, numpy, Arrow and faiss before any data."""
_TORCH = 230 * _MIB
_READ = 64 * _MIB
"""A vector file mapped while it is read, and the batch on its way."""
_GROWN = 1.6
"""Inverted lists and graphs grow by doubling: what they hold above what they need."""
_TOKENS = 64
"""Stems a passage keeps, of about 100 words."""
_TOKEN_BYTES = 52
"""Memory of a token while its file is scored and sorted."""
_WORD_BYTES = 300
_LEAST_ROWS = 100


def shard_rows(config: IndexConfig, dim: int, rows: int) -> int:
    """Return how many passages an index file covers: index.shard_rows, or fewer to stay within index.memory_gib.

    Raises ConfigError when not even the smallest file fits.
    """
    limit = config.memory_gib * 1024**3
    fixed, each = _fixed(config, dim, rows), _per_row(config, dim)
    most = int((limit - fixed) / each) if each else config.shard_rows
    if most < _LEAST_ROWS:
        raise ConfigError(
            f"index.memory_gib={config.memory_gib:g} is too little: index.factory={config.factory} with {rows:,} passages needs "
            f"{fixed / 1024**3:.2f} GiB before the first passage; raise it, or lower index.train_rows"
        )
    return min(config.shard_rows, most)


def peak(config: IndexConfig, dim: int, rows: int) -> int:
    """Return the planned peak of the index stage. Raises ConfigError like `shard_rows`."""
    return int(_fixed(config, dim, rows) + _per_row(config, dim) * min(rows, shard_rows(config, dim, rows)))


def files_held(config: IndexConfig, dim: int, ranges: Sequence[tuple[int, int]]) -> int:
    """Return how many files may be open at once within the budget, at least one."""
    room = config.memory_gib * 1024**3 - _fixed(config, dim, ranges[-1][1])
    longest = max(stop - start for start, stop in ranges) * _per_row(config, dim)
    return max(1, min(len(ranges), int(room / max(longest, 1))))


def _fixed(config: IndexConfig, dim: int, rows: int) -> float:
    """Memory that does not depend on the length of a file: libraries, the training sample, the vocabulary."""
    from research_rl.index.search import EXACT

    fixed = float(_BASE + _READ)
    if config.kind != "bm25":
        fixed += _TORCH if config.factory == EXACT else 0
        fixed += 2.0 * min(rows, config.train_rows) * dim * 4 if _trained(config) else 0
    if config.kind != "dense":
        fixed += _WORD_BYTES * _words(rows)
    return fixed


def _per_row(config: IndexConfig, dim: int) -> float:
    from research_rl.index.dense import row_bytes

    sides: list[float] = []
    if config.kind != "bm25" and not config.prebuilt:
        sides.append(row_bytes(config, dim) * (_GROWN if any(name in config.factory for name in ("IVF", "HNSW")) else 1))
    if config.kind != "dense":
        sides.append(_TOKENS * _TOKEN_BYTES)
    return max(sides, default=0.0)


def _trained(config: IndexConfig) -> bool:
    return any(name in config.factory for name in ("IVF", "PQ", "SQ"))


def _words(rows: int) -> float:
    """Distinct stems of a corpus: Heaps' law with the constants of English Wikipedia."""
    return 30.0 * (rows * _TOKENS) ** 0.55
