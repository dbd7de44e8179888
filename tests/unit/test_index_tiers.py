"""Codes in memory, vectors on disk: what is compared is exact, what is certified is right, what is read is what was asked for."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from research_rl.config import IndexConfig
from research_rl.errors import ConfigError, DataError, ManifestError
from research_rl.index import bounds, dense, gather, rescore
from research_rl.index.gather import Gather
from research_rl.index.search import VectorIndex
from research_rl.index.tiers import TwoTier
from research_rl.index.vectors import VectorFiles


def unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)


def files(folder: Path, vectors: np.ndarray, *cuts: int) -> VectorFiles:
    for number, part in enumerate(np.split(vectors, cuts)):
        np.save(folder / f"vectors-{number:05d}.npy", part)
    return VectorFiles(sorted(folder.glob("vectors-*.npy")), vectors.shape[1])


def tiers(folder: Path, vectors: np.ndarray, *cuts: int, threads: int = 1, **index: Any) -> TwoTier:
    """The index over files of codes cut at `cuts`, over vector files cut elsewhere."""
    config = IndexConfig.model_validate({"factory": f"RR{vectors.shape[1]},RaBitQfs", "refine": True, **index})
    held = files(folder, vectors, len(vectors) // 3)
    edges = [0, *cuts, len(vectors)]
    ranges = list(pairwise(edges))
    empty = dense.learn(config, held)
    records = [dense.write(config, empty, held, number, *span, folder) for number, span in enumerate(ranges)]
    facts = {"factory": config.factory, "candidates": config.candidates, "bounds": records}
    opened = dense.open_vectors(folder, facts, held, ranges, threads, numbers=range(len(ranges)))
    assert isinstance(opened, TwoTier)
    return opened


class Exhaustive:
    """Every row scored in float32 and ordered, which is what the exact scan's replies are (`test_index_exact.py`)."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors

    def search(self, queries: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
        scores, rows = np.full((len(queries), top_k), -np.inf, np.float32), np.full((len(queries), top_k), -1)
        for query, mine, found in zip(queries, scores, rows, strict=True):
            rescore.merge(query, self.vectors, np.arange(len(self.vectors)), mine, found)
        return scores, rows


def sets(dim: int, seed: int) -> dict[str, np.ndarray]:
    """Vectors that are hard for codes: repeated, nearly equal, zero, far from their mean, all on one axis."""
    draw = np.random.default_rng(seed)
    plain = draw.standard_normal((600, dim))
    repeated = plain[draw.integers(0, 40, 600)]
    near = plain[:1] + 0.001 * plain
    zero = plain * (draw.random((600, 1)) < 0.5)
    cone = 5 * np.ones(dim) + plain
    axis = np.eye(dim)[draw.integers(0, dim, 600)] * draw.choice([-1, 1], (600, 1)) + 1e-4 * plain
    clusters = 3 * plain[draw.integers(0, 30, 600)] + draw.standard_normal((600, dim))
    made = {"plain": plain, "repeated": repeated, "near": near, "zero": zero, "cone": cone, "axis": axis, "clusters": clusters}
    return {name: unit(vectors) for name, vectors in made.items()} | {"long": (100 * plain).astype(np.float32)}


@pytest.mark.parametrize("factory", ["RR{dim},RaBitQfs", "SQ8", "RaBitQfs", "PQ{half}x4", "RR{dim},IVF8,RaBitQ"])
def test_with_as_many_candidates_as_rows_every_reply_is_the_exact_one(tmp_path: Path, factory: str) -> None:
    search = "nprobe=8" if "IVF" in factory else ""
    index = {"factory": factory.format(dim=40, half=20), "candidates": 600, "search": search}
    for name, vectors in sets(40, 1).items():
        (folder := tmp_path / name).mkdir()
        ours, scan = tiers(folder, vectors, 250, **index), Exhaustive(vectors)
        queries = np.concatenate([vectors[:9], unit(np.random.default_rng(2).standard_normal((8, 40))), np.zeros((1, 40), np.float32)])
        for top_k in (1, 5, 64):
            for mine, truth in zip(ours.search(queries, top_k), scan.search(queries, top_k), strict=True):
                np.testing.assert_array_equal(mine, truth, name)


@pytest.mark.parametrize("dim", [16, 31, 128])
@pytest.mark.parametrize("factory", ["RR{dim},RaBitQfs", "SQ8", "RaBitQfs"])
def test_no_certified_reply_differs_from_the_exact_one(tmp_path: Path, dim: int, factory: str) -> None:
    draw, certified = np.random.default_rng(dim), 0
    for name, vectors in sets(dim, dim).items():
        (folder := tmp_path / name).mkdir()
        ours, scan = tiers(folder, vectors, 400, factory=factory.format(dim=dim), candidates=20), Exhaustive(vectors)
        near = vectors[draw.integers(0, 600, 30)] + 0.1 * draw.standard_normal((30, dim))
        queries = np.concatenate([unit(near), unit(draw.standard_normal((10, dim))), np.zeros((1, dim), np.float32)])
        for kind in bounds.KINDS:
            for top_k, budget_ in ((1, 20), (5, 300)):
                scores, rows, sure = ours.certified(queries, top_k, kind, budget_)
                truth_scores, truth_rows = scan.search(queries, top_k)
                for query, certificate in enumerate(sure):
                    assert certificate.candidates <= max(20, budget_)
                    assert certificate.open == (0 if certificate.certified else 600 - certificate.candidates)
                    if certificate.certified:  # not only where all rows were compared, see below
                        np.testing.assert_array_equal(rows[query], truth_rows[query])
                        np.testing.assert_array_equal(scores[query], truth_scores[query])
                        certified += certificate.candidates < 600
    assert certified or factory != "SQ8", "a bound that never holds would pass as well"


@pytest.mark.parametrize("dim", [16, 31, 128])
@pytest.mark.parametrize("factory", ["RR{dim},RaBitQfs", "SQ8", "RaBitQfs"])
def test_a_codes_score_is_never_further_from_the_truth_than_its_bound(tmp_path: Path, dim: int, factory: str) -> None:
    draw = np.random.default_rng(dim)
    for name, vectors in sets(dim, dim).items():
        (folder := tmp_path / name).mkdir()
        ours = tiers(folder, vectors, factory=factory.format(dim=dim))
        queries = np.concatenate([vectors[:20], unit(draw.standard_normal((20, dim))), 30 * vectors[30:33]])
        coded, rows = ours._codes.search(queries, 600)
        truth = np.einsum("qkd,qd->qk", vectors[rows].astype(np.float64), queries.astype(np.float64))
        bound = ours._bound_of()
        assert bound is not None
        for kind in bound.kinds:
            assert (truth - coded <= bound.margin(queries, kind)[:, None]).all(), (name, kind)


@pytest.mark.parametrize(
    "factory", ["RR{dim},RaBitQfs", "RaBitQfs", "RR{dim},RaBitQfs4", "SQ8", "RR{dim},SQ8", "PQ{half}x4", "RR{dim},IVF8,RaBitQ"]
)
def test_rows_are_read_once_for_their_codes_and_for_what_bounds_their_errors(tmp_path: Path, factory: str) -> None:
    for name, vectors in sets(32, 7).items():
        (folder := tmp_path / name).mkdir()
        config, held = IndexConfig(factory=factory.format(dim=32, half=16), refine=True), files(folder, vectors, 200)
        empty = dense.learn(config, held)
        read = Counted(held)
        record = dense.write(config, empty, read, 0, 0, 600, folder)
        assert read.rows == 600
        plain = faiss.deserialize_index(faiss.serialize_index(empty))
        for _, batch in held.batches(0, 600, dense._ADD):
            plain.add(batch)
        assert (folder / "index-00000.faiss").read_bytes() == faiss.serialize_index(plain).tobytes()
        # What the codes themselves say that they stand for.
        rotation, codes = bounds._parts(plain)
        if codes is None:
            assert record == {}
            continue
        moved = bounds._applied(rotation, vectors)
        decoded = codes.sa_decode(codes.sa_encode(moved))
        centre = faiss.vector_to_array(codes.center) if "RaBitQ" in factory else 0
        lengths = [np.linalg.norm(part, axis=1).max() for part in (decoded - moved, decoded - centre, vectors)]
        np.testing.assert_allclose(list(record.values()), lengths, rtol=3e-4, atol=1e-6, err_msg=name)
        assert all(known >= length - 1e-6 for known, length in zip(record.values(), lengths, strict=True))


class Counted(VectorFiles):
    """Vector files that count the rows that are read."""

    rows = 0

    def __init__(self, held: VectorFiles) -> None:
        super().__init__(held.paths, held.dim)

    def batches(self, start: int, stop: int, size: int) -> Iterator[tuple[int, np.ndarray]]:
        for row, batch in super().batches(start, stop, size):
            self.rows += len(batch)
            yield row, batch


def test_a_query_alone_is_searched_in_all_files_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = sets(32, 8)["plain"]
    wanted = tiers(tmp_path, vectors, 200, 400, candidates=50).search(vectors[:1], 5)
    monkeypatch.setattr("research_rl.index.search._MANY", 1)
    monkeypatch.setattr("research_rl.index.dense.threads_for", lambda size: 3)
    ours = tiers(tmp_path, vectors, 200, 400, candidates=50, threads=0)
    together, seen = threading.Barrier(3, timeout=60), set[int]()

    def meet(index: VectorIndex, queries: np.ndarray, top_k: int, search: Any = VectorIndex.search) -> Any:
        if len(queries) == 1:
            together.wait()
        seen.add(threading.get_ident())
        return search(index, queries, top_k)

    monkeypatch.setattr(VectorIndex, "search", meet)
    for mine, truth in zip(ours.search(vectors[:1], 5), wanted, strict=True):
        np.testing.assert_array_equal(mine, truth)
    assert len(seen) == 3 and threading.get_ident() not in seen
    seen.clear()
    ours.search(vectors[:2], 5)
    assert seen == {threading.get_ident()}, "faiss has threads for several queries"


@pytest.mark.parametrize(("factory", "search"), [("PQ4x4", ""), ("IVF4,PQ4x4", "nprobe=4"), ("PCA16,PQ4x4", "")])
def test_a_product_quantizer_learns_once_and_replies_as_if_it_had_learnt_twice(tmp_path: Path, factory: str, search: str) -> None:
    vectors = sets(32, 3)["clusters"]
    ours, twice = dense.learn(IndexConfig(factory=factory, search=search), files(tmp_path, vectors)), faiss.index_factory(32, factory, 0)
    twice.train(vectors)
    for index in (ours, twice):
        faiss.ParameterSpace().set_index_parameters(index, search or "verbose=0")
        index.add(vectors)
    for mine, theirs in zip(ours.search(vectors[:50], 5), twice.search(vectors[:50], 5), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    innermost = faiss.downcast_index(getattr(ours, "index", ours))
    assert not innermost.do_polysemous_training
    bits = dense.learn(IndexConfig(factory=factory, search="ht=8"), files(tmp_path, vectors))
    assert faiss.downcast_index(getattr(bits, "index", bits)).do_polysemous_training, "a search by the codes' bits needs it"


def test_a_certificate_needs_a_known_bound(tmp_path: Path) -> None:
    vectors = sets(32, 3)["clusters"]
    for number, (factory, search) in enumerate([("RR32,IVF8,RaBitQ", ""), ("PQ16x4fs", ""), ("PCA16,SQ8", "")]):
        (folder := tmp_path / str(number)).mkdir()
        ours = tiers(folder, vectors, factory=factory, search=search, candidates=50)
        _, _, sure = ours.certified(vectors[:5], 3, "proven", 200)
        assert [(item.certified, item.candidates <= 200) for item in sure] == [(False, True)] * 5
    ours = tiers(tmp_path, vectors, factory="RR32,RaBitQfs", candidates=50)
    assert all(item.certified and item.open == 0 for item in ours.certified(vectors[:5], 3, "proven", 600)[2]), "all rows were compared"
    assert bounds.Bound.of(None, [{}], 5) is None


def test_candidates_of_a_batch_are_held_within_the_memory_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = sets(32, 4)["clusters"]
    ours = tiers(tmp_path, vectors, 500, candidates=100)
    whole = ours.search(vectors[:40], 5)
    monkeypatch.setattr("research_rl.index.tiers._HELD_BYTES", 100 * 32 * 4 * 3)
    for mine, truth in zip(ours.search(vectors[:40], 5), whole, strict=True):
        np.testing.assert_array_equal(mine, truth)
    with pytest.raises(DataError, match="holds NaN"):
        ours.search(np.full((1, 32), np.nan, np.float32), 5)


@pytest.mark.parametrize("peeks", [True, False])
def test_rows_are_read_from_any_files_in_any_runs(tmp_path: Path, peeks: bool) -> None:
    vectors = np.random.default_rng(5).standard_normal((997, 24)).astype(np.float32)
    reader = Gather(files(tmp_path, vectors, 1, 300, 301, 640))
    reader._peeks = peeks
    draw = np.random.default_rng(6)
    some = (draw.choice(997, size, replace=False) for size in (3, 99, 500))
    for rows in ([], [0], [996], range(997), [0, 1, 299, 300, 301, 302, 639, 640], *some):
        wanted = np.sort(np.array(rows, np.int64))
        np.testing.assert_array_equal(reader.take(wanted), vectors[wanted])


def test_a_vector_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = files(tmp_path, np.ones((100, 16), np.float32), 50)
    reader = Gather(held)
    os.truncate(tmp_path / "vectors-00001.npy", 128 + 16 * 4 * 10)
    np.testing.assert_array_equal(reader.take(np.arange(60)), 1)
    with pytest.raises(ManifestError, match=r"vectors-00001.npy ends before byte .*; remove .* and run embed again"):
        reader.take(np.arange(40, 80))
    np.save(tmp_path / "vectors-00000.npy", np.ones((50, 16), np.float64))
    with pytest.raises(ManifestError, match=r"holds float64 of shape \(50, 16\), rows of 16 float32 are needed"):
        Gather(held)
    monkeypatch.setattr(gather, "file_limit", lambda: 1)
    with pytest.raises(ConfigError, match=r"2 vector files, this process may hold 1 open; raise `ulimit -n`, or raise encoder.shard_rows"):
        Gather(held)
