"""Measure how long one core takes to search a part of an index, by the number of queries searched together.

Knows the service's own encoder and index code, on random vectors; knows no fleet. All seconds are CPU-seconds of one core, so that other
work on the machine does not count. A time is taken for a growing number of queries and for two sizes of the index; between and beyond
them it is a straight line.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from research_rl.config import Config, IndexConfig
from research_rl.embedding import Vectors
from research_rl.pipeline import arrays
from research_rl.planning import calibrate

__all__ = ["SearchRate", "encoding", "index", "joined"]

BATCHES = (1, 4, 16, 64)
_SAMPLE_BYTES = 64 << 20
"""Vectors that are searched: more than the processor's caches hold."""
_SMALLER = 4
_REPEATS = 9
_TOP_K = 5

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SearchRate:
    """Seconds of one core for a joint search of `BATCHES` queries: `fixed`, and `each` for every row of the part. `spread` are measured
    times over their median.
    """

    fixed: tuple[float, ...]
    each: tuple[float, ...]
    spread: tuple[float, ...] = (1.0,)

    def seconds(self, queries: int, rows: float) -> float:
        """Return the usual seconds of a joint search."""
        times = [fixed + each * rows for fixed, each in zip(self.fixed, self.each, strict=True)]
        if queries <= BATCHES[-1]:
            return float(np.interp(queries, BATCHES, times))
        slope = (times[-1] - times[-2]) / (BATCHES[-1] - BATCHES[-2])
        return times[-1] + max(slope, 0.0) * (queries - BATCHES[-1])

    def service(self, rows: float) -> Callable[[int, random.Random], float]:
        """Return what a simulation draws the seconds of a joint search from."""
        # Looked up once a batch size: a simulation asks a hundred thousand times.
        usual: dict[int, float] = {}

        def drawn(queries: int, draw: random.Random) -> float:
            if queries not in usual:
                usual[queries] = self.seconds(queries, rows)
            return usual[queries] * draw.choice(self.spread)

        return drawn


def joined(one: SearchRate, other: SearchRate) -> SearchRate:
    """Return the rate of doing one after the other, with the wider spread."""
    fixed, each = (tuple(a + b for a, b in zip(*pair, strict=True)) for pair in ((one.fixed, other.fixed), (one.each, other.each)))
    return SearchRate(fixed, each, max(one.spread, other.spread, key=max))


def encoding(config: Config, texts: list[str]) -> tuple[SearchRate, str]:
    """Return what turning queries into vectors takes, and where that comes from."""
    encoder = config.encoder
    if calibrate.shaped(encoder, "embed"):
        each = calibrate.by_shape_query(encoder, config.plan.query_words)
        rate = SearchRate(tuple(each * batch for batch in BATCHES), (0.0,) * len(BATCHES))
        return rate, "query encoding reckoned: the encoder's shape at this machine's matrix rate"
    queries = [" ".join(text.split()[: config.plan.query_words]) for text in texts]
    if encoder.kind == "sentence":
        with calibrate.sentence_encoder(config, threads=1) as loaded:
            return _encoded(loaded, queries), "query encoding measured here"
    from research_rl.embedding.lexical import LexicalEncoder

    return _encoded(LexicalEncoder.fit([texts], encoder.dim), queries), "query encoding measured here"


def _encoded(encoder: Any, queries: list[str]) -> SearchRate:
    times = [_times(lambda start, size=size: encoder.encode_queries(_some(queries, start, size))) for size in BATCHES]
    return SearchRate(_medians(times), (0.0,) * len(BATCHES), _spread(times))


def _some(queries: list[str], start: int, size: int) -> list[str]:
    return [queries[(start * size + place) % len(queries)] for place in range(size)]


def index(config: IndexConfig, dim: int) -> SearchRate:
    """Return what searching a part takes, by an index built here of random unit vectors in two sizes.

    Vectors that are read for candidates lie in the page cache. Raises ConfigError for a factory that faiss refuses.
    """
    rows = max(4096, _SAMPLE_BYTES // (4 * dim))
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((rows, dim), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    smaller, larger = _searched(config, vectors[: rows // _SMALLER]), _searched(config, vectors)
    before, after = np.array(_medians(smaller)), np.array(_medians(larger))
    each: Seconds = np.maximum(after - before, 0.0) / (rows - rows // _SMALLER)
    fixed: Seconds = np.maximum(after - each * rows, 0.0)
    return SearchRate(tuple(fixed.tolist()), tuple(each.tolist()), _spread(larger))


def _searched(config: IndexConfig, vectors: Vectors) -> list[list[float]]:
    from research_rl.index.dense import learn, open_vectors, write
    from research_rl.index.search import EXACT
    from research_rl.index.vectors import VectorFiles

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        arrays.save(folder / "vectors.npy", vectors)
        files = VectorFiles([folder / "vectors.npy"], vectors.shape[1])
        empty = None if config.factory == EXACT else learn(config, files)
        record = write(config, empty, files, 0, 0, len(files), folder)
        facts: dict[str, Any] = {"factory": config.factory, "exact": config.factory in ("Flat", EXACT)}
        facts |= {"bounds": [record]} if config.factory == EXACT or config.refine else {}
        facts |= {"candidates": config.candidates} if config.refine else {}
        opened = open_vectors(folder, facts, files, [(0, len(files))], 1, numbers=[0])
        # Rows with noise as queries: what a scan does with codes hangs on how far the best stand out.
        noise = np.random.default_rng(1).standard_normal((BATCHES[-1] * 4, vectors.shape[1]), dtype=np.float32)
        queries = vectors[: len(noise)] + 0.5 * noise / np.sqrt(vectors.shape[1])
        return [_times(lambda start, size=size: opened.search(_block(queries, start, size), _TOP_K)) for size in BATCHES]


def _block(queries: Vectors, start: int, size: int) -> Vectors:
    return np.take(queries, np.arange(start * size, (start + 1) * size), axis=0, mode="wrap")


def _times(work: Callable[[int], object]) -> list[float]:
    """Return the CPU-seconds of each repeat; the first, which sets up libraries and buffers, is left out."""
    taken: list[float] = []
    for number in range(_REPEATS + 1):
        started = time.process_time()
        work(number)
        taken.append(max(time.process_time() - started, 1e-7))
    return taken[1:]


def _medians(times: list[list[float]]) -> tuple[float, ...]:
    return tuple(float(np.median(taken)) for taken in times)


def _spread(times: list[list[float]]) -> tuple[float, ...]:
    """Return the times over their median at the largest batch: small ones are too short for the clock."""
    return tuple((np.array(times[-1]) / np.median(times[-1])).round(4).tolist())
