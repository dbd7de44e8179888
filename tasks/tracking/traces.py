"""One episode as an MLflow trace: a root span, and a span per thought, search and answer. Knows record and spans only.

A record is {"question", "golden_answers", "segments": [{"author", "text", "tokens"}], "searches": [{"query",
"passage_ids", "seconds", "error"}], "stop", "engine_seconds", "scores": {name: number}}; "prompt_tokens", "prediction" and judges'
"verdicts", each as `log_judged` takes it, where they are known. A segment says more where its writer noted it, see `trajectory.Segment`.
Search times are measured; the engine's time is shared out over the model's segments by their tokens.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from research_rl.episode.protocol import RESULT_CLOSE, RESULT_OPEN
from research_rl.episode.trajectory import Place

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Assessment, LiveSpan, Trace

__all__ = [
    "ANSWERS",
    "EVENT",
    "JUDGE",
    "Episode",
    "Target",
    "TraceSpan",
    "documents",
    "expected",
    "is_verdict",
    "log_judged",
    "log_traces",
    "log_verdict",
    "pieces",
    "remove",
    "run_traces",
    "standing",
]

EVENT = "research.event"
"""The tag that names the event a trace was made of, so that an event that comes twice makes one trace."""
ANSWERS, JUDGE, VERDICT = "golden_answers", "judge", "verdict"
_EXPORTER = "mlflow.tracing.export.mlflow_v3"
"""MLflow's logger of what happens to a trace on its way."""
_LOST = "Failed to"
_SOURCE = "research-rl"
_BATCH = 100
"""As many traces as MLflow deletes in one request."""
_SPANS = 2000
"""As many spans go out together, in one request; a trace that has more goes alone."""
# A block that the end of the response cut off counts up to there.
_TAGS = re.compile(r"<(think|search|answer)>(.*?)(?:</\1>|\Z)", re.DOTALL)


@dataclass(frozen=True)
class TraceSpan:
    """A span: what it is, what went in and came out, how long it took, the tokens read and written, the ids of what was found.

    `places` says which passage stands where in `text`, None where nobody noted it.
    """

    kind: str
    query: str
    text: str
    seconds: float
    tokens: tuple[int, int] = (0, 0)
    passage_ids: tuple[str, ...] = ()
    error: str | None = None
    places: tuple[Place, ...] | None = None


@dataclass(frozen=True)
class Target:
    """Where a trace goes: the server, the experiment, the run. `begun` is told its id before any part of it is sent."""

    uri: str
    experiment: str
    run: str
    begun: Callable[[str], None]


@dataclass(frozen=True)
class Episode:
    """An episode to log: `record` as the module says, which ended at `end_ms` (milliseconds since 1970), and the event that tells of it."""

    to: Target
    record: Mapping[str, Any]
    end_ms: int
    event: str


def pieces(record: Mapping[str, Any]) -> Iterator[TraceSpan]:
    """Yield the spans of an episode in order. Of a turn's spans the first one carries its tokens."""
    segments, shown = record["segments"], 0
    written = sum(segment["tokens"] for segment in segments if segment["author"] == "model") or 1
    # Where nobody noted what the engine read for a turn, it is all that stands before it.
    ahead = int(record.get("prompt_tokens") or 0)
    for segment in segments:
        if segment.get("message"):
            yield TraceSpan("message", "", str(segment["text"]), 0.0)
        elif segment["author"] == "search":
            # Records of before it was noted have a result for each search, in order.
            yield _retrieved(segment, record["searches"], int(segment.get("search", shown)))
            shown += 1
        else:
            seconds = float(record.get("engine_seconds", 0.0)) * segment["tokens"] / written
            yield from _turn(str(segment["text"]), seconds, (int(segment.get("read", ahead)), int(segment["tokens"])))
        ahead += int(segment["tokens"])


def _turn(text: str, seconds: float, tokens: tuple[int, int]) -> Iterator[TraceSpan]:
    parts = _TAGS.findall(text) or [("think", text)]
    for number, (kind, part) in enumerate(parts):
        yield TraceSpan(kind, "", part.strip(), seconds / len(parts), (0, 0) if number else tokens)


def _retrieved(segment: Mapping[str, Any], searches: Sequence[Mapping[str, Any]], place: int) -> TraceSpan:
    search = searches[place] if 0 <= place < len(searches) else {}
    noted = segment.get("passages")
    return TraceSpan(
        "retrieve",
        str(search.get("query", "")),
        str(segment["text"]),
        float(search.get("seconds", 0.0)),
        passage_ids=tuple(str(name) for name in search.get("passage_ids") or ()),
        error=None if search.get("error") is None else str(search["error"]),
        places=None if noted is None else tuple((str(name), int(start), int(end)) for name, start, end in noted),
    )


def documents(text: str, ids: Sequence[str], places: Sequence[Place] | None = None) -> list[dict[str, Any]]:
    """Return what the model was shown as documents in MLflow's form, one a passage; nothing for a message in the place of passages.

    Without `places` a result block of our own protocol is taken apart at its empty lines. Where its passages hold empty lines of their
    own, and for text of another form, that cannot be done: it is one document with all the ids.
    """
    if places is not None:
        # A place may lie behind the text's end: what the limit on the response cut off was not shown.
        pairs = [(name, part) for name, start, end in places if (part := text[start:end].strip())]
    elif not ids:
        pairs = []
    else:
        pairs = _taken_apart(text.strip(), ids)
    return [{"page_content": part, "metadata": {"doc_uri": name}, "id": name} for name, part in pairs]


def _taken_apart(text: str, ids: Sequence[str]) -> list[tuple[str, str]]:
    body = text.removeprefix(RESULT_OPEN).removesuffix(RESULT_CLOSE).strip()
    parts = body.split("\n\n")
    if len(parts) > len(ids) or not text.startswith(RESULT_OPEN):
        return [(", ".join(ids), body)]
    # Fewer parts than ids: the limit on a result's tokens cut the last passages off.
    return list(zip(ids, parts, strict=False))


def expected(answers: Sequence[str]) -> dict[str, Any]:
    """Return what MLflow keeps of a question's gold answers: the list, and the text that its own judges compare with."""
    return {ANSWERS: list(answers), "expected_response": " or ".join(answers)}


def log_traces(episodes: Sequence[Episode]) -> list[str]:
    """Log each episode, linked to its run, and wait until MLflow has all of them; return their traces' ids.

    Raises what the first trace was lost by; the others may be there then.
    """
    traces: list[str] = []
    for batch in _batches(episodes):
        with _arriving():
            traces += [_log_trace(episode, spans) for episode, spans in batch]
    return traces


def _batches(episodes: Sequence[Episode]) -> Iterator[list[tuple[Episode, list[TraceSpan]]]]:
    """Put episodes together with their spans, as many as go out in one request."""
    batch: list[tuple[Episode, list[TraceSpan]]] = []
    for episode in episodes:
        spans = list(pieces(episode.record))
        if batch and len(spans) + sum(len(others) for _, others in batch) > _SPANS:
            yield batch
            batch = []
        batch.append((episode, spans))
    if batch:
        yield batch


def _log_trace(episode: Episode, spans: Sequence[TraceSpan]) -> str:
    """Log one episode and return its trace's id. Gold answers and scores go with it as assessments, in the same request."""
    import mlflow

    to, record = episode.to, episode.record
    mlflow.set_tracking_uri(to.uri)
    # Counted back from the end, which is known; spans then follow each other without gaps.
    now = episode.end_ms * 1_000_000 - int(sum(piece.seconds for piece in spans) * 1e9)
    root = _root(to, record, now, episode.event)
    to.begun(root.trace_id)
    for piece in spans:
        now = _span(root, piece, now)
    _assess(root, to.run, record)
    root.end(outputs=record.get("prediction", spans[-1].text if spans else ""), end_time_ns=now)
    return root.trace_id


class _Losses(logging.Handler):
    """Keeps by which exceptions traces were lost."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the exception that is handled at this moment."""
        error = sys.exc_info()[1]
        if error and record.getMessage().startswith(_LOST):
            self.errors.append(error)


@contextmanager
def _arriving() -> Generator[None]:
    """Wait until the traces that are logged within are with MLflow. Raises what the first of them was lost by, which MLflow only logs."""
    import mlflow

    exporter, losses = logging.getLogger(_EXPORTER), _Losses()
    before = exporter.level, exporter.propagate
    # It tells of a trace that failed by a warning, of its spans at this level only.
    exporter.setLevel(logging.DEBUG)
    exporter.propagate = False
    exporter.addHandler(losses)
    try:
        yield
        mlflow.flush_trace_async_logging()
    finally:
        exporter.removeHandler(losses)
        exporter.setLevel(before[0])
        exporter.propagate = before[1]
    if losses.errors:
        raise losses.errors[0]


def log_verdict(client: MlflowClient, to: Target, event: Mapping[str, Any]) -> None:
    """Log a person's verdict on an answer of the agent; the first one makes the trace of the answer. One that comes twice is one."""
    import mlflow
    from mlflow.entities import AssessmentSource

    said, answer = event["verdict"], f"answer-{event['answer']}"
    number = f"{answer}-{said['time']}"
    traces = standing(client, to.experiment, answer)
    if not traces and event["record"]:
        log_traces([Episode(to, event["record"], int(event["time"]), answer)])
        traces = standing(client, to.experiment, answer)
    for trace in traces[:1]:
        if any((each.metadata or {}).get(EVENT) == number for each in trace.info.assessments or []):
            return
        mlflow.set_tracking_uri(to.uri)
        person = AssessmentSource("HUMAN", "agent")
        about: dict[str, Any] = {"trace_id": trace.info.trace_id, "metadata": {EVENT: number}}
        if said["answer"]:
            for name, value in expected([said["answer"]]).items():
                mlflow.log_expectation(name=name, value=value, source=person, **about)
        # Last: its number says that all of the verdict is there.
        mlflow.log_feedback(name=VERDICT, value=said["verdict"] == "up", rationale=said["comment"], source=person, **about)


def standing(client: MlflowClient, experiment: str, event: str) -> list[Trace]:
    """Return the traces that an event was made into."""
    return _found(client, experiment, f"tags.`{EVENT}` = '{event}'")


def run_traces(client: MlflowClient, experiment: str, run: str) -> list[Trace]:
    """Return the traces of a run."""
    return _found(client, experiment, f"attributes.run_id = '{run}'")


def remove(client: MlflowClient, experiment: str, traces: Sequence[str]) -> None:
    """Delete the traces of these ids; one that is not there is passed over."""
    for first in range(0, len(traces), _BATCH):
        client.delete_traces(experiment, trace_ids=list(traces[first : first + _BATCH]))


def _found(client: MlflowClient, experiment: str, what: str) -> list[Trace]:
    traces: list[Trace] = []
    token: str | None = None
    while True:
        page = client.search_traces(locations=[experiment], filter_string=what, page_token=token)
        traces += page
        if not (token := page.token):
            return traces


def _root(to: Target, record: Mapping[str, Any], start_ns: int, event: str) -> LiveSpan:
    import mlflow
    from mlflow.entities import SpanType

    scores: Mapping[str, float] = record.get("scores", {})
    # Numbers stay numbers, so that one can search by them; MLflow's annotation knows texts alone.
    attributes: dict[str, Any] = {"stop": record["stop"], **scores}
    return mlflow.start_span_no_context(
        "episode",
        span_type=SpanType.AGENT,
        inputs={"question": record["question"]},
        attributes=attributes,
        metadata={"mlflow.sourceRun": to.run},
        tags={EVENT: event, "stop": str(record["stop"]), **{name: f"{value:.4g}" for name, value in scores.items()}},
        experiment_id=to.experiment,
        start_time_ns=start_ns,
    )


def _span(root: LiveSpan, piece: TraceSpan, start_ns: int) -> int:
    """Log a piece below `root`; return when it ended."""
    import mlflow
    from mlflow.entities import SpanStatusCode, SpanType
    from mlflow.tracing.constant import SpanAttributeKey

    kinds = {"think": SpanType.LLM, "search": SpanType.TOOL, "retrieve": SpanType.RETRIEVER, "answer": SpanType.LLM}
    kind = kinds.get(piece.kind, SpanType.UNKNOWN)
    inputs = {"query": piece.query} if piece.query else None
    span = mlflow.start_span_no_context(piece.kind, span_type=kind, parent_span=root, inputs=inputs, start_time_ns=start_ns)
    if any(piece.tokens):
        read, written = piece.tokens
        # MLflow adds these up to the tokens of the trace.
        usage = {"input_tokens": read, "output_tokens": written, "total_tokens": read + written}
        span.set_attribute(SpanAttributeKey.CHAT_USAGE, usage)
    if piece.error:
        span.set_attribute("error", piece.error)
    end = start_ns + int(piece.seconds * 1e9)
    outputs = documents(piece.text, piece.passage_ids, piece.places) if piece.kind == "retrieve" else piece.text
    span.end(outputs=outputs, status=SpanStatusCode.ERROR if piece.error else SpanStatusCode.OK, end_time_ns=end)
    return end


def _assess(root: LiveSpan, run: str, record: Mapping[str, Any]) -> None:
    """Put gold answers, scores and a judge's verdict on a trace that is not sent yet."""
    import mlflow
    from mlflow.entities import AssessmentSource
    from mlflow.tracing.constant import AssessmentMetadataKey
    from mlflow.tracing.provider import detach_span_from_context, set_span_in_context

    code = AssessmentSource("CODE", _SOURCE)
    where: dict[str, Any] = {"trace_id": root.trace_id, "span_id": root.span_id}
    measured: dict[str, Any] = {**where, "metadata": {AssessmentMetadataKey.SOURCE_RUN_ID: run}}
    # Assessments of the active trace travel with it; of any other each would be a request.
    token = set_span_in_context(root)
    try:
        for name, value in expected(record[ANSWERS]).items() if record.get(ANSWERS) else ():
            mlflow.log_expectation(name=name, value=value, source=code, **where)
        for name, value in record.get("scores", {}).items():
            mlflow.log_feedback(name=name, value=value, source=code, **measured)
        for verdict in record.get("verdicts", ()):
            log_judged(verdict, run, **where)
    finally:
        detach_span_from_context(token)


def log_judged(verdict: Mapping[str, Any], run: str, **where: Any) -> None:
    """Put a judge's verdict on a trace, as a measurement of `run`; `where` is the trace's id, and the span's where it is known.

    A verdict is {"correct", "rationale", "served", "model", "preset", "judgement"}: the last three name its judgement, which is a hash.
    """
    import mlflow
    from mlflow.entities import AssessmentSource
    from mlflow.tracing.constant import AssessmentMetadataKey

    about = {f"research.{name}": str(verdict[name]) for name in ("judgement", "preset", "model")}
    mlflow.log_feedback(
        name=JUDGE,
        value=bool(verdict["correct"]),
        rationale=verdict["rationale"] or None,
        source=AssessmentSource("LLM_JUDGE", str(verdict["served"] or verdict["model"])),
        metadata={AssessmentMetadataKey.SOURCE_RUN_ID: run, **about},
        **where,
    )


def is_verdict(assessment: Assessment, verdict: Mapping[str, Any]) -> bool:
    """Return whether an assessment is the verdict of the same judgement."""
    return assessment.name == JUDGE and (assessment.metadata or {}).get("research.judgement") == verdict["judgement"]
