"""A reranker reads the first candidates with the query and orders them; its time is bounded, its files belong to the index."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from research_rl.config import Config, RerankerConfig, RetrieverConfig
from research_rl.episode.trajectory import Passage
from research_rl.errors import ManifestError, ModelError
from research_rl.index import build, own_file
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import STAGES, Workspace, measured
from research_rl.reranking.order import Pair, Reranker
from research_rl.retriever import command
from research_rl.retriever.client import merged
from research_rl.retriever.retriever import Retriever
from tests import knowledge
from tests.encoder_model import texts, write_model, write_reranker
from tests.searching import served

FACTS = {"max_tokens": None, "batch_tokens": 256, "dtype": "float32"}
TREE: dict[str, Any] = {"encoder": {"dim": 64}}
QUERIES = [f"Person{n} Surname{n}" for n in (7, 31, 150)]


class Clock:
    """A clock that the scorer moves: every pair takes 10 ms."""

    def __init__(self) -> None:
        self.now = 0.0
        self.blocks: list[list[Pair]] = []

    def __call__(self) -> float:
        return self.now

    def scores(self, pairs: Sequence[Pair]) -> list[float]:
        self.blocks.append(list(pairs))
        self.now += 0.01 * len(pairs)
        return [float(text) for _, text in pairs]


def found(*values: int) -> list[Passage]:
    return [Passage(f"p{value}", str(value), 100 - place) for place, value in enumerate(values)]


def contents(ordered: Sequence[Sequence[Passage]]) -> list[list[str]]:
    return [[passage.contents for passage in passages] for passages in ordered]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_reranker(tmp_path_factory.mktemp("model") / "reranker")


def with_model(model: Path, **fields: Any) -> dict[str, Any]:
    return {**TREE, "reranker": {"kind": "cross-encoder", "model": str(model), "candidates": 20, "dtype": "float32", **fields}}


def test_candidates_are_ordered_by_score_and_the_others_follow_as_they_were() -> None:
    clock = Clock()
    ordered = Reranker(clock, 3, None, clock).order(["a", "b", "c"], [found(1, 3, 2, 9, 8), found(5), []])
    assert contents(ordered) == [["3", "2", "1", "9", "8"], ["5"], []]
    scores = [passage.score for passage in ordered[0]]
    assert scores == sorted(scores, reverse=True) and scores[2] > 0 and scores[3:] == [-1.0, -2.0]
    assert clock.blocks == [[("a", "1"), ("b", "5"), ("a", "3"), ("a", "2")]], "all in one go, place by place"


def test_equal_scores_keep_their_order_and_great_ones_are_no_error() -> None:
    clock = Clock()
    passages = [Passage("x", "1"), Passage("y", "1"), Passage("z", "-9999"), Passage("w", "9999")]
    ordered = Reranker(clock, 9, None, clock).order(["q"], [passages])[0]
    assert [passage.id for passage in ordered] == ["w", "x", "y", "z"]
    assert ordered[-1].score > 0


def test_a_budget_is_kept_shared_out_and_counted() -> None:
    """Two queries of 40 candidates at 10 ms each, and time for 30 of the 80."""
    clock, told = Clock(), list[tuple[int, int, float]]()
    reranker = Reranker(clock, 40, 300, clock)
    reranker.watch = lambda *what: told.append(what)
    ordered = reranker.order(["a", "b"], [found(*range(40)), found(*range(40))])
    (read, unread, seconds) = told[0]
    assert read + unread == 80 and 20 <= read <= 30 and seconds == pytest.approx(read / 100)
    for passages in ordered:
        mine = sum(passage.score > 0 for passage in passages)
        assert abs(mine - read / 2) < 1
        assert [int(passage.contents) for passage in passages] == [*reversed(range(mine)), *range(mine, 40)]


def test_a_budget_that_is_too_short_for_anything_still_reads_the_first_block() -> None:
    clock, told = Clock(), list[tuple[int, int, float]]()
    reranker = Reranker(clock, 40, 1, clock)
    reranker.watch = lambda *what: told.append(what)
    reranker.order(["a"], [found(*range(40))])
    assert told == [(8, 32, pytest.approx(0.08))]


def test_the_reply_of_fewer_passages_is_the_beginning_of_the_reply_of_more(tmp_path: Path, model: Path) -> None:
    """Searches that wait together are made as deep as the deepest of them."""
    # Of equally good passages at the last place faiss takes others when it is asked for more; the exact scan goes by row.
    retriever = Retriever.open(knowledge.built(tmp_path, **with_model(model), index={"factory": "Exact"}), RetrieverConfig())
    deep, shallow = retriever.search(QUERIES, 60), retriever.search(QUERIES, 5)
    assert contents(shallow) == [passages[:5] for passages in contents(deep)]
    assert [len(passages) for passages in deep] == [60] * 3


def test_it_scores_as_sentence_transformers_does(model: Path) -> None:
    from sentence_transformers import CrossEncoder

    from research_rl.reranking.cross_encoder import PairScorer

    pairs = [(query, text) for query in texts(4) for text in texts(30)]
    raw = CrossEncoder(str(model), device="cpu").predict(pairs, activation_fn=lambda scores: scores)
    for threads in (1, 3):
        with PairScorer.load(model, FACTS, threads=threads) as scorer:
            np.testing.assert_allclose(scorer.scores(pairs), raw, atol=1e-4)
            assert scorer.scores([]) == []
    with PairScorer.load(model, {**FACTS, "dtype": "bfloat16"}, threads=1) as scorer:
        assert np.corrcoef(scorer.scores(pairs), raw)[0, 1] > 0.99
    with PairScorer.load(model, {**FACTS, "max_tokens": 16}, threads=1) as scorer:
        assert not np.allclose(scorer.scores(pairs), raw, atol=1e-2), "a shorter limit cuts"


def test_the_index_carries_it_says_so_and_the_retriever_asks_it(tmp_path: Path, model: Path) -> None:
    from sentence_transformers import CrossEncoder

    plain = Retriever.open(knowledge.built(tmp_path / "plain", **TREE), RetrieverConfig()).search(QUERIES, 20)
    workspace = knowledge.built(tmp_path / "reranked", **with_model(model))
    index = manifest.load(workspace.folder("index"))
    assert {entry.path for entry in index.files} > {"reranker/config.json", "reranker/model.safetensors"}
    assert index.facts["reranker"]["candidates"] == 20 and index.facts["reranker"]["model"] == "reranker"
    assert measured(workspace, index)["rerank_ms"] > 0
    retriever = Retriever.open(workspace, RetrieverConfig())
    assert retriever.facts["reranker"] == index.facts["reranker"]
    found = retriever.search(QUERIES, 5)
    judge = CrossEncoder(str(model), device="cpu")
    for query, before, after in zip(QUERIES, plain, found, strict=True):
        scores = judge.predict([(query, passage.contents) for passage in before], activation_fn=lambda raw: raw)
        expected = [before[place].id for place in np.argsort(-scores, kind="stable")[:5]]
        assert [passage.id for passage in after] == expected
    assert [[p.id for p in passages[:5]] for passages in plain] != [[p.id for p in passages] for passages in found]


def test_parts_of_an_index_are_merged_by_the_rerankers_scores(tmp_path: Path, model: Path) -> None:
    tree = {**with_model(model, candidates=300), "index": {"shard_rows": 100}}
    workspace = knowledge.built(tmp_path, **tree)
    whole = Retriever.open(workspace, RetrieverConfig()).search(QUERIES, 5)
    parts = [Retriever.open(workspace, RetrieverConfig(), part=(number, 3)).search(QUERIES, 5) for number in range(3)]
    assert [[p.id for p in passages] for passages in merged(parts, 5)] == [[p.id for p in passages] for passages in whole]


def test_a_certificate_is_for_the_candidates(tmp_path: Path, model: Path) -> None:
    retriever = Retriever.open(knowledge.built(tmp_path, **with_model(model), index={"factory": "Exact"}), RetrieverConfig())
    found, sure = retriever.certified(QUERIES, 3, "proven", 250)
    assert found == retriever.search(QUERIES, 3) and all(item.certified for item in sure)


def test_a_served_index_is_reranked_for_all_who_wait_together_and_tells_it(tmp_path: Path, model: Path) -> None:
    workspace = knowledge.built(tmp_path, **with_model(model))
    expected = Retriever.open(workspace, RetrieverConfig()).search([f"Person{n}" for n in range(12)], 3)
    with command.running(Config(), workspace) as endpoint, httpx.Client(base_url=endpoint.url, trust_env=False, timeout=60) as client:
        before = metric(client, "retriever_reranked_passages_total")
        with ThreadPoolExecutor(12) as pool:
            replies = list(pool.map(lambda n: client.post("/search", json={"query": f"Person{n}", "top_n": 3}).json(), range(12)))
        assert [[hit["id"] for hit in reply] for reply in replies] == [[passage.id for passage in passages] for passages in expected]
        assert metric(client, "retriever_reranked_passages_total") == before + 12 * 20
        assert metric(client, "retriever_unranked_passages_total") == 0
        assert client.get("/info").json()["reranker"]["candidates"] == 20


def metric(client: httpx.Client, name: str) -> float:
    return next(float(line.split()[-1]) for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name} "))


def rebuilt(workspace: Workspace, tree: dict[str, Any]) -> set[tuple[str, int]]:
    """Build the index again; return the names and inodes of its files."""
    build.run(knowledge.context("index", workspace.root, **tree))
    folder = workspace.folder("index")
    return {(path.name, path.stat().st_ino) for path in folder.iterdir() if path.is_file() and path.name != manifest.MANIFEST}


def test_another_reranker_takes_the_standing_files_over_and_another_index_does_not(tmp_path: Path, model: Path) -> None:
    workspace = knowledge.built(tmp_path, **TREE)
    before = manifest.load(workspace.folder("index"))
    files = {(path.name, path.stat().st_ino) for path in workspace.folder("index").glob("*.faiss")}
    assert rebuilt(workspace, with_model(model)) == files
    after = manifest.load(workspace.folder("index"))
    assert after.hash != before.hash and after.counts == before.counts
    assert {**after.facts, "reranker": None} == {**before.facts, "reranker": None}
    assert rebuilt(workspace, TREE) == files
    assert manifest.load(workspace.folder("index")).hash == before.hash, "without it the index is the one that it was"
    assert rebuilt(workspace, {**with_model(model), "index": {"shard_rows": 100}}) != files


def test_files_that_were_altered_are_not_taken_over(tmp_path: Path, model: Path) -> None:
    workspace = knowledge.built(tmp_path, **TREE)
    path = next(workspace.folder("index").glob("*.faiss"))
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    rebuilt(workspace, with_model(model))
    assert next(workspace.folder("index").glob("*.faiss")).read_bytes() == good


def test_a_model_that_changed_in_its_folder_makes_the_index_stale(tmp_path: Path) -> None:
    own = write_reranker(tmp_path / "own")
    tree = with_model(own)
    workspace = knowledge.built(tmp_path, **tree)
    published = manifest.load(workspace.folder("index"))
    assert own_file.outside(Config.model_validate(tree), workspace, published) == []
    (own / "model.safetensors").write_bytes((write_reranker(tmp_path / "other", seed=1) / "model.safetensors").read_bytes())
    assert own_file.outside(Config.model_validate(tree), workspace, published) == ["reranker.model: model.safetensors changed"]
    assert rebuilt(workspace, tree)
    assert manifest.load(workspace.folder("index")).facts["reranker"]["model_sha256"] != published.facts["reranker"]["model_sha256"]


def test_an_altered_weight_is_refused(tmp_path: Path, model: Path) -> None:
    workspace = knowledge.built(tmp_path, **with_model(model))
    path = workspace.folder("index") / "reranker/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ManifestError, match=r"model.safetensors has sha256"):
        Retriever.open(workspace, RetrieverConfig())


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_model, r"scores no pairs; set reranker.model to a cross-encoder|is no usable cross-encoder"),
        (lambda folder: write_reranker(folder, labels=3), "gives 3 numbers a pair, a reranker gives one"),
        (lambda folder: folder, "reranker.model=.*is not a folder"),
    ],
)
def test_what_is_no_cross_encoder_is_refused_when_the_index_is_built(tmp_path: Path, write: Any, message: str) -> None:
    folder = write(tmp_path / "model")
    knowledge.built(tmp_path, **TREE)
    with pytest.raises(ModelError, match=message):
        build.run(knowledge.context("index", tmp_path, **with_model(folder)))
    assert "reranker" not in manifest.load(Workspace(tmp_path).folder("index")).facts


def test_weights_that_are_no_numbers_are_told(tmp_path: Path, model: Path) -> None:
    from safetensors.torch import load_file, save_file

    from research_rl.reranking.cross_encoder import PairScorer

    weights = load_file(model / "model.safetensors")
    weights["classifier.bias"] += float("nan")
    (tmp_path / "broken").mkdir()
    for path in model.iterdir():
        (tmp_path / "broken" / path.name).write_bytes(path.read_bytes())
    save_file(weights, tmp_path / "broken/model.safetensors", {"format": "pt"})
    with PairScorer.load(tmp_path / "broken", FACTS) as scorer, pytest.raises(ModelError, match="pair 0 of 2 scores nan"):
        scorer.scores([("a", "b"), ("c", "d")])


def test_it_decides_the_index_and_with_it_every_training_and_evaluation() -> None:
    assert "reranker" in STAGES["index"].sections
    assert all("index" in STAGES[name].parents for name in ("baseline", "train", "evaluate"))
    with pytest.raises(ValueError, match="candidates"):
        RerankerConfig(candidates=0)
    assert Config.model_validate({"reranker": {"kind": "cross-encoder"}}).needs == [
        "reranker.model is still needed; set it as reranker.model=..."
    ]


def test_the_service_keeps_no_reply_that_a_budget_may_have_cut_short() -> None:
    asked: list[list[str]] = []

    def search(queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        asked.append(list(queries))
        return [[Passage("p", query)] for query in queries]

    for budget, times in ((None, 1), (5.0, 2)):
        asked.clear()
        with served(search, facts={"reranker": {"budget_ms": budget}}) as url, httpx.Client(base_url=url, trust_env=False) as client:
            for _ in range(2):
                assert client.post("/search", json={"query": "a"}).json()[0]["id"] == "p"
        assert len(asked) == times
