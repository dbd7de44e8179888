"""The bf16 scan returns what an exhaustive search returns, also among near-equal rows."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from research_rl.config import IndexConfig, RetrieverConfig
from research_rl.errors import DataError, ManifestError
from research_rl.index import dense, exact
from research_rl.index.exact import ExactScan, write_scan
from research_rl.index.search import EXACT
from research_rl.index.vectors import VectorFiles
from research_rl.retriever.retriever import Retriever
from tests import knowledge


@pytest.fixture(name="processor", params=["multiplies bf16", "widens"])
def _processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a scan does depends on the processor; both ways hold on every one."""
    monkeypatch.setattr(exact, "multiplies_bfloat16", lambda: request.param == "multiplies bf16")
    monkeypatch.setattr(exact, "_WIDENED_BYTES", 700 * 4 * 96)


def _unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _scan(tmp_path: Path, vectors: np.ndarray, *cuts: int) -> ExactScan:
    shards = np.split(vectors, cuts)
    norm, error = write_scan(shards, tmp_path / exact.scan_name(0))
    return ExactScan(tmp_path / exact.scan_name(0), shards, norm, error)


def _truth(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    """The k best float64 scores of each query."""
    return -np.sort(-(queries.astype(np.float64) @ vectors.astype(np.float64).T), axis=1)[:, :k]


@pytest.mark.usefixtures("processor")
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


@pytest.mark.usefixtures("processor")
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


@pytest.mark.usefixtures("processor")
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


@pytest.mark.usefixtures("processor")
def test_equal_rows_come_in_row_order_with_equal_scores(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    few = _unit(generator.standard_normal((7, 96)))
    vectors = few[generator.integers(0, 7, 3001)]
    queries = _unit(few[:5] + 0.1 * generator.standard_normal((5, 96)))
    scores, rows = _scan(tmp_path, vectors, 1000).search(queries, 50)
    for query in range(5):
        assert len(set(scores[query].tolist())) == 1
        same = np.flatnonzero((vectors == vectors[rows[query, 0]]).all(axis=1))
        assert rows[query].tolist() == same[:50].tolist()


@pytest.mark.usefixtures("processor")
def test_zero_vectors_and_zero_queries_are_ranked_like_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_RESCORED", 64)
    generator = np.random.default_rng(6)
    vectors = _unit(generator.standard_normal((500, 64)))
    vectors[::2] = 0
    queries = np.concatenate([np.zeros((1, 64), np.float32), -vectors[1:2]])
    scores, rows = _scan(tmp_path, vectors).search(queries, 5)
    assert rows[0].tolist() == [0, 1, 2, 3, 4] and (scores[0] == 0).all()
    np.testing.assert_allclose(scores, _truth(vectors, queries, 5), atol=2e-6)


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e12, 1e17])
def test_scores_hold_at_any_length_of_vectors(tmp_path: Path, scale: float) -> None:
    generator = np.random.default_rng(7)
    vectors = (scale * generator.standard_normal((2000, 64)) * generator.exponential(1, (2000, 1))).astype(np.float32)
    queries = (scale * generator.standard_normal((20, 64))).astype(np.float32)
    scores, _ = _scan(tmp_path, vectors / np.float32(10)).search(queries / np.float32(10), 5)
    truth = _truth(vectors / np.float32(10), queries / np.float32(10), 5)
    np.testing.assert_allclose(scores, truth, rtol=1e-4, atol=1e-37)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e19])
def test_numbers_no_score_can_be_made_of_are_refused(tmp_path: Path, bad: float) -> None:
    vectors = _unit(np.random.default_rng(8).standard_normal((100, 32)))
    scan = _scan(tmp_path, vectors)
    poisoned = vectors.copy()
    poisoned[3, 4] = bad
    with pytest.raises(DataError, match=r"a query vector is longer than 1e\+18 or holds NaN"):
        scan.search(poisoned[:8], 5)
    with pytest.raises(DataError, match=r"a vector is longer than 1e\+18 or holds NaN"):
        write_scan([poisoned], tmp_path / "other")


_WORKER = """
import sys, numpy as np
from pathlib import Path
from research_rl.index.dense import open_vectors
from research_rl.index.vectors import VectorFiles
folder, factory = Path(sys.argv[1]), sys.argv[2]
facts = {"factory": factory, "bounds": [{"norm": 1.1, "error": 0.01}]}
files = VectorFiles([folder / "vectors-00000.npy"], 256)
index = open_vectors(folder, facts, files, [(0, 30_000)], 1, numbers=[0])
index.search(np.ones((1, 256), np.float32) / 16, 5)
print("ready", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("factory", [EXACT, "Flat"])
def test_further_workers_cost_no_index_memory(tmp_path: Path, factory: str) -> None:
    """The kernel's proportional set: two workers over one index of 15 or 29 MiB share its pages."""
    vectors = _unit(np.random.default_rng(9).standard_normal((30_000, 256)).astype(np.float32))
    np.save(tmp_path / "vectors-00000.npy", vectors)
    index = IndexConfig(factory=factory)
    files = VectorFiles([tmp_path / "vectors-00000.npy"], 256)
    dense.write(index, None if factory == EXACT else dense.learn(index, files), files, 0, 0, 30_000, tmp_path)
    names = [path.name for path in tmp_path.iterdir() if path.suffix in (".bf16", ".faiss")]
    command = [sys.executable, "-c", _WORKER, str(tmp_path), factory]
    workers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        assert all(worker.stdout and worker.stdout.readline() == "ready\n" for worker in workers)
        maps = [_mapped(worker.pid, names[0]) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    size = (tmp_path / names[0]).stat().st_size
    assert all(part["Rss"] > 0.9 * size for part in maps), "every worker has read all of it"
    assert sum(part["Pss"] for part in maps) < 1.1 * size, "and all of them together hold it once"
    assert all(part["Private_Dirty"] == 0 for part in maps)


def _mapped(pid: int, name: str) -> dict[str, int]:
    """Bytes of the mappings of a file in a process, by kind, as /proc/PID/smaps states them."""
    found: Counter[str] = Counter()
    mine = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        key, *rest = line.split()
        if "-" in key and len(rest) >= 4:
            mine = line.endswith(name)
        elif mine and rest[-1] == "kB":
            found[key.rstrip(":")] += int(rest[0]) * 1024
    return found
