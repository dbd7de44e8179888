"""What an index says of itself is true: its exact neighbours are the exact ones, and a kind of bound that is of no use is not paid for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from research_rl.config import EncoderConfig, IndexConfig
from research_rl.index import budget, report
from research_rl.index.bounds import Kind
from research_rl.index.tiers import Certificate, TwoTier
from research_rl.index.vectors import VectorFiles


def files(folder: Path, vectors: np.ndarray) -> VectorFiles:
    for number, part in enumerate(np.array_split(vectors, 3)):
        np.save(folder / f"vectors-{number:05d}.npy", part)
    return VectorFiles(sorted(folder.glob("vectors-*.npy")), vectors.shape[1])


@pytest.mark.parametrize("block", [7, 100, 8192])
def test_exact_neighbours_come_in_order_equal_ones_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    draw = np.random.default_rng(0)
    # Whole numbers have exact products, so that repeated rows are equal however they are computed.
    vectors = draw.integers(-3, 4, (300, 8)).astype(np.float32)
    vectors[200:260] = vectors[:60]
    queries = vectors[draw.integers(0, 300, 20)]
    truth = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")
    monkeypatch.setattr(report, "_BLOCK", block)
    held = files(tmp_path, vectors)
    for k in (1, 21, 300, 400):
        np.testing.assert_array_equal(report.exact(queries, held, k), truth[:, :k])


class Asked(TwoTier):
    """Certifies the kind "probable" alone, and counts the queries that each kind was asked for."""

    def __init__(self) -> None:
        self.candidates, self.asked = 400, dict[Kind, int]()

    def certified(self, queries: np.ndarray, top_k: int, kind: Kind, budget: int) -> tuple[np.ndarray, np.ndarray, list[Certificate]]:
        self.asked[kind] = self.asked.get(kind, 0) + len(queries)
        sure = kind == "probable"
        return queries, queries, [Certificate(sure, 0 if sure else 9, 400 if sure else budget) for _ in queries]


def test_a_bound_that_certifies_none_of_the_first_queries_is_not_asked_of_the_others() -> None:
    index = Asked()
    assert report.certified(index, np.zeros((64, 4), np.float32)) == {"proven": {"20000": 0.0}, "probable": {"400": 1.0}}
    assert index.asked == {"proven": 8, "probable": 64}


def test_the_planned_peak_counts_what_the_finished_index_is_opened_with() -> None:
    codes = IndexConfig(factory="RR384,RaBitQfs", refine=True, shard_rows=2_000_000, memory_gib=4)
    lexical, sentence = EncoderConfig(), EncoderConfig(kind="sentence", model="intfloat/e5-base-v2")
    rows, size = 21_015_324, 48 + 8
    alone, with_encoder = (budget.peak(codes, 384, rows, encoder=encoder) for encoder in (None, sentence))
    assert alone < 0.7 * 1024**3, "a file of two million codes is built in that"
    assert with_encoder > rows * size + 600 * 1024**2, "all files are open at once, and the encoder of the canary is"
    assert with_encoder < 1.1 * budget.served(codes, sentence, 384, rows) < 4 * 1024**3
    ranges = [(start, min(start + 2_000_000, rows)) for start in range(0, rows, 2_000_000)]
    assert budget.files_held(codes, 384, ranges, sentence) == len(ranges) == 11
    little = codes.model_copy(update={"memory_gib": 1.2})
    assert budget.files_held(little, 384, ranges, sentence) == 3 and budget.files_held(little, 384, ranges, lexical) == 9
    assert budget.peak(little, 384, rows, encoder=sentence) <= 1.2 * 1024**3
