"""The bf16 scan returns what an exhaustive search returns, also among near-equal rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from research_rl.config import RetrieverConfig
from research_rl.errors import ManifestError
from research_rl.index import exact
from research_rl.index.exact import ExactScan, write_scan
from research_rl.index.search import EXACT
from research_rl.retriever.engine import Retriever
from tests import knowledge


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _scan(tmp_path: Path, vectors: np.ndarray, *cuts: int) -> ExactScan:
    shards = np.split(vectors, cuts)
    norm, error = write_scan(shards, tmp_path / exact.scan_name(0))
    return ExactScan(tmp_path / exact.scan_name(0), shards, norm, error)


def _truth(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """The k best float64 scores of each query."""
    return -np.sort(-(queries.astype(np.float64) @ vectors.astype(np.float64).T), axis=1)[:, :k]


@pytest.mark.parametrize("spread", [1.0, 0.01, 0.0005])
@pytest.mark.parametrize("rows", [3, 64, 1000, 5003])
def test_every_true_neighbour_is_found_however_close_the_rows_lie(tmp_path: Path, rows: int, spread: float) -> None:
    generator = np.random.default_rng(rows)
    vectors = _unit(generator.standard_normal((1, 96)) + spread * generator.standard_normal((rows, 96)))
    queries = _unit(generator.standard_normal((1, 96)) + generator.standard_normal((40, 96)))
    scan = _scan(tmp_path, vectors, rows // 3)
    for k in (1, 5, 20):
        scores, found = scan.search(queries, k)
        assert found.shape == (40, min(k, rows))
        np.testing.assert_allclose(scores, _truth(vectors, queries, k), atol=2e-6)
        np.testing.assert_allclose(np.einsum("qkd,qd->qk", vectors[found], queries), scores, atol=1e-6)
        assert all(len(set(row)) == len(row) for row in found.tolist())


def test_small_score_buffers_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    vectors, queries = _unit(generator.standard_normal((3000, 64))), _unit(generator.standard_normal((16, 64)))
    scan = _scan(tmp_path, vectors)
    whole = scan.search(queries, 10)
    monkeypatch.setattr(exact, "_SCORE_BYTES", 16 * 2 * 200)
    parts = scan.search(queries, 10)
    np.testing.assert_array_equal(whole[1], parts[1])


def test_a_scan_of_another_length_is_refused(tmp_path: Path) -> None:
    vectors = _unit(np.random.default_rng(0).standard_normal((100, 32)))
    norm, error = write_scan([vectors], tmp_path / exact.scan_name(0))
    with pytest.raises(ManifestError, match=r"99 vectors of 32 need"):
        ExactScan(tmp_path / exact.scan_name(0), [vectors[:99]], norm, error)


def test_the_retriever_answers_alike_over_the_scan_and_over_the_flat_index(tmp_path: Path) -> None:
    queries = [f"Person{n} Surname{n}" for n in range(0, 250, 7)]
    answers = []
    for factory in ("Flat", EXACT):
        workspace = knowledge.built(tmp_path / factory, encoder={"dim": 512}, index={"factory": factory})
        answers.append(Retriever.open(workspace, RetrieverConfig()).search(queries, 3))
    flat, scan = answers
    assert [[p.score for p in row] for row in scan] == [pytest.approx([p.score for p in row], abs=1e-5) for row in flat]
    assert [row[0].id for row in scan] == [row[0].id for row in flat]


def test_an_altered_vector_file_is_found_before_it_is_searched(tmp_path: Path) -> None:
    workspace = knowledge.built(tmp_path, encoder={"dim": 512}, index={"factory": EXACT})
    path = next(workspace.folder("embed").glob("vectors-*"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ManifestError, match=r"vectors-.* was altered"):
        Retriever.open(workspace, RetrieverConfig())
