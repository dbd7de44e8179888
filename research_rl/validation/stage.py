"""Stage validate: judge the raw snapshot by Great Expectations suites before anything is built from it.

Knows which statistic meets which limit; leaves measuring to `corpus` and `questions`, expectations to `suites`. The artifact
is the report and the accepted snapshot's statistics, with those of the one accepted before it: what drift is measured against.
Data docs (HTML) carry times and paths, so they go to artifacts/.work/data-docs.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from research_rl.data.download import CORPUS, SPLITS
from research_rl.data.flashrag import Question, read_questions, supporting_ids
from research_rl.errors import DataError, ManifestError
from research_rl.pipeline import manifest
from research_rl.pipeline.extras import require
from research_rl.pipeline.stages import Context
from research_rl.validation import drift
from research_rl.validation.answers import Sought
from research_rl.validation.corpus import CorpusStatistics, measure_corpus
from research_rl.validation.docs import SUMMARY, named
from research_rl.validation.questions import Texts, rows
from research_rl.validation.suites import Check, Frame, check, corpus_frames, drift_frame, question_frame, remedy, schema_frame

__all__ = ["QualityError", "run_stage"]

REPORT, STATISTICS = "report.json", "statistics.json"
DOCS = "data-docs"
FIRST = "no earlier snapshot"


class QualityError(DataError):
    """Critical expectations are broken; `checks` are all outcomes."""

    def __init__(self, message: str, checks: Sequence[dict[str, Any]], docs: Path) -> None:
        super().__init__(message)
        self.checks, self.docs = checks, docs


def run_stage(context: Context) -> None:
    """Publish the data-quality report. Raises QualityError naming the broken critical expectations and the first rows, or ConfigError."""
    require("great_expectations", "pandas")
    folder, docs = context.parent("download"), context.workspace.work(DOCS)
    shutil.rmtree(docs, ignore_errors=True)
    questions = _questions(folder, docs)
    sought = Sought.of(
        (answer for items in questions.values() for item in items for answer in item.golden_answers),
        (passage for items in questions.values() for item in items for passage in supporting_ids(item)),
    )
    corpus = _measure(context, folder / CORPUS, sought)
    context.progress("comparing the question sets", 0.85)
    tables = _tables(context, questions, sought, corpus)
    profiles = {"corpus": drift.corpus_profile(corpus)}
    profiles |= {split: drift.question_profile(questions[split], table) for split, table in tables.items()}
    earlier, accepted = _earlier(context)
    moved = drift.compare(earlier["profiles"], profiles) if earlier else []
    context.progress("checking the suites", 0.9)
    frames = [question_frame(split, table, context.config.validation) for split, table in tables.items()]
    frames += corpus_frames(corpus, context.config.validation) + _drift(context, moved, earlier, accepted)
    checks = check(frames, docs)
    context.progress(f"data docs: {docs / SUMMARY}", 0.99)
    _require(checks, docs)
    _publish(context, checks, profiles, earlier, {"moved": moved, "corpus": corpus, "tables": tables})


def _questions(folder: Path, docs: Path) -> dict[str, list[Question]]:
    """Read all sets. Raises QualityError that names the first row of each set that breaks the format."""
    questions: dict[str, list[Question]] = {}
    broken: list[Frame] = []
    for split in SPLITS:
        try:
            questions[split] = list(read_questions(folder / f"{split}.jsonl"))
        except DataError as error:
            broken.append(schema_frame(split, str(error)))
    if broken:
        _require(check(broken, docs), docs)
    return questions


def _measure(context: Context, path: Path, sought: Sought) -> CorpusStatistics:
    total = max(1, context.parents["download"].counts.get("corpus", 0))
    return measure_corpus(
        path,
        sought,
        context.config.validation.max_passage_chars,
        context.workspace.work("validate"),
        lambda seen: context.progress(f"{seen:,} passages measured", 0.8 * seen / total),
    )


def _tables(
    context: Context, questions: Mapping[str, Sequence[Question]], sought: Sought, corpus: CorpusStatistics
) -> dict[str, list[dict[str, Any]]]:
    """Return the row tables of all sets; dev and test are looked up in train, test in dev as well."""
    earlier: dict[str, Texts] = {}
    tables: dict[str, list[dict[str, Any]]] = {}
    for split in ("train", "dev", "test"):
        tables[split] = rows(questions[split], earlier, sought, corpus)
        earlier[split] = Texts(context.config.validation.near_overlap)
        earlier[split].add(split, questions[split])
    return tables


def _earlier(context: Context) -> tuple[dict[str, Any] | None, bool]:
    """Return the snapshot to compare with, and whether the present one was accepted before.

    The last artifact holds the last accepted snapshot. If that is the present one, validated again, the comparison is the
    same as it was then, so that equal inputs give equal artifacts.
    """
    folder = context.workspace.folder(context.stage.name)
    try:
        manifest.load(folder)
        record = json.loads((folder / STATISTICS).read_bytes())
    except (ManifestError, FileNotFoundError):
        return None, False
    if record["snapshot"]["data"] == context.parents["download"].hash:
        return record["earlier"], True
    return record["snapshot"], False


def _drift(context: Context, moved: Sequence[dict[str, Any]], earlier: dict[str, Any] | None, accepted: bool) -> list[Frame]:
    """Return the drift suite. Drift stops a run only when the source itself changed under an unchanged configuration."""
    if not earlier:
        return []
    limits = context.config.validation.drift
    deliberate = earlier["source"] != context.parents["download"].config_hash
    return [drift_frame(moved, limits, not (accepted or deliberate or limits.accept))]


def _publish(
    context: Context, checks: Sequence[Check], profiles: dict[str, Any], earlier: dict[str, Any] | None, seen: dict[str, Any]
) -> None:
    download = context.parents["download"]
    corpus: CorpusStatistics = seen["corpus"]
    tables: dict[str, list[dict[str, Any]]] = seen["tables"]
    with context.publish() as staging:
        report = [item.to_json() for item in checks]
        snapshot = {"data": download.hash, "source": download.config_hash, "profiles": profiles}
        _write(staging.path / REPORT, report)
        _write(staging.path / STATISTICS, {"snapshot": snapshot, "earlier": earlier})
        staging.counts |= {"passages": corpus.rows, "checks": len(checks), "warnings": sum(not item.passed for item in checks)}
        staging.counts |= {split: len(table) for split, table in tables.items()}
        staging.facts |= {
            "checks": report,
            "answer_coverage": {split: round(sum(row["answered"] for row in table) / len(table), 6) for split, table in tables.items()},
            "longest_passage": corpus.longest,
            "lengths": {name: {key: drop_bins(value) for key, value in item["lengths"].items()} for name, item in profiles.items()},
            "drift": {"against": earlier["data"] if earlier else FIRST, "measures": [_moved(row) for row in seen["moved"]]},
        }


def drop_bins(lengths: Mapping[str, Any]) -> dict[str, int]:
    """Return the quantiles of a profile's lengths."""
    return {name: value for name, value in lengths.items() if name != "bins"}


def _moved(row: Mapping[str, Any]) -> dict[str, Any]:
    # NaN, the one number that differs from itself, stands for no value and is not JSON.
    return {name: value for name, value in row.items() if value == value}


def _write(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _require(checks: Sequence[Check], docs: Path) -> None:
    broken = [item for item in checks if not item.passed and item.severity == "critical"]
    if not broken:
        return
    lines = [
        f"{item.suite}: {item.expectation}({', '.join(filter(None, (item.column, item.limit)))}) observed {item.observed}"
        + (f"; {advice}" if (advice := remedy(item.suite, item.column)) else "")
        + "".join(f"\n    {named(row)}" for row in item.rows)
        for item in broken
    ]
    hint = "; to accept the drift, run once with validation.drift.accept=true" if any(item.suite == "drift" for item in broken) else ""
    raise QualityError(
        f"{len(broken)} data-quality checks failed; correct the source, or the limit where one is named{hint}; details in "
        f"{docs / SUMMARY}\n  " + "\n  ".join(lines),
        [item.to_json() for item in checks],
        docs,
    )
