"""A request may ask how sure its reply is; who does not ask gets the reply as it always was."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from research_rl.config import RetrieverConfig
from research_rl.episode.trajectory import Passage
from research_rl.index.tiers import Certificate
from research_rl.retriever.retriever import Retriever
from tests import knowledge
from tests.searching import served

QUERIES = ["Person7 Surname7", "Person150 Surname150"]


class Sure:
    """Searches that say whether they were asked to be sure."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def __call__(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        return [[Passage(f"plain-{n}", query, 1.0) for n in range(top_k)] for query in queries]

    def certified(self, queries: Sequence[str], top_k: int, kind: str, budget: int) -> tuple[list[list[Passage]], list[Certificate]]:
        self.asked.append((list(queries), top_k, kind, budget))
        found = [[Passage(f"sure-{n}", query, 2.0) for n in range(top_k)] for query in queries]
        return found, [Certificate(query == "a", 0 if query == "a" else 7, 20) for query in queries]


def test_a_reply_says_how_sure_it_is_only_when_asked() -> None:
    search = Sure()
    sure, open_ = {"certified": True, "open": 0, "candidates": 20}, {"certified": False, "open": 7, "candidates": 20}
    with served(search, certify_candidates=50) as url, httpx.Client(base_url=url, trust_env=False) as client:

        def ask(path: str, **body: Any) -> Any:
            return client.post(path, json={"top_n": 1, **body}).json()

        plain = ask("/batch_search", query=["a", "b"])
        assert plain == [[{"id": "plain-0", "contents": "a"}], [{"id": "plain-0", "contents": "b"}]]
        told = ask("/batch_search", query=["a", " ", "b", "a"], certify="probable", return_score=True)
        assert told["certified"] == [sure, {"certified": True, "open": 0, "candidates": 0}, open_, sure]
        assert [[hit["id"] for hit in hits] for hits in told["result"][0]] == [["sure-0"], [], ["sure-0"], ["sure-0"]]
        assert ask("/search", query="b", certify=True) == {"result": [{"id": "sure-0", "contents": "b"}], "certified": [open_]}
        assert ask("/retrieve", queries=["a"], certify="proven")["certified"] == [sure]
        assert ask("/batch_search", query=["a", "b"]) == plain, "what a certified search found answers nobody else"
        assert ask("/batch_search", query=["a", "b"], certify=False) == plain
        assert "certify" in ask("/search", query="b", certify="perhaps")["detail"]
    assert search.asked == [(["a", "b"], 1, "probable", 50), (["b"], 1, "proven", 50), (["a"], 1, "proven", 50)]


@pytest.mark.parametrize(
    ("tree", "certified"),
    [
        ({"index": {"factory": "Exact"}}, True),
        ({"index": {"factory": "RR64,RaBitQfs", "refine": True, "candidates": 20}}, True),
        ({"index": {"factory": "SQ8"}}, False),
        ({"index": {"kind": "hybrid"}}, False),
    ],
)
def test_an_index_is_as_sure_as_it_can_be(tmp_path: Path, tree: dict[str, Any], certified: bool) -> None:
    retriever = Retriever.open(knowledge.built(tmp_path, encoder={"dim": 64}, **tree), RetrieverConfig())
    found, sure = retriever.certified(QUERIES, 3, "proven", 250)
    assert [hits[0].id for hits in found] == ["p7", "p150"]
    assert [item.certified for item in sure] == [certified] * 2
    assert all((item.open == 0) == certified for item in sure)
