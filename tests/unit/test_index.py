"""The index finds what it holds, says how well, and refuses a factory that does not fit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from research_rl import config
from research_rl.config import IndexConfig, RetrieverConfig
from research_rl.embedding import build as embed
from research_rl.embedding import load_encoder
from research_rl.errors import ConfigError, ManifestError
from research_rl.index import budget, build
from research_rl.index.search import VectorIndex, file_name
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace, measured
from research_rl.retriever.retriever import Retriever
from tests.knowledge import built, context, store

ENCODER = {"dim": 64, "shard_rows": 100}


def test_flat_search_is_exact_at_every_batch_size(tmp_path: Path) -> None:
    workspace = built(tmp_path, encoder=ENCODER)
    vectors = np.concatenate([np.load(path) for path in sorted(workspace.folder("embed").glob("vectors-*.npy"))])
    index = VectorIndex.open(workspace.folder("index") / file_name(0))
    assert (index.rows, index.dim) == (250, 64)
    for size in (1, 3, 4, 64):
        scores, rows = index.search(vectors[:size], 5)
        np.testing.assert_allclose(scores, -np.sort(-(vectors[:size] @ vectors.T), axis=1)[:, :5], atol=1e-5)
        assert rows[:, 0].tolist() == list(range(size))
    assert index.search(vectors[:2], 1000)[1].shape == (2, 250)


def test_the_canary_is_found_by_the_carried_encoder(tmp_path: Path) -> None:
    workspace = built(tmp_path, encoder=ENCODER)
    canary = manifest.load(workspace.folder("index")).facts["canary"]
    index = VectorIndex.open(workspace.folder("index") / file_name(0))
    _, rows = index.search(load_encoder(workspace.folder("embed")).encode_queries([canary["query"]]), canary["top_k"])
    assert canary["row"] in rows[0]


@pytest.mark.parametrize(("factory", "search"), [("IVF8,Flat", "nprobe=8"), ("HNSW16", ""), ("SQ8", "")])
def test_an_approximate_index_states_its_recall(tmp_path: Path, factory: str, search: str) -> None:
    workspace = built(tmp_path, encoder=ENCODER, index={"factory": factory, "search": search})
    facts = manifest.load(workspace.folder("index")).facts
    assert facts["exact"] is False
    assert all(0.7 < facts["recall"][k] <= 1 for k in ("1", "5", "10", "20"))
    latency = measured(workspace, manifest.load(workspace.folder("index")))["latency"]
    assert all(0 < latency[size]["p50_ms"] <= latency[size]["p99_ms"] for size in ("1", "32"))
    assert VectorIndex.open(workspace.folder("index") / file_name(0)).rows == 250


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"factory": "Nonsense"}, "index.factory='Nonsense'"),
        ({"factory": "IVF4096,Flat"}, "250 vectors of 64"),
        ({"search": "nprobe=4"}, "nprobe=4"),
        ({"memory_gib": 0.1}, r"index.memory_gib=0.1 is too little: .* raise it"),
        ({"factory": "IVF4,Flat", "device": "gpu"}, "index.device=gpu, but this faiss"),
        ({"prebuilt": "/nowhere/at.all"}, "index.prebuilt=/nowhere/at.all is no file"),
    ],
)
def test_an_unfit_factory_is_named_and_leaves_nothing(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    workspace = store(tmp_path)
    embed.run(context("embed", tmp_path, encoder=ENCODER))
    with pytest.raises(ConfigError, match=says):
        build.run(context("index", tmp_path, encoder=ENCODER, index=config))
    assert not workspace.folder("index").exists()


def test_an_index_is_built_only_when_its_canary_is_found_as_the_service_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over repeated passages the centroids of an inverted file are equal, and which one faiss enters depends on the size of the batch:
    an index whose canaries were found eight at a time did not open when the service asked for one."""
    repeated = [{"id": f"p{n}", "contents": "The very same passage about Avonlea."} for n in range(50)]
    monkeypatch.setattr("tests.knowledge.passages", lambda rows: repeated[:rows])
    with pytest.raises(ConfigError, match=r"index.factory='IVF4,Flat' finds none of 8 passages .* look for repeated passages"):
        built(tmp_path, 50, encoder=ENCODER, index={"factory": "IVF4,Flat"})


def test_a_small_index_is_searched_by_one_thread_whichever_thread_asks(tmp_path: Path) -> None:
    """faiss keeps the number of threads per calling thread; helpers that wait for each other cost more than they do."""
    workspace = built(tmp_path, encoder=ENCODER)
    index = VectorIndex.open(workspace.folder("index") / file_name(0))
    query = np.ones((8, 64), np.float32)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(faiss.omp_set_num_threads, 2).result()
        pool.submit(index.search, query, 1).result()
        assert pool.submit(faiss.omp_get_max_threads).result() == 1


def test_opening_sets_the_batch_size_from_which_a_search_is_a_matrix_product(tmp_path: Path) -> None:
    workspace = built(tmp_path, encoder=ENCODER)
    VectorIndex.open(workspace.folder("index") / file_name(0))
    assert 64 < faiss.cvar.distance_compute_blas_threshold <= 8 * 64
    (tmp_path / "torn").write_bytes(b"IxFI" + b"\0" * 20)
    with pytest.raises(ManifestError, match="cannot be opened as a faiss index"):
        VectorIndex.open(tmp_path / "torn")


@pytest.mark.parametrize("index", [{"factory": "IVF4,Flat"}, {"factory": "Exact"}, {"kind": "bm25"}])
def test_a_killed_build_repeats_at_most_one_file(tmp_path: Path, index: dict[str, Any]) -> None:
    config = {"index": {**index, "shard_rows": 100}}
    store(tmp_path)
    embed.run(context("embed", tmp_path, encoder=ENCODER))

    def killed(text: str, share: float) -> None:
        if text.startswith("200 of"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build.run(context("index", tmp_path, killed, **config))
    work = next(tmp_path.glob("artifacts/.work/index-*"))
    finished = {path: path.stat().st_mtime_ns for path in work.glob("*.json")}
    assert len([path for path in finished if path.stem[-1].isdigit()]) == 2

    def look(text: str, share: float) -> None:
        for path, when in finished.items():
            assert path.stat().st_mtime_ns == when, f"{path} was built again"

    build.run(context("index", tmp_path, look, **config))
    assert manifest.load(tmp_path / "artifacts/index").counts["shards"] == 3
    assert not work.exists()


def test_a_torn_unit_of_a_killed_build_is_built_again(tmp_path: Path) -> None:
    store(tmp_path)
    embed.run(context("embed", tmp_path, encoder=ENCODER))
    expected = built(tmp_path / "whole", encoder=ENCODER)

    def killed(text: str, share: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build.run(context("index", tmp_path, killed))
    path = next(tmp_path.glob("artifacts/.work/index-*/dense-00000/*"))
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    build.run(context("index", tmp_path))
    assert (tmp_path / "artifacts/index" / file_name(0)).read_bytes() == (expected.folder("index") / file_name(0)).read_bytes()


def test_an_existing_index_file_is_used_as_it_is_once_it_fits(tmp_path: Path) -> None:
    workspace = built(tmp_path / "made", encoder=ENCODER)
    path = workspace.folder("index") / file_name(0)
    taken = built(tmp_path / "taken", encoder={**ENCODER, "vectors": False}, index={"prebuilt": str(path)})
    assert (taken.folder("index") / file_name(0)).read_bytes() == path.read_bytes()
    answers = [Retriever.open(each, RetrieverConfig()).search(["Person7 Surname7"], 3) for each in (workspace, taken)]
    assert answers[0] == answers[1]
    with pytest.raises(ConfigError, match=r"holds 250 vectors, the corpus 100 passages"):
        built(tmp_path / "short", 100, encoder={**ENCODER, "vectors": False}, index={"prebuilt": str(path)})
    with pytest.raises(ConfigError, match=r"vectors of 64, the encoder makes 32"):
        built(tmp_path / "narrow", encoder={"dim": 32, "vectors": False}, index={"prebuilt": str(path)})


def vectors_of(root: Path) -> Any:
    """The vectors of 250 passages, and their faiss file's folder."""
    workspace = built(root, encoder=ENCODER)
    return np.concatenate([np.load(path) for path in sorted(workspace.folder("embed").glob("vectors-*.npy"))])


def written(path: Path, index: Any, vectors: Any, ids: Any = None) -> str:
    if ids is None:
        index.add(vectors)
    else:
        index.add_with_ids(vectors, ids)
    faiss.write_index(index, str(path))
    return str(path)


@pytest.mark.parametrize("kind", ["dense", "hybrid"])
def test_an_existing_index_of_distances_gives_scores_that_fall_with_the_distance(tmp_path: Path, kind: str) -> None:
    """As it stands such an index gives its best hit the smallest number, and whoever merges or sorts by score turns it upside down."""
    vectors = vectors_of(tmp_path / "made")
    path = written(tmp_path / "l2.index", faiss.IndexFlatL2(64), vectors)
    by_product = Retriever.open(Workspace(tmp_path / "made"), RetrieverConfig()).search(["Person7 Surname7"], 3)[0]
    taken = built(tmp_path / kind, encoder={**ENCODER, "vectors": False}, index={"prebuilt": path, "kind": kind})
    by_distance = Retriever.open(taken, RetrieverConfig()).search(["Person7 Surname7"], 3)[0]
    assert by_distance[0].id == by_product[0].id == "p7"
    assert by_distance[0].score >= by_distance[1].score >= by_distance[2].score
    if kind == "dense":
        assert [hit.score for hit in by_distance] == pytest.approx([hit.score for hit in by_product], abs=1e-5)


def test_an_existing_index_that_cannot_rank_the_corpus_is_refused_by_name(tmp_path: Path) -> None:
    """Ids of its own would give other passages than those found; another metric another order."""
    vectors = vectors_of(tmp_path / "made")
    own = np.arange(1000, 1250)
    quantizer = faiss.IndexFlatIP(64)
    inverted = faiss.IndexIVFFlat(quantizer, 64, 4, faiss.METRIC_INNER_PRODUCT)
    inverted.train(vectors)
    cases = {
        "metric": (written(tmp_path / "l1.index", faiss.IndexFlat(64, faiss.METRIC_L1), vectors), "compares by faiss metric 2"),
        "map": (written(tmp_path / "map.index", faiss.IndexIDMap(faiss.IndexFlatIP(64)), vectors, own), "ids of its own, such as 1,000"),
        "lists": (written(tmp_path / "ivf.index", inverted, vectors, own), "numbers its vectors by ids of its own"),
        "twice": (written(tmp_path / "twice.index", faiss.IndexIDMap(faiss.IndexFlatIP(64)), vectors, own * 0), "such as 0"),
    }
    for name, (path, says) in cases.items():
        with pytest.raises(ConfigError, match=says):
            built(tmp_path / name, encoder={**ENCODER, "vectors": False}, index={"prebuilt": path})
    in_order = written(tmp_path / "order.index", faiss.IndexIDMap(faiss.IndexFlatIP(64)), vectors, np.arange(250))
    built(tmp_path / "order", encoder={**ENCODER, "vectors": False}, index={"prebuilt": in_order})


def test_a_folder_of_bm25s_is_named_and_refused(tmp_path: Path) -> None:
    import bm25s

    words = bm25s.BM25()
    words.index(bm25s.tokenize(["one text", "another text"], show_progress=False), show_progress=False)
    words.save(tmp_path / "bm25s")
    with pytest.raises(ConfigError, match=r"a folder that bm25s saved, .* index.kind=bm25 without index.prebuilt builds a word index"):
        built(tmp_path / "ws", encoder={**ENCODER, "vectors": False}, index={"prebuilt": str(tmp_path / "bm25s")})
    with pytest.raises(ConfigError, match=r"names a file of vectors, but kind=bm25 searches words; remove index.prebuilt"):
        config.load_profile("laptop", ["index.kind=bm25", f"index.prebuilt={tmp_path / 'bm25s'}"])


def test_an_edit_of_the_users_file_does_not_alter_the_index_made_from_it(tmp_path: Path) -> None:
    path = Path(written(tmp_path / "own.index", faiss.IndexFlatIP(64), vectors_of(tmp_path / "made")))
    taken = built(tmp_path / "ws", encoder={**ENCODER, "vectors": False}, index={"prebuilt": str(path)})
    with path.open("r+b") as stream:
        stream.write(b"edited in place")
    manifest.load(taken.folder("index"))


def test_an_existing_index_of_another_corpus_is_refused_by_the_canary(tmp_path: Path) -> None:
    path = tmp_path / "other.index"
    other = faiss.IndexFlatIP(64)
    other.add(np.random.default_rng(0).standard_normal((250, 64)).astype(np.float32))
    faiss.write_index(other, str(path))
    with pytest.raises(ConfigError, match=rf"index.prebuilt={path} finds none of 8 passages .* from this very corpus"):
        built(tmp_path / "ws", encoder={**ENCODER, "vectors": False}, index={"prebuilt": str(path)})


def test_the_memory_budget_decides_how_many_rows_a_file_covers() -> None:
    config = IndexConfig(factory="Flat", memory_gib=0.5, shard_rows=1_000_000)
    rows = budget.shard_rows(config, 768, 10_000_000)
    assert budget.peak(config, 768, 10_000_000) <= 0.5 * 1024**3 < budget.peak(IndexConfig(), 768, 10_000_000)
    assert 50_000 < rows < 150_000
