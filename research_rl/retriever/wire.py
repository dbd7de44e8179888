"""Requests and replies of the retriever service. Knows shapes; knows no search.

`/search` and `/batch_search` are the original service's format; `/retrieve` is Search-R1's, which verl's search tool speaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from research_rl.episode.trajectory import Passage

__all__ = ["BatchSearchRequest", "RetrieveRequest", "SearchRequest", "batch_reply", "retrieve_reply", "search_reply"]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True)
    timeout_s: float | None = Field(default=None, gt=0, description="Longest wait before the search, in seconds.")


class SearchRequest(_Request):
    """One query."""

    query: str = Field(description="Text to search for.")
    top_n: int = Field(default=10, ge=1, description="Passages wanted.")
    return_score: bool = Field(default=False, description="Also return the scores.")


class BatchSearchRequest(_Request):
    """Several queries."""

    query: list[str] = Field(description="Texts to search for.")
    top_n: int = Field(default=10, ge=1, description="Passages wanted for each.")
    return_score: bool = Field(default=False, description="Also return the scores.")


class RetrieveRequest(_Request):
    """Several queries, or one, in Search-R1's names."""

    queries: list[str] | str | None = Field(default=None, description="Texts to search for.")
    query: list[str] | str | None = Field(default=None, description="Another name for queries that some clients use.")
    topk: int | None = Field(default=None, ge=1, description="Passages wanted for each; 3 when left out.")
    return_scores: bool = Field(default=False, description="Wrap each passage with its score.")

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        if (self.queries is None) == (self.query is None):
            raise ValueError("send the texts as `queries`")
        return self

    @property
    def texts(self) -> list[str]:
        """The queries as a list."""
        found = self.query if self.queries is None else self.queries
        return [found] if isinstance(found, str) else found or []


def search_reply(found: Sequence[Passage], scores: bool) -> Any:
    """Return `[{id, contents}]`, or with scores `[[{id, contents}], [score]]`."""
    documents = [_document(passage) for passage in found]
    return [documents, [passage.score for passage in found]] if scores else documents


def batch_reply(found: Sequence[Sequence[Passage]], scores: bool) -> Any:
    """Return `[[{id, contents}]]`, or with scores `[[[{id, contents}]], [[score]]]`."""
    documents = [[_document(passage) for passage in passages] for passages in found]
    return [documents, [[passage.score for passage in passages] for passages in found]] if scores else documents


def retrieve_reply(found: Sequence[Sequence[Passage]], scores: bool) -> Any:
    """Return `{"result": [[{id, contents}]]}`, or with scores `{"result": [[{document: {...}, score}]]}`."""
    if not scores:
        return {"result": batch_reply(found, False)}
    return {"result": [[{"document": _document(p), "score": p.score} for p in passages] for passages in found]}


def _document(passage: Passage) -> dict[str, str]:
    return {"id": passage.id, "contents": passage.contents}
