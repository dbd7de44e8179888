"""One episode as an MLflow trace: a root span, and a span per thought, search and answer. Knows record and spans only.

A record is {"question", "golden_answers", "segments": [{"author", "text", "tokens"}], "searches": [{"query",
"passage_ids", "seconds", "error"}], "stop", "engine_seconds", "scores": {name: number}}. Search times are measured; the
engine's time is shared out over the model's segments by their tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["Piece", "log_trace", "pieces"]

# A block that the end of the response cut off counts up to there.
_TAGS = re.compile(r"<(think|search|answer)>(.*?)(?:</\1>|\Z)", re.DOTALL)

Piece = tuple[str, str, str, float]
"""Kind of span, input, output, seconds."""


def pieces(record: Mapping[str, Any]) -> Iterator[Piece]:
    """Yield the spans of an episode in order."""
    segments, searches = record["segments"], iter(record["searches"])
    tokens = sum(segment["tokens"] for segment in segments if segment["author"] == "model") or 1
    for segment in segments:
        if segment["author"] == "search":
            search = next(searches, {"query": "", "seconds": 0.0})
            yield "retrieve", str(search["query"]), str(segment["text"]), float(search["seconds"])
            continue
        seconds = float(record.get("engine_seconds", 0.0)) * segment["tokens"] / tokens
        parts = _TAGS.findall(segment["text"]) or [("think", segment["text"])]
        for kind, text in parts:
            yield kind, "", text.strip(), seconds / len(parts)


def log_trace(uri: str, experiment: str, run: str, record: Mapping[str, Any], end_ms: int) -> None:
    """Log one episode, linked to `run`; it ends at `end_ms` (milliseconds since 1970)."""
    import mlflow
    from mlflow.entities import SpanType

    kinds = {"think": SpanType.LLM, "search": SpanType.TOOL, "retrieve": SpanType.RETRIEVER, "answer": SpanType.LLM}
    mlflow.set_tracking_uri(uri)
    spans = list(pieces(record))
    # Counted back from the end, which is known; spans then follow each other without gaps.
    now = end_ms * 1_000_000 - int(sum(seconds for *_, seconds in spans) * 1e9)
    root = mlflow.start_span_no_context(
        "episode",
        span_type=SpanType.AGENT,
        inputs={"question": record["question"], "golden_answers": record.get("golden_answers", [])},
        attributes={"stop": record["stop"], **record.get("scores", {})},
        metadata={"mlflow.sourceRun": run},
        tags={"stop": str(record["stop"]), **{name: f"{value:.4g}" for name, value in record.get("scores", {}).items()}},
        experiment_id=experiment,
        start_time_ns=now,
    )
    for kind, query, text, seconds in spans:
        span = mlflow.start_span_no_context(
            kind, span_type=kinds[kind], parent_span=root, inputs={"text": query} if query else None, start_time_ns=now
        )
        now += int(seconds * 1e9)
        span.end(outputs=text, end_time_ns=now)
    root.end(outputs=spans[-1][2] if spans else "", end_time_ns=now)
