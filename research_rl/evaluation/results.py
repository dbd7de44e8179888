"""One question and what became of it: records, files and the journal of an unfinished evaluation. Grades trajectories by the
published rules; is given the grade that training would pay; drives none.

Invariant: every question of an evaluation has exactly one result, also when its episode was lost: a lost one scores 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from research_rl.episode.trajectory import Author, StopReason, Trajectory
from research_rl.errors import DataError
from research_rl.pipeline import json_lines
from research_rl.pipeline.json_files import parse
from research_rl.reward.grader import GradingTarget
from research_rl.reward.metrics import recall
from research_rl.reward.rules import Grade, grade

__all__ = ["HeldOutQuestion", "Result", "UnfinishedResults", "read_questions", "read_results", "to_result", "write_results"]


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
    `hops` counts its supporting passages (0: unknown). `recall` is the share of them that was retrieved, None when
    unknown. `tokens` were written by the model, `response_tokens` include results. `failed_searches` got no answer from
    the retriever. `seconds` is wall time.
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
    stop: str
    tokens: int
    response_tokens: int
    seconds: float
    trajectory: dict[str, Any]

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
        if set(record) != {field.name for field in fields(cls)}:
            raise DataError(f"a result has the fields {sorted(record)}; evaluate again with this version")
        values: dict[str, Any] = record | {"golden_answers": tuple(record["golden_answers"])}
        return cls(**values)


def to_result(
    question: HeldOutQuestion, trajectory: Trajectory, trained: Grade, eos_token: str, seconds: float, *, cut_is_empty: bool = False
) -> Result:
    """Grade a trajectory by both published rules, beside the grade `trained` by the reward of training, and count what happened in it.

    With `cut_is_empty` the prediction of a response that the token limit cut is "", whatever was written, as in ReSearch's published
    evaluation; there, too, one that used the limit up with a search's result keeps its answer. The rewards are those of training.
    """
    paper = grade(trajectory, question.golden_answers, "paper", eos_token)
    repository = grade(trajectory, question.golden_answers, "repository", eos_token)
    cut = cut_is_empty and _is_cut(trajectory)
    found = [passage for search in trajectory.searches for passage in search.passage_ids]
    return Result(
        row=question.row,
        id=question.id,
        data_source=question.data_source,
        hops=len(question.supporting),
        question=question.question,
        golden_answers=question.golden_answers,
        prediction="" if cut else repository.prediction,
        em=0.0 if cut else repository.em,
        f1=0.0 if cut else repository.f1,
        format=repository.format_ok,
        fault=repository.reason,
        reward=trained.score,
        reward_parts=trained.parts,
        suspicion=trained.suspicion,
        judge=trained.judge,
        reward_paper=paper.score,
        reward_repository=repository.score,
        searches=len(trajectory.searches),
        failed_searches=sum(search.fault is not None and search.fault.is_service for search in trajectory.searches),
        recall=recall(found, question.supporting),
        stop=trajectory.stop.value,
        tokens=sum(len(s.ids) for s in trajectory.segments if s.author is Author.MODEL),
        response_tokens=len(trajectory.response_ids),
        seconds=round(seconds, 3),
        trajectory=trajectory.to_json(),
    )


def _is_cut(trajectory: Trajectory) -> bool:
    """Return whether the token limit ended the model in the middle of a turn."""
    written = trajectory.segments
    return trajectory.stop is StopReason.TOKEN_LIMIT and bool(written) and written[-1].author is Author.MODEL


def read_questions(path: Path, rows: int | None) -> list[HeldOutQuestion]:
    """Read the first `rows` questions of a prepared parquet file. Raises DataError when there is none."""
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["data_source", "extra_info"])
    records = table.slice(0, rows if rows is not None else table.num_rows).to_pylist()
    if not records:
        raise DataError(f"{path} has no questions; raise prepare.test_rows or add test files to data.test")
    return [_question(row, str(record["data_source"]), record["extra_info"]) for row, record in enumerate(records)]


def _question(row: int, data_source: str, extra: dict[str, Any]) -> HeldOutQuestion:
    answers, supporting = tuple(extra["golden_answers"]), tuple(extra.get("supporting_passage_ids") or ())
    return HeldOutQuestion(row, str(extra["id"]), data_source, str(extra["question"]), answers, supporting)


def read_results(folder: Path) -> list[Result]:
    """Read the results of an evaluation artifact, in the order of the questions. Raises DataError for a line that is no result."""
    path = folder / "results.jsonl"
    results: list[Result] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                results.append(Result.from_json(parse(line)))
            except (ValueError, TypeError, AttributeError) as error:
                raise DataError(f"{path}:{number}: the line is no result ({error!s:.200}); evaluate again") from None
    return results


def write_results(folder: Path, results: Iterable[Result]) -> None:
    """Write results.jsonl, one result a line."""
    text = "".join(json.dumps(result.to_json(), ensure_ascii=False) + "\n" for result in results)
    (folder / "results.jsonl").write_text(text, encoding="utf-8")


class UnfinishedResults:
    """Results of an evaluation under way, one a line, so that a killed one repeats only what it had in flight."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Of two lines about one question the later one counts.
        self.results = {result.row: result for result in (Result.from_json(record) for _, record in json_lines.read(path))}

    def add(self, result: Result) -> None:
        """Append one result. Raises OSError when the disk does not take it; the file then holds the results before it."""
        json_lines.append(self._path, result.to_json())
        self.results[result.row] = result

    def forget(self) -> None:
        """Remove every result."""
        self._path.unlink(missing_ok=True)
        self.results.clear()
