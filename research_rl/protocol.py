"""The tags of the ReSearch protocol and the text rules around them. Knows strings; knows no tokens, no scores.

Source: arXiv 2503.19470, table 1. The model writes `<think>`, `<search>` and `<answer>` blocks; the environment
alone writes `<result>` blocks.
"""

from __future__ import annotations

import re

__all__ = [
    "ANSWER_CLOSE",
    "ANSWER_OPEN",
    "BOXED_OPEN",
    "RESULT_CLOSE",
    "RESULT_OPEN",
    "SEARCH_CLOSE",
    "SEARCH_OPEN",
    "TAGS",
    "THINK_CLOSE",
    "THINK_OPEN",
    "last_query",
    "neutralise",
]

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
SEARCH_OPEN, SEARCH_CLOSE = "<search>", "</search>"
RESULT_OPEN, RESULT_CLOSE = "<result>", "</result>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
BOXED_OPEN = "\\boxed{"
TAGS = (
    THINK_OPEN,
    THINK_CLOSE,
    SEARCH_OPEN,
    SEARCH_CLOSE,
    RESULT_OPEN,
    RESULT_CLOSE,
    ANSWER_OPEN,
    ANSWER_CLOSE,
)

_TAG = re.compile(r"<\s*(/?)\s*(think|search|result|answer)\s*>", re.IGNORECASE)


def neutralise(text: str) -> str:
    """Return `text` with protocol tags in square brackets, so that a passage cannot speak for the model."""
    return _TAG.sub(lambda m: f"[{m[1]}{m[2]}]", text)


def last_query(text: str) -> str | None:
    """Return the query of a turn that ends with `</search>`; None when no `<search>` opens it, "" when it is blank."""
    body, closed, _ = text.rpartition(SEARCH_CLOSE)
    _, opened, query = body.rpartition(SEARCH_OPEN)
    return query.strip() if closed and opened else None
