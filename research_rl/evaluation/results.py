"""One question and what became of it: records, files and the journal of an unfinished evaluation. Grades trajectories by the
published rules; is given the grade that training would pay; drives none.

Invariant: every question of an evaluation has exactly one result, also when its episode was lost: a lost one scores 0.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from research_rl.config import Config
from research_rl.episode import protocol
from research_rl.episode.trajectory import Author, SearchRecord, StopReason, Trajectory
from research_rl.errors import DataError
from research_rl.pipeline import json_lines, manifest
from research_rl.pipeline.json_files import parse
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import Workspace
from research_rl.reward.grader import GradingTarget
from research_rl.reward.metrics import contains, cover_em, exact_match, findable, normalize, recall, token_f1, token_precision, token_recall
from research_rl.reward.rules import Grade, grade

__all__ = [
    "RECORD",
    "HeldOutQuestion",
    "Result",
    "UnfinishedResults",
    "load_evaluation",
    "outside",
    "read_questions",
    "read_results",
    "to_result",
    "write_results",
]

_STAGES = ("baseline", "evaluate", "cell", "night")
"""Stages whose artifacts hold results.jsonl."""
_GRADING = 1
"""Raised by one whenever equal trajectories are graded otherwise than before, so that results of both ways are never put together."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOutQuestion:
    """A held-out question; `row` is its place in the file, `supporting` the ids of the passages that answer it."""

    row: int
    id: str
    data_source: str
    question: str
    golden_answers: tuple[str, ...]
    supporting: tuple[str, ...]

    @property
    def target(self) -> GradingTarget:
        """What its trajectories are graded against."""
        return GradingTarget(self.question, self.golden_answers, self.supporting)


@dataclass(frozen=True)
class Result:
    """What became of one question.

    `reward` is what training pays for this trajectory, the sum of `reward_parts`; `suspicion` and `judge` are as in `rules.Grade`.
    `acc`, `token_precision` and `token_recall` are the published evaluation's (`metrics`). `hops` counts its supporting passages
    (0: unknown). `recall` is the share of them that was retrieved, None when unknown. `answer_search` is the number, from 1, of the
    first search that showed a gold answer: 0 when none did, None when no gold answer can be looked for. `redundant_queries` is the
    share of the queries that were asked before, None without a query. `tokens` were written by the model, `response_tokens` include
    results. `failed_searches` got no answer from the retriever. `seconds` is wall time.
    """

    row: int
    id: str
    data_source: str
    hops: int
    question: str
    golden_answers: tuple[str, ...]
    prediction: str
    em: float
    f1: float
    acc: float
    token_precision: float
    token_recall: float
    format: bool
    fault: str
    reward: float
    reward_parts: dict[str, float]
    suspicion: str | None
    judge: str | None
    reward_paper: float
    reward_repository: float
    searches: int
    failed_searches: int
    recall: float | None
    answer_search: int | None
    redundant_queries: float | None
    stop: str
    tokens: int
    response_tokens: int
    seconds: float
    trajectory: dict[str, Any]

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells its question from all others."""
        # Ids repeat between data sets, and an evaluation of other questions may use the same ids.
        return self.data_source, self.id, self.question

    @property
    def shown(self) -> list[str]:
        """What each search showed to the model, in order."""
        return _shown(self.trajectory)

    @property
    def lost(self) -> bool:
        """Whether an engine or a retriever, not the model, decided this result."""
        return self.stop == StopReason.ENGINE_FAILURE or self.failed_searches > 0

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Result:
        """Read a record back. Raises DataError when a field is missing or unknown."""
        # Checked here, since a dataclass tells of a missing field by a TypeError that names no remedy.
        if not cls.is_record(record):
            odd = ", ".join(sorted({field.name for field in fields(cls)} ^ set(record)))
            raise DataError(
                f"a result of another version lacks or adds {odd:.200}; evaluate again, a stage by `research run STAGE --force`"
            )
        values: dict[str, Any] = record | {"golden_answers": tuple(record["golden_answers"])}
        return cls(**values)

    @classmethod
    def is_record(cls, record: Any) -> bool:
        """Return whether this version wrote a record: it has every field and no other."""
        return isinstance(record, dict) and record.keys() == {field.name for field in fields(cls)}


RECORD = hashlib.sha256(json.dumps([sorted(field.name for field in fields(Result)), _GRADING]).encode()).hexdigest()
"""Hash of what results of this version are: the fields of a record, and how they are graded. It counts in the hash of every cell."""


def to_result(
    question: HeldOutQuestion,
    trajectory: Trajectory,
    trained: Grade,
    eos_token: str,
    seconds: float,
    *,
    cut_is_empty: bool = False,
    prediction: str | None = None,
) -> Result:
    """Grade a trajectory by both published rules, beside the grade `trained` by the reward of training, and count what happened in it.

    `prediction` is that of a method with another form of answer than `\\boxed{}`; format and rewards are our protocol's all the same.
    With `cut_is_empty` the prediction of a response that the token limit cut is "", whatever was written, as in ReSearch's published
    evaluation; there, too, one that used the limit up with a search's result keeps its answer. The rewards are those of training.
    """
    paper = grade(trajectory, question.golden_answers, "paper", eos_token)
    repository = grade(trajectory, question.golden_answers, "repository", eos_token)
    golds, record = question.golden_answers, trajectory.to_json()
    if prediction is None:
        prediction = "" if cut_is_empty and _is_cut(trajectory) else repository.prediction
    passage_ids = [passage for search in trajectory.searches for passage in search.passage_ids]
    return Result(
        row=question.row,
        id=question.id,
        data_source=question.data_source,
        hops=len(question.supporting),
        question=question.question,
        golden_answers=question.golden_answers,
        prediction=prediction,
        em=exact_match(prediction, golds),
        f1=token_f1(prediction, golds),
        acc=cover_em(prediction, golds),
        token_precision=token_precision(prediction, golds),
        token_recall=token_recall(prediction, golds),
        format=repository.format_ok,
        fault=repository.reason,
        reward=trained.score,
        reward_parts=trained.parts,
        suspicion=trained.suspicion,
        judge=trained.judge,
        reward_paper=paper.score,
        reward_repository=repository.score,
        searches=len(trajectory.searches),
        # Only faults of the service: a query that it refuses is the model's own doing and loses no question.
        failed_searches=sum(search.fault is not None and search.fault.is_service for search in trajectory.searches),
        recall=recall(passage_ids, question.supporting),
        answer_search=_answer_search(trajectory.searches, _shown(record), golds),
        redundant_queries=_redundant_queries(trajectory.searches),
        stop=trajectory.stop.value,
        tokens=sum(len(s.ids) for s in trajectory.segments if s.author is Author.MODEL),
        response_tokens=len(trajectory.response_ids),
        seconds=round(seconds, 3),
        trajectory=record,
    )


def _is_cut(trajectory: Trajectory) -> bool:
    """Return whether the token limit ended the model in the middle of a turn."""
    written = trajectory.segments
    return trajectory.stop is StopReason.TOKEN_LIMIT and bool(written) and written[-1].author is Author.MODEL


def _shown(record: Mapping[str, Any]) -> list[str]:
    """Return what each search of a trajectory's record showed to the model, without what stands around passages, which are no words of one.

    A message that answers no search is in none; a search whose result was never shown has "".
    """
    shown = [segment for segment in record["segments"] if segment["author"] == Author.SEARCH and not segment.get("message")]
    texts = [""] * len(record["searches"])
    for number, segment in enumerate(shown):
        # Records of before it was noted have a result for each search, in order.
        place = int(segment.get("search", number))
        if 0 <= place < len(texts):
            texts[place] += _passages_of(segment)
    return texts


def _passages_of(segment: Mapping[str, Any]) -> str:
    text = str(segment["text"])
    if "passages" in segment:
        return "\n".join(text[start:end].strip() for _, start, end in segment["passages"])
    return text.replace(protocol.RESULT_OPEN, "").replace(protocol.RESULT_CLOSE, "")


def _answer_search(searches: Sequence[SearchRecord], shown: Sequence[str], golds: Sequence[str]) -> int | None:
    if not (sought := findable(golds)):
        return None
    # A search without a passage shows a message of ours.
    hits = (bool(search.passage_ids and contains(text, sought)) for search, text in zip(searches, shown, strict=True))
    return next((number for number, hit in enumerate(hits, 1) if hit), 0)


def _redundant_queries(searches: Sequence[SearchRecord]) -> float | None:
    # A query of articles or signs alone normalises to nothing, and would equal every other such one.
    queries = [normalize(search.query) or search.query for search in searches if search.query.strip()]
    return 1 - len(set(queries)) / len(queries) if queries else None


def read_questions(path: Path, rows: int | None, rows_per_set: int | None = None) -> list[HeldOutQuestion]:
    """Read the first `rows` questions of a prepared parquet file, of each data source at most the first `rows_per_set`.

    The sets of a prepared file are mixed, so that its beginning holds more of a large set than of a small one. Raises DataError when
    there is no question.
    """
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["data_source", "extra_info"])
    sources: list[str] = table.column("data_source").cast("string").to_pylist()
    chosen = _first_of_each(sources, rows_per_set)[:rows]
    if not chosen:
        raise DataError(f"{path} has no questions; raise prepare.test_rows or add test files to data.test")
    records = table.take(chosen).to_pylist()
    return [_question(row, sources[row], record["extra_info"]) for row, record in zip(chosen, records, strict=True)]


def _first_of_each(sources: Sequence[str], most: int | None) -> list[int]:
    """Return the places of the first `most` items of each source, of all when it is None, in their order."""
    counts: Counter[str] = Counter()
    places: list[int] = []
    for place, source in enumerate(sources):
        counts[source] += 1
        if most is None or counts[source] <= most:
            places.append(place)
    return places


def _question(row: int, data_source: str, extra: dict[str, Any]) -> HeldOutQuestion:
    answers, supporting = tuple(extra["golden_answers"]), tuple(extra.get("supporting_passage_ids") or ())
    return HeldOutQuestion(row, str(extra["id"]), data_source, str(extra["question"]), answers, supporting)


def load_evaluation(folder: Path) -> Manifest:
    """Return the manifest of an evaluation whose files are whole. Raises ManifestError, and DataError for another stage's artifact."""
    artifact = manifest.load(folder)
    if artifact.stage not in _STAGES:
        stages = f"{', '.join(_STAGES[:-1])} or {_STAGES[-1]}"
        raise DataError(f"{folder} is the artifact of stage {artifact.stage}; name an artifact of {stages}")
    return artifact


def read_results(folder: Path) -> list[Result]:
    """Read the results of an evaluation artifact, in the order of the questions. Raises DataError for a line that is no result."""
    path = folder / "results.jsonl"
    results: list[Result] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                results.append(Result.from_json(parse(line)))
            except DataError as error:
                raise DataError(f"{path}:{number}: {error}") from None
            except (ValueError, TypeError, AttributeError) as error:
                raise DataError(f"{path}:{number}: the line is no result ({error!s:.200}); evaluate again") from None
    return results


def outside(config: Config, workspace: Workspace, published: Manifest) -> list[str]:
    """Return that another version graded the results of an evaluation, so that it is evaluated again; nothing where this one did."""
    # Evaluations from before there was a mark say nothing of how they were graded.
    return ["results: recorded or graded by another version"] if published.facts.get("record", RECORD) != RECORD else []


def write_results(folder: Path, results: Iterable[Result]) -> None:
    """Write results.jsonl, one result a line."""
    (folder / "results.jsonl").write_bytes(b"".join(json_lines.to_line(result.to_json()) for result in results))


class UnfinishedResults:
    """Results of an evaluation under way, one a line, so that a killed one repeats only what it had in flight."""

    def __init__(self, path: Path) -> None:
        self._path = path
        records = [record for _, record in json_lines.read(path)]
        known = [Result.from_json(record) for record in records if Result.is_record(record)]
        if len(known) < len(records):
            logger.warning(
                "%s: %d results of another version are passed over; their questions are asked again", path, len(records) - len(known)
            )
        # Of two lines about one question the later one counts.
        self.results = {result.row: result for result in known}

    def add(self, result: Result) -> None:
        """Append one result. Raises OSError when the disk does not take it; the file then holds the results before it."""
        json_lines.append(self._path, result.to_json())
        self.results[result.row] = result

    def forget(self) -> None:
        """Remove every result."""
        self._path.unlink(missing_ok=True)
        self.results.clear()
