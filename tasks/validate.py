"""Stage validate: judge the raw snapshot by Great Expectations suites before anything is built from it.

Knows which statistic meets which limit; leaves reading to `statistics` and the expectations to `suites`.
The artifact is report.json alone. Data docs (HTML) carry times and paths, so they go to artifacts/.work/data-docs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from research_rl.data.download import CORPUS, SPLITS
from research_rl.data.flashrag import Question, read_questions, supporting_ids
from research_rl.errors import DataError
from research_rl.stages import Context
from tasks.artifacts import quality_table
from tasks.stage import stage_task
from tasks.statistics import CorpusStatistics, answered, measure_corpus
from tasks.suites import Check, Frame, check, corpus_frames, question_frame

__all__ = ["run_stage", "validate"]

REPORT = "report.json"
DOCS = "data-docs"


def run_stage(context: Context) -> None:
    """Publish the data-quality report. Raises DataError naming the first broken critical expectations."""
    folder = context.parent("download")
    questions = {split: list(read_questions(folder / f"{split}.jsonl")) for split in SPLITS}
    corpus, found = _measure(context, folder / CORPUS, questions)
    context.progress("checking the suites", 0.9)
    docs = context.workspace.work(DOCS)
    shutil.rmtree(docs, ignore_errors=True)
    checks = check(_frames(context, questions, corpus, found), docs)
    _require(checks, docs)
    with context.publish() as staging:
        report = [item.to_json() for item in checks]
        (staging.path / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        staging.counts |= {"passages": corpus.rows, "checks": len(checks), "warnings": sum(not item.passed for item in checks)}
        staging.counts |= {split: len(rows) for split, rows in questions.items()}
        staging.facts |= {"checks": report, "answer_coverage": round(sum(found) / len(found), 6), "longest_passage": corpus.longest}


def _measure(context: Context, path: Path, questions: dict[str, list[Question]]) -> tuple[CorpusStatistics, list[bool]]:
    total = max(1, context.parents["download"].counts.get("corpus", 0))
    support = {passage for rows in questions.values() for row in rows for passage in supporting_ids(row)}
    limit = context.config.validation.max_passage_chars
    corpus = measure_corpus(path, support, limit, lambda rows: context.progress(f"{rows:,} passages measured", 0.5 * rows / total))
    test = questions["test"]
    found = answered(
        test, corpus.kept, path, lambda rows: context.progress(f"answers sought in {rows:,} passages", 0.5 + 0.4 * rows / total)
    )
    return corpus, found


def _frames(context: Context, questions: dict[str, list[Question]], corpus: CorpusStatistics, found: list[bool]) -> list[Frame]:
    limits = context.config.validation
    train = {_key(row) for row in questions["train"]}
    frames: list[Frame] = []
    for split, rows in questions.items():
        hits = found if split == "test" else [True] * len(rows)
        leaks = train if split != "train" else frozenset[str]()
        table = [_row(row, row_found, leaks, corpus) for row, row_found in zip(rows, hits, strict=True)]
        frames.append(question_frame(split, table, limits))
    share = corpus.repeated_contents / max(1, corpus.rows)
    return [*frames, *corpus_frames(corpus.shards, corpus.sample, share, corpus.examples, limits)]


def _key(question: Question) -> str:
    return " ".join(question.question.lower().split())


def _row(question: Question, found: bool, train: set[str] | frozenset[str], corpus: CorpusStatistics) -> dict[str, Any]:
    return {
        "id": question.id,
        "question": question.question,
        "answers": len(question.golden_answers),
        "chars": len(question.question),
        "leaked": int(_key(question) in train),
        "answered": int(found),
        "unknown_support": sum(passage not in corpus.kept for passage in supporting_ids(question)),
    }


def _require(checks: Sequence[Check], docs: Path) -> None:
    broken = [item for item in checks if not item.passed and item.severity == "critical"]
    if not broken:
        return
    lines = [
        f"{item.suite}: {item.expectation}({', '.join(filter(None, (item.column, item.limit)))}) observed {item.observed}"
        + (f", first rows: {', '.join(item.rows)}" if item.rows else "")
        for item in broken
    ]
    raise DataError(
        f"{len(broken)} data-quality checks failed; correct the source or the limits in validation.*, details in {docs / 'index.html'}\n  "
        + "\n  ".join(lines)
    )


validate = stage_task("validate", after=quality_table)
