"""Read the replies of a retriever: ours and the original's, and Search-R1's. Knows shapes; knows no connection.

A reply of another shape than asked for is a SearchFailure with the fault `garbage`, never an exception.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import httpx

from research_rl.episode.agent import SearchFailure
from research_rl.episode.trajectory import Passage, SearchFault

__all__ = ["Dialect", "Passages", "detail", "parse", "request", "retry_after"]

Passages = list[list[Passage]]
Dialect = Literal["batch_search", "retrieve"]
"""The path asked: `/batch_search` of the original service, or `/retrieve` of Search-R1's."""


def request(dialect: Dialect, queries: Sequence[str], top_k: int) -> dict[str, Any]:
    """Return the body of a request."""
    if dialect == "retrieve":
        return {"queries": list(queries), "topk": top_k, "return_scores": True}
    return {"query": list(queries), "top_n": top_k, "return_score": True}


def parse(dialect: Dialect, response: httpx.Response, queries: int) -> Passages | SearchFailure:
    """Return the passages of each query, or a SearchFailure."""
    try:
        tree = response.json()
        passages = _search_r1(tree) if dialect == "retrieve" else _original(tree)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        return SearchFailure(f"retriever's reply is not understood ({type(error).__name__})", SearchFault.GARBAGE)
    if len(passages) != queries:
        return SearchFailure(f"retriever gave {len(passages)} replies to {queries} queries", SearchFault.GARBAGE)
    return passages


def _original(tree: Any) -> Passages:
    """Read `[[[{id, contents}]], [[score]]]`."""
    # Parts of unequal length end in a ValueError, which `parse` reports.
    documents, scores = tree
    return [
        [Passage(_text(document["id"]), _text(document["contents"]), float(score)) for document, score in zip(*pair, strict=True)]
        for pair in zip(documents, scores, strict=True)
    ]


def _search_r1(tree: Any) -> Passages:
    """Read `{"result": [[{"document": {"contents", "id"?}, "score"}]]}`; its corpora may hold numbers as ids, or none."""
    return [[_hit(hit["document"], float(hit["score"])) for hit in hits] for hits in tree["result"]]


def _hit(document: Any, score: float) -> Passage:
    identifier = document.get("id", "")
    if isinstance(identifier, bool) or not isinstance(identifier, str | int):
        raise TypeError(f"id {identifier!r} is neither text nor a whole number")
    return Passage(str(identifier), _text(document["contents"]), score)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def retry_after(response: httpx.Response, longest_s: float) -> float:
    """Return how many seconds a refusal asks to wait, at most `longest_s`; 0 when it does not say."""
    try:
        return min(max(float(response.headers.get("retry-after", 0)), 0.0), longest_s)
    except ValueError:
        return 0.0


def detail(response: httpx.Response) -> str:
    """Return what a refusal says, cut to 200 characters."""
    try:
        return str(response.json()["detail"])[:200]
    except (ValueError, TypeError, KeyError, RecursionError):
        return response.text[:200]
