"""P11: BM25 through our API against raw bm25s with the same stemmer and stop words: building, and searching in batches."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import Stemmer

from benchmarks.big_build import passages
from benchmarks.duel import Duel, alternate, cpu_seconds, rate
from research_rl.config import IndexConfig
from research_rl.index import bm25
from research_rl.index.bm25 import STOP_WORDS, Bm25

TOP, QUERIES, QUERY_WORDS = 5, 512, 8


class Texts:
    """Passages as a store gives them."""

    def __init__(self, rows: int) -> None:
        import json

        self.all = [json.loads(line)["contents"] for line in passages(rows)]

    def __len__(self) -> int:
        return len(self.all)

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the texts of rows `start` to `stop` - 1."""
        return self.all[start:stop]

    def batches(self, size: int) -> Iterator[tuple[int, list[str]]]:
        """Yield consecutive batches."""
        for start in range(0, len(self.all), size):
            yield start, self.all[start : start + size]


def run(quick: bool) -> Iterator[Duel]:
    """Yield both duels; raises AssertionError when the scores differ."""
    texts, rounds = Texts(20_000 if quick else 100_000), 3 if quick else 5
    with tempfile.TemporaryDirectory() as folder:
        yield alternate(
            "P11",
            f"BM25 build, {len(texts):,} passages, saved",
            "passages per CPU-second",
            lambda: _built(lambda: bm25.write(texts, IndexConfig(), Path(folder)), len(texts)),
            lambda: _built(lambda: _raw(texts.all).save(Path(folder) / "raw", show_progress=False), len(texts)),
            0.95,
            rounds,
        )
        yield _searches(texts, Path(folder), 1.0 if quick else 3.0, rounds)


def _searches(texts: Texts, folder: Path, seconds: float, rounds: int) -> Duel:
    ours = Bm25.open(folder, [(0, len(texts))], [0])
    raw = bm25s.BM25.load(folder / "raw", mmap=True)
    stemmer, queries = Stemmer.Stemmer("english"), _queries(texts.all)

    def peer(some: list[str]) -> Any:
        tokens = bm25s.tokenize(some, stopwords=list(STOP_WORDS), stemmer=stemmer, show_progress=False)
        return raw.retrieve(tokens, k=TOP, show_progress=False)

    np.testing.assert_allclose(ours.search(queries, TOP)[0], peer(queries)[1], rtol=1e-5)
    return alternate(
        "P11",
        f"BM25 top-{TOP} of {len(texts):,}, batch {len(queries)}",
        "queries per CPU-second",
        lambda: rate(lambda: len(ours.search(queries, TOP)[0]), seconds),
        lambda: rate(lambda: len(peer(queries)[0]), seconds),
        0.95,
        rounds,
    )


def _queries(texts: list[str]) -> list[str]:
    generator = np.random.default_rng(1)
    chosen = [texts[row].split() for row in generator.integers(0, len(texts), QUERIES)]
    return [" ".join(generator.choice(words, QUERY_WORDS)) for words in chosen]


def _raw(texts: list[str]) -> bm25s.BM25:
    made = bm25s.BM25()
    tokens = bm25s.tokenize(texts, stopwords=list(STOP_WORDS), stemmer=Stemmer.Stemmer("english"), show_progress=False)
    made.index(tokens, show_progress=False)
    return made


def _built(work: Callable[[], object], rows: int) -> float:
    started = cpu_seconds()
    work()
    return rows / (cpu_seconds() - started)
