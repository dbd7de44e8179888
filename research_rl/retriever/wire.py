"""Requests and replies of the retriever service. Knows shapes; knows no search.

`/search` and `/batch_search` are the original service's format; `/retrieve` is Search-R1's, which verl's search tool speaks.
Every route takes the other's names too, and a number written as text or with a zero fraction, as the peers' clients send them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from research_rl.episode.trajectory import Passage
from research_rl.index.tiers import Certificate

__all__ = ["BatchSearchRequest", "RetrieveRequest", "SearchRequest", "batch_reply", "certified_reply", "retrieve_reply", "search_reply"]

_COUNTS = ("top_n", "topk", "top_k")
_SPELLINGS = (("query", "queries"), _COUNTS, ("return_score", "return_scores"))


class _SearchBody(BaseModel):
    # A number must not pass for a query; where a text may stand for a number, `_count` says so.
    model_config = ConfigDict(strict=True)
    default_top_n: ClassVar[int] = 10
    top_n: int | None = Field(default=None, ge=1, description="Passages for each query; `topk` and `top_k` are other names.")
    return_score: bool = Field(default=False, strict=False, description="Also return the scores; `return_scores` is another name.")
    timeout_s: float | None = Field(default=None, gt=0, description="Longest wait before the search, in seconds.")
    certify: Literal["proven", "probable"] | None = Field(
        default=None,
        description="Also say how sure each reply is, and look at more rows to be sure: by a bound that always holds (`true` means this), "
        "or by one that fails once in a million. The reply is then {result, certified}.",
    )

    @property
    def passages(self) -> int:
        """Passages for each query."""
        return self.default_top_n if self.top_n is None else self.top_n

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, tree: Any) -> Any:
        """Bring every field to its first name. Raises ValueError for two spellings that differ and for a count below 1."""
        if not isinstance(tree, dict):
            return tree
        fields = cast(dict[str, Any], tree)
        plain = {name: value for name, value in fields.items() if not any(name in spellings for spellings in _SPELLINGS)}
        for spellings in _SPELLINGS:
            given = [(name, fields[name]) for name in spellings if fields.get(name) is not None]
            values = [_count(name, value) if spellings is _COUNTS else value for name, value in given]
            if any(value != values[0] for value in values):
                raise ValueError(f"{' and '.join(name for name, _ in given)} differ; send one of them")
            if values:
                plain[spellings[0]] = values[0]
        if isinstance(plain.get("certify"), bool):
            plain["certify"] = "proven" if plain["certify"] else None
        return plain


def _count(name: str, value: Any) -> int:
    """Return a count of passages that may be written as `3`, `"3"` or `3.0`. Raises ValueError."""
    # Below 20 digits, because Python answers thousands of them with an error of its own.
    if isinstance(value, str) and value.strip().isascii() and value.strip().isdigit() and len(value) < 20:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    # To Python `true` is an integer, too.
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        # ascii(): half a surrogate pair in the message would break pydantic's error itself.
        raise ValueError(f"{name}={ascii(value)[:40]} is no whole number of passages from 1 on; send one, such as 3")
    return value


class SearchRequest(_SearchBody):
    """One query."""

    query: str = Field(description="Text to search for.")


class BatchSearchRequest(_SearchBody):
    """Several queries; one without searchable text gets no passages."""

    query: list[str] = Field(description="Texts to search for; `queries` is another name.")


class RetrieveRequest(_SearchBody):
    """Several queries, or one, in Search-R1's names; 3 passages each when `topk` is left out."""

    default_top_n: ClassVar[int] = 3
    query: list[str] | str | None = Field(default=None, description="Texts to search for; Search-R1's name is `queries`.")

    @model_validator(mode="after")
    def _has_texts(self) -> RetrieveRequest:
        if self.query is None:
            raise ValueError("send the texts as `queries`")
        return self

    @property
    def texts(self) -> list[str]:
        """The queries as a list."""
        return [self.query] if isinstance(self.query, str) else self.query or []


def search_reply(passages: Sequence[Passage], scores: bool) -> Any:
    """Return `[{id, contents}]`, or with scores `[[{id, contents}], [score]]`."""
    documents = [_document(passage) for passage in passages]
    return [documents, [passage.score for passage in passages]] if scores else documents


def batch_reply(results: Sequence[Sequence[Passage]], scores: bool) -> Any:
    """Return `[[{id, contents}]]`, or with scores `[[[{id, contents}]], [[score]]]`."""
    documents = [[_document(passage) for passage in passages] for passages in results]
    return [documents, [[passage.score for passage in passages] for passages in results]] if scores else documents


def retrieve_reply(results: Sequence[Sequence[Passage]], scores: bool) -> Any:
    """Return `{"result": [[{id, contents}]]}`, or with scores `{"result": [[{document: {...}, score}]]}`."""
    if not scores:
        return {"result": batch_reply(results, False)}
    return {"result": [[{"document": _document(passage), "score": passage.score} for passage in passages] for passages in results]}


def certified_reply(reply: Any, certificates: Sequence[Certificate]) -> Any:
    """Return `{"result": reply, "certified": [{certified, open, candidates}]}`; a reply that has `result` already keeps it."""
    result = reply if isinstance(reply, dict) else {"result": reply}
    return {**result, "certified": [asdict(certificate) for certificate in certificates]}


def _document(passage: Passage) -> dict[str, str]:
    return {"id": passage.id, "contents": passage.contents}
