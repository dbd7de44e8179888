"""Memory of an index build, planned before it starts. Knows sizes; touches no data.

Every figure is an upper estimate in bytes of resident memory; docs/experiments.md compares them with measured peaks.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from research_rl.config import CorpusConfig, EncoderConfig, IndexConfig
from research_rl.embedding.standing import ROW_BYTES
from research_rl.errors import ConfigError

__all__ = ["ENGLISH", "Terms", "corpus_peak", "disk", "embed_peak", "exact", "files_held", "opened", "peak", "served", "shard_rows"]

_MIB = 1 << 20
_BASE = 112 * _MIB
"""Interpreter, numpy, Arrow and faiss before any data."""
_TORCH = 230 * _MIB
_READ = 16_384
"""Vectors held beside the index: a vector file mapped while it is read, and the batch on its way."""
_GROWN = 1.6
"""Inverted lists, graphs and FastScan's tables grow by doubling: what they hold above what they need."""
_TOKEN_BYTES = 88
"""Memory of a token while its file is scored and sorted."""
_SENTENCE = 600 * _MIB
"""torch and sentence-transformers with a model of the base size."""
_ACTIVATIONS = 80
"""Numbers a token holds for each of its vector's while a batch goes through a transformer."""
_RESCORED = 128 * _MIB
"""Full vectors of the candidates on their way, and the copies that are scored."""
# A stem, its number and the words that lead to it, in two Python dictionaries.
_WORD_BYTES = 300
_WORD_DISK = 16
"""A term and its number in the vocabulary's file; each file of scores has eight bytes a term besides."""
_STEMMER = 40 * _MIB
"""bm25s and what it imports."""
_WORKER = 56 * _MIB
"""What each further process of a service has for itself: its event loop, threads and requests under way, and pages that both write."""
_LEAST_ROWS = 100


@dataclass(frozen=True)
class Terms:
    """The terms of a corpus: how many a passage keeps, the share of them that is distinct, and Heaps' law, scale * terms ** growth."""

    tokens: float = 64.0
    distinct: float = 0.85
    scale: float = 30.0
    growth: float = 0.55

    def vocabulary(self, rows: int) -> float:
        """Return the distinct terms of `rows` passages."""
        return self.scale * (rows * self.tokens) ** self.growth


ENGLISH = Terms()
"""Stems of passages of about 100 words of English Wikipedia. `bm25.sampled` counts those of another corpus: a script without spaces
between words has several n-grams for each of its characters."""


def shard_rows(config: IndexConfig, dim: int, rows: int, terms: Terms = ENGLISH) -> int:
    """Return how many passages an index file covers: index.shard_rows, or fewer to stay within index.memory_gib.

    Raises ConfigError when not even the smallest file fits.
    """
    limit = config.memory_gib * 1024**3
    fixed, each = _fixed(config, dim, rows, terms), _per_row(config, dim, terms)
    # A prebuilt index is copied as a file and costs no memory a row.
    most = int((limit - fixed) / each) if each else config.shard_rows
    if most < _LEAST_ROWS:
        raise ConfigError(
            f"index.memory_gib={config.memory_gib:g} is too little: index.factory={config.factory} with {rows:,} passages needs "
            f"{fixed / 1024**3:.2f} GiB before the first passage; raise it, or lower index.train_rows"
        )
    return min(config.shard_rows, most)


def peak(config: IndexConfig, dim: int, rows: int, terms: Terms = ENGLISH, encoder: EncoderConfig | None = None) -> int:
    """Return the planned peak of the index stage: of building a file, or of opening what was built. Raises ConfigError like `shard_rows`.

    The finished index is searched by text, which takes the `encoder`; None leaves that out.
    """
    longest = min(rows, shard_rows(config, dim, rows, terms))
    building = _fixed(config, dim, rows, terms) + _per_row(config, dim, terms) * longest
    if config.kind == "bm25" or encoder is None or not longest:
        return int(building)
    ranges = [(start, min(start + longest, rows)) for start in range(0, rows, longest)]
    # An exact index is looked at file by file; of another the latency is measured, with as many files open as the budget allows.
    held = 1 if exact(config) else files_held(config, dim, ranges, encoder)
    return int(max(building, opened(config, encoder) + min(held * longest, rows) * _file_bytes(config, dim)))


def files_held(config: IndexConfig, dim: int, ranges: Sequence[tuple[int, int]], encoder: EncoderConfig) -> int:
    """Return how many files may be open at once within the budget, at least one."""
    room = config.memory_gib * 1024**3 - opened(config, encoder)
    longest = max(stop - start for start, stop in ranges) * _file_bytes(config, dim)
    return max(1, min(len(ranges), int(room / max(longest, 1))))


def exact(config: IndexConfig) -> bool:
    """Return whether the vectors of an index are compared exactly, without candidates."""
    from research_rl.index.search import EXACT

    return config.factory in ("Flat", EXACT)


def disk(config: IndexConfig, dim: int, rows: int, terms: Terms = ENGLISH) -> float:
    """Return the bytes of the index artifact; a prebuilt file is taken for one of index.factory."""
    from research_rl.index.dense import row_bytes

    dense = rows * row_bytes(config, dim) if config.kind != "bm25" else 0.0
    if config.kind == "dense":
        return dense
    files = -(-rows // shard_rows(config, dim, rows, terms)) if rows else 0
    return dense + rows * terms.tokens * terms.distinct * 8 + terms.vocabulary(rows) * (_WORD_DISK + 8 * files)


def served(config: IndexConfig, encoder: EncoderConfig, dim: int, rows: int, workers: int = 1) -> float:
    """Return the memory of a service whose searches read all of the index: libraries, encoder, and what a query passes over.

    Inverted lists that are mapped count as if a query read none of them: the system keeps as many of their pages as it has room for.
    Workers share libraries, encoder and index; what each needs besides is counted for each. One process more holds what they share.
    """
    mapped = "IVF" in config.factory and "fs" not in config.factory
    rescored = _RESCORED if config.refine else 0
    own = (workers - 1) * rescored + (workers * _WORKER if workers > 1 else 0)
    return opened(config, encoder) + own + (0 if mapped else rows * _file_bytes(config, dim))


def opened(config: IndexConfig, encoder: EncoderConfig) -> float:
    """Return the memory of an open index without its files: libraries, encoder, and vectors on their way."""
    from research_rl.index.search import EXACT

    fixed = _BASE + (_SENTENCE if encoder.kind == "sentence" else _TORCH if config.factory == EXACT else 0)
    # The exact scan rescores, too: by the vectors' pages, which leave memory when others need it.
    return fixed + (_RESCORED if config.refine else 0)


def corpus_peak(config: CorpusConfig, text: float) -> float:
    """Return the planned peak of the corpus stage: one shard as Python strings and as Arrow, with `text` bytes a passage."""
    return _BASE + config.shard_rows * (3.5 * text + 300)


def embed_peak(config: EncoderConfig, dim: int, rows: int) -> float:
    """Return the planned peak of the embed stage: its texts and vectors, what the model needs, and the keys of what stands already."""
    fixed = _BASE + ROW_BYTES * rows
    if config.kind != "sentence":
        return fixed + config.shard_rows * (dim * 4 + 1500) + 16 * _MIB
    cores = os.cpu_count() or 1
    return fixed + _SENTENCE + cores * config.batch_tokens * dim * 4 * _ACTIVATIONS + config.shard_rows * (dim * 4 + 4000)


def _fixed(config: IndexConfig, dim: int, rows: int, terms: Terms) -> float:
    """Memory that does not depend on the length of a file: libraries, the training sample, the vocabulary."""
    from research_rl.index.search import EXACT

    fixed = _BASE + _READ * dim * 4.0
    if config.kind != "bm25":
        fixed += _TORCH if config.factory == EXACT else 0
        fixed += 2.0 * min(rows, config.train_rows) * dim * 4 if _trained(config) else 0
    if config.kind != "dense":
        fixed += _STEMMER + _WORD_BYTES * terms.vocabulary(rows)
    return fixed


def _per_row(config: IndexConfig, dim: int, terms: Terms) -> float:
    from research_rl.index.dense import row_bytes

    sides: list[float] = []
    if config.kind != "bm25" and not config.prebuilt:
        sides.append(row_bytes(config, dim) * (_GROWN if any(name in config.factory for name in ("IVF", "HNSW", "fs")) else 1))
    if config.kind != "dense":
        sides.append(terms.tokens * _TOKEN_BYTES)
    # Vectors and words are built one after the other.
    return max(sides, default=0.0)


def _file_bytes(config: IndexConfig, dim: int) -> float:
    """Return the bytes of a row in an index file of vectors."""
    from research_rl.index.dense import row_bytes

    return row_bytes(config, dim)


def _trained(config: IndexConfig) -> bool:
    return any(name in config.factory for name in ("IVF", "PQ", "SQ", "RaBitQ"))
