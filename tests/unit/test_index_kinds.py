"""Words, vectors and both: what each kind finds, in one file or in several, whole or in parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pytest
import Stemmer

from research_rl.config import IndexConfig, RetrieverConfig
from research_rl.corpus.store import PassageStore
from research_rl.errors import ConfigError
from research_rl.index import budget
from research_rl.index.bm25 import STOP_WORDS, sampled
from research_rl.index.text import Hybrid, IndexSearcher, open_index
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace
from research_rl.retriever.retriever import Retriever
from tests.knowledge import built, passages

ENCODER = {"dim": 128, "shard_rows": 100}
QUERIES = ["Where does Person7 Surname7 live?", "Avonlea since 1005", "towns in Caldera", "zzz", "the of and"]


def opened(workspace: Workspace, part: tuple[int, int] = (0, 1)) -> IndexSearcher:
    index, embed = (manifest.load(workspace.folder(name)) for name in ("index", "embed"))
    return open_index(workspace.folder("index"), index, workspace.folder("embed"), embed, part=part)


def raw_bm25s(queries: list[str], k: int) -> tuple[np.ndarray, np.ndarray]:
    """bm25s as its documentation shows it."""
    stemmer = Stemmer.Stemmer("english")
    texts = [row["contents"] for row in passages(250)]
    retriever = bm25s.BM25()
    retriever.index(bm25s.tokenize(texts, stopwords=list(STOP_WORDS), stemmer=stemmer, show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(queries, stopwords=list(STOP_WORDS), stemmer=stemmer, show_progress=False)
    rows, scores = retriever.retrieve(tokens, k=k, show_progress=False)
    return rows, scores


@pytest.mark.parametrize("shard_rows", [250, 100])
def test_words_score_as_in_bm25s_and_need_no_encoder(tmp_path: Path, shard_rows: int) -> None:
    workspace = built(tmp_path, encoder={"kind": "none"}, index={"kind": "bm25", "shard_rows": shard_rows})
    scores, rows = opened(workspace).search(QUERIES, 5)
    expected_rows, expected = raw_bm25s(QUERIES, 5)
    np.testing.assert_allclose(np.where(rows >= 0, scores, 0), expected, rtol=1e-5)
    assert rows[0, 0] == expected_rows[0, 0] == 7
    assert (rows[3:] == -1).all(), "no word in common is no hit"
    alike = rows[2]
    assert alike.tolist() == [2, 7, 12, 17, 22], "equal scores come in row order"


def test_a_retriever_over_words_gives_passages_and_leaves_out_what_was_not_found(tmp_path: Path) -> None:
    workspace = built(tmp_path, encoder={"kind": "none"}, index={"kind": "bm25"})
    found = Retriever.open(workspace, RetrieverConfig()).search(QUERIES, 3)
    assert [len(row) for row in found] == [3, 3, 3, 0, 0]
    assert found[0][0].contents == passages(8)[7]["contents"]


def test_an_index_cut_into_files_answers_like_one(tmp_path: Path) -> None:
    queries = [f"Person{n} Surname{n}" for n in (7, 107, 207)]
    for factory, search in (("Flat", ""), ("Exact", ""), ("IVF4,Flat", "nprobe=2"), ("SQ8", "")):
        answers: list[tuple[Any, Any]] = []
        for shard_rows in (250, 100):
            index = {"factory": factory, "search": search, "shard_rows": shard_rows}
            workspace = built(tmp_path / f"{factory}-{shard_rows}", encoder={"dim": 512}, index=index)
            answers.append(opened(workspace).search(queries, 7))
        np.testing.assert_allclose(answers[0][0], answers[1][0], atol=1e-6)
        assert answers[0][1][:, 0].tolist() == answers[1][1][:, 0].tolist() == [7, 107, 207]


@pytest.mark.parametrize("index", [{"kind": "dense"}, {"kind": "dense", "factory": "Exact"}, {"kind": "bm25"}])
def test_parts_merge_to_the_whole(tmp_path: Path, index: dict[str, Any]) -> None:
    workspace = built(tmp_path, encoder=ENCODER, index={**index, "shard_rows": 100})
    whole, _ = opened(workspace).search(QUERIES, 9)
    parts = [opened(workspace, (number, 3)) for number in range(3)]
    assert [part.rows for part in parts] == [100, 100, 50]
    merged = -np.sort(-np.concatenate([part.search(QUERIES, 9)[0] for part in parts], axis=1), axis=1)[:, :9]
    np.testing.assert_allclose(merged, whole, atol=1e-6)
    rows = np.concatenate([part.search(QUERIES[:1], 9)[1] for part in parts], axis=1)
    assert 7 in rows and {int(row) // 100 for row in rows[0] if row >= 0} >= {0}
    with pytest.raises(ConfigError, match=r"has 3 files and cannot be cut into 4 parts; lower index.shard_rows"):
        opened(workspace, (0, 4))


def test_a_hybrid_joins_both_rankings_by_rank(tmp_path: Path) -> None:
    workspace = built(tmp_path, encoder=ENCODER, index={"kind": "hybrid", "depth": 20, "shard_rows": 100})
    scores, rows = opened(workspace).search(QUERIES, 10)
    assert rows[0, 0] == 7
    assert scores[0, 0] == pytest.approx(2 / 61), "first in both rankings"
    assert Retriever.open(workspace, RetrieverConfig()).search(QUERIES[:1], 1)[0][0].id == "p7"


def test_rank_fusion_is_the_sum_of_reciprocal_ranks() -> None:
    class Fixed:
        rows = 6

        def __init__(self, ranking: list[int]) -> None:
            self.ranking = ranking

        def search(self, queries: Any, top_k: int) -> tuple[Any, Any]:
            return np.ones((1, top_k), np.float32), np.array([(self.ranking + [-1] * 6)[:top_k]])

    scores, rows = Hybrid([Fixed([3, 1, 2]), Fixed([2, 3])], depth=5, offset=60).search(["q"], 4)
    assert rows.tolist() == [[3, 2, 1, -1]]
    np.testing.assert_allclose(scores[0, :3], [1 / 61 + 1 / 62, 1 / 63 + 1 / 61, 1 / 62], rtol=1e-6)


def test_a_dense_index_without_vectors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"index.kind=hybrid needs a vector a passage, the embeddings hold 0 for 250"):
        built(tmp_path, encoder={"kind": "none"}, index={"kind": "hybrid"})


def test_a_word_index_that_finds_nothing_speaks_of_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no factory and no encoder: naming them sends the user to parameters that change nothing."""
    monkeypatch.setattr("tests.knowledge.passages", lambda rows: [{"id": f"p{n}", "contents": "who is the of it"} for n in range(rows)])
    with pytest.raises(ConfigError) as caught:
        built(tmp_path, 20, encoder={"kind": "none"}, index={"kind": "bm25"})
    assert str(caught.value).startswith("index.kind=bm25 finds none of 8 passages by their own text")
    assert "stop words" in str(caught.value)
    assert "factory" not in str(caught.value)
    assert "encoder" not in str(caught.value)


def test_a_hybrid_gives_no_rank_to_a_passage_that_has_nothing_in_common_with_the_query(tmp_path: Path) -> None:
    """A query without a word has a vector of zeros: all passages score 0 and came in row order, each with a rank's worth of score."""
    workspace = built(tmp_path, encoder=ENCODER, index={"kind": "hybrid", "depth": 20})
    scores, rows = opened(workspace).search(["\u200b\u2060", "Person7 Surname7"], 3)
    assert rows[0].tolist() == [-1, -1, -1]
    assert np.isneginf(scores[0]).all()
    assert rows[1, 0] == 7


def chinese(rows: int) -> list[dict[str, str]]:
    """Passages of 200 characters, drawn as often as characters occur in a text."""
    draw = np.random.default_rng(1)
    ranks = np.minimum(draw.zipf(1.2, (rows, 200)), 3000)
    return [{"id": f"p{n}", "contents": "".join(chr(0x4E00 + int(rank)) for rank in row)} for n, row in enumerate(ranks)]


@pytest.mark.parametrize("script", ["english", "chinese"])
def test_the_plan_of_a_word_index_is_right_within_a_quarter_in_any_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    """A Chinese character is a term, and a pair with the next: counted as English words, an index was planned far too small."""
    if script == "chinese":
        monkeypatch.setattr("tests.knowledge.passages", chinese)
    workspace = built(tmp_path, 3000, encoder={"kind": "none"}, index={"kind": "bm25", "shard_rows": 1000})
    terms = sampled(PassageStore(workspace.folder("corpus")))
    size = sum(path.stat().st_size for path in workspace.folder("index").glob("bm25-*"))
    config = IndexConfig(kind="bm25", shard_rows=1000)
    assert size / 1.25 < budget.disk(config, 0, 3000, terms) < size * 1.25
    vocabulary = len(json.loads((workspace.folder("index") / "bm25-vocabulary.json").read_text()))
    assert vocabulary / 1.25 < terms.vocabulary(3000) < vocabulary * 1.25
    if script == "chinese":
        assert budget.shard_rows(IndexConfig(kind="bm25", shard_rows=10**7), 0, 10**6, terms) * 4 < budget.shard_rows(
            IndexConfig(kind="bm25", shard_rows=10**7), 0, 10**6
        )


def test_a_corpus_without_terms_is_planned_as_english() -> None:
    class Empty:
        def __len__(self) -> int:
            return 0

        def texts(self, start: int, stop: int) -> list[str]:
            raise AssertionError((start, stop))

        def batches(self, size: int) -> Any:
            return iter(())

    assert sampled(Empty()) == budget.ENGLISH
