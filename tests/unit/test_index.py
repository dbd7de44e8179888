"""The index finds what it holds, says how well, and refuses a factory that does not fit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from research_rl import manifest
from research_rl.embedding import build as embed
from research_rl.embedding import load_encoder
from research_rl.errors import ConfigError, ManifestError
from research_rl.index import build
from research_rl.index.search import INDEX, VectorIndex
from tests.knowledge import built, context, store

ENCODER = {"dim": 64, "shard_rows": 100}


def test_flat_search_is_exact_at_every_batch_size(tmp_path: Path) -> None:
    workspace = built(tmp_path, encoder=ENCODER)
    vectors = np.concatenate([np.load(path) for path in sorted(workspace.folder("embed").glob("vectors-*.npy"))])
    index = VectorIndex.open(workspace.folder("index") / INDEX)
    assert (index.rows, index.dim) == (250, 64)
    for size in (1, 3, 4, 64):
        scores, rows = index.search(vectors[:size], 5)
        np.testing.assert_allclose(scores, -np.sort(-(vectors[:size] @ vectors.T), axis=1)[:, :5], atol=1e-5)
        assert rows[:, 0].tolist() == list(range(size))
    assert index.search(vectors[:2], 1000)[1].shape == (2, 250)


def test_the_canary_is_found_by_the_carried_encoder(tmp_path: Path) -> None:
    workspace = built(tmp_path, encoder=ENCODER)
    canary = manifest.load(workspace.folder("index")).facts["canary"]
    index = VectorIndex.open(workspace.folder("index") / INDEX)
    _, rows = index.search(load_encoder(workspace.folder("embed")).encode_queries([canary["query"]]), canary["top_k"])
    assert canary["row"] in rows[0]


@pytest.mark.parametrize(("factory", "search"), [("IVF8,Flat", "nprobe=8"), ("HNSW16", ""), ("SQ8", "")])
def test_an_approximate_index_states_its_recall(tmp_path: Path, factory: str, search: str) -> None:
    workspace = built(tmp_path, encoder=ENCODER, index={"factory": factory, "search": search})
    facts = manifest.load(workspace.folder("index")).facts
    assert facts["exact"] is False
    assert 0.8 < facts["recall_at_10"] <= 1
    assert VectorIndex.open(workspace.folder("index") / INDEX).rows == 250


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"factory": "Nonsense"}, "index.factory='Nonsense'"),
        ({"factory": "IVF4096,Flat"}, "250 vectors of 64"),
        ({"search": "nprobe=4"}, "nprobe=4"),
    ],
)
def test_an_unfit_factory_is_named_and_leaves_nothing(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    workspace = store(tmp_path)
    embed.run(context("embed", tmp_path, encoder=ENCODER))
    with pytest.raises(ConfigError, match=says):
        build.run(context("index", tmp_path, encoder=ENCODER, index=config))
    assert not workspace.folder("index").exists()


def test_a_small_index_is_searched_by_one_thread_whichever_thread_asks(tmp_path: Path) -> None:
    """faiss keeps the number of threads per calling thread; helpers that wait for each other cost more than they do."""
    workspace = built(tmp_path, encoder=ENCODER)
    index = VectorIndex.open(workspace.folder("index") / INDEX)
    query = np.ones((8, 64), np.float32)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(faiss.omp_set_num_threads, 2).result()
        pool.submit(index.search, query, 1).result()
        assert pool.submit(faiss.omp_get_max_threads).result() == 1


def test_opening_sets_the_batch_size_from_which_a_search_is_a_matrix_product(tmp_path: Path) -> None:
    workspace = built(tmp_path, encoder=ENCODER)
    VectorIndex.open(workspace.folder("index") / INDEX)
    assert 64 < faiss.cvar.distance_compute_blas_threshold <= 8 * 64
    (tmp_path / "torn").write_bytes(b"IxFI" + b"\0" * 20)
    with pytest.raises(ManifestError, match="cannot be opened as a faiss index"):
        VectorIndex.open(tmp_path / "torn")
