"""The data-quality suites in Great Expectations. Knows expectations and data frames; knows no files.

Invariant: what is returned holds no time, run id or path; those stand in the data docs alone.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from research_rl.config import DriftConfig, ValidationConfig
from research_rl.validation.columns import ENCODING_DEFECTS
from research_rl.validation.corpus import CorpusStatistics, Example
from research_rl.validation.docs import write_summary
from research_rl.validation.questions import COLUMNS

__all__ = ["Check", "Frame", "check", "corpus_frames", "drift_frame", "question_frame", "remedy", "schema_frame"]

_SHOWN = 3
_LISTED = 20
_SHARES = ("malformed", "repeated_ids", "repeated_contents", *ENCODING_DEFECTS, "untitled", "wordless", "overlong")

_LIMITS = {
    "chars": "max_question_chars",
    "longest_answer": "max_answer_chars",
    "repeated": "max_repeated_questions",
    "answered": "min_answer_coverage",
    "leaked": "max_leakage",
    "near": "max_near_leakage",
    "repeated_contents": "max_duplicate_passages",
    "longest": "max_passage_chars",
    "overlong": "max_passage_chars",
    **dict.fromkeys(ENCODING_DEFECTS, "max_bad_encoding"),
}
"""Column -> the parameter of `validation` that its critical limit is set by; the other limits are fixed."""
_REMEDIES = {
    "unknown_support": "metadata.supporting_passage_ids names passages that are not in data.corpus: correct or remove the ids, "
    "or name the corpus that the questions were written for",
}


@dataclass(frozen=True)
class Check:
    """One expectation's outcome: what was observed, the limit, and the first rows that break it."""

    suite: str
    expectation: str
    column: str
    limit: str
    observed: str
    severity: str
    passed: bool
    rows: tuple[Example, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return asdict(self)


@dataclass(frozen=True)
class Frame:
    """One suite: its name, its rows, `expect` which builds the expectations, and what names a row.

    `examples` shows offending rows by column where the frame's own rows are not those of the data.
    """

    suite: str
    rows: Sequence[Mapping[str, Any]]
    expect: Callable[[Any], list[Any]]
    named: tuple[str, ...] = ()
    columns: tuple[str, ...] | None = None
    examples: Mapping[str, Sequence[Example]] = field(default_factory=dict[str, Sequence[Example]])


def question_frame(split: str, rows: Sequence[Mapping[str, Any]], limits: ValidationConfig) -> Frame:
    """Return the suite of one question set; `rows` have the columns of questions.COLUMNS."""

    def expect(e: Any) -> list[Any]:
        between, lengths = e.ExpectColumnValuesToBeBetween, e.ExpectColumnValueLengthsToBeBetween
        return [
            e.ExpectTableColumnsToMatchSet(column_set=list(COLUMNS), severity="critical"),
            e.ExpectTableRowCountToBeBetween(min_value=1, severity="critical"),
            e.ExpectColumnValuesToBeUnique(column="id", severity="critical"),
            lengths(column="id", min_value=1, severity="critical"),
            between(column="chars", min_value=3, max_value=limits.max_question_chars, severity="critical"),
            between(column="words", min_value=1, severity="critical"),
            between(column="answers", min_value=1, severity="critical"),
            between(column="longest_answer", min_value=1, max_value=limits.max_answer_chars, severity="critical"),
            none(between, "echo", 0.0, "critical"),
            *encodings(between, limits),
            none(between, "unreachable", 0.0, "warning"),
            none(between, "repeated", limits.max_repeated_questions, "warning"),
            none(between, "unknown_support", 0.0, "critical"),
            between(
                column="answered",
                min_value=1,
                mostly=limits.min_answer_coverage,
                severity="critical" if split == "test" else "warning",
            ),
            *(leaks(between, limits) if split != "train" else []),
            *([none(between, "shared", 0.0, "warning")] if split == "test" else []),
        ]

    return Frame(split, rows, expect, ("line", "id", "text", "note"))


def remedy(suite: str, column: str) -> str:
    """Return what to do about a broken critical check, other than to correct the source; empty where that is all."""
    if suite == "drift":
        return f"limit: validation.drift.{column}_critical"
    if name := _LIMITS.get(column):
        return f"limit: validation.{name}"
    return _REMEDIES.get(column, "")


def schema_frame(split: str, problem: str) -> Frame:
    """Return the suite of a question set that cannot be read to its end because of `problem`."""
    return Frame(
        split, [{"problem": problem}], lambda e: [e.ExpectColumnValuesToBeNull(column="problem", severity="critical")], ("problem",),
        examples={"problem": [{"problem": problem}]},
    )  # fmt: skip


def none(between: Any, column: str, share: float, severity: str) -> Any:
    """Expect a column of counts to be zero in all rows but a share."""
    # Rounded for the reader of the docs: 1 - 0.9 is 0.09999999999999998.
    return between(column=column, max_value=0, mostly=round(1 - share, 9), severity=severity)


def leaks(between: Any, limits: ValidationConfig) -> list[Any]:
    """Expect few rows to stand, or nearly stand, in train."""
    return [none(between, "leaked", limits.max_leakage, "critical"), none(between, "near", limits.max_near_leakage, "critical")]


def encodings(between: Any, limits: ValidationConfig) -> list[Any]:
    """Report any defect of encoding; too many stop the run, but for a mere other normal form."""
    stopping = [name for name in ENCODING_DEFECTS if name != "unnormalised"]
    return [
        *(none(between, name, 0.0, "warning") for name in ENCODING_DEFECTS),
        *(none(between, name, limits.max_bad_encoding, "critical") for name in stopping),
    ]


def corpus_frames(corpus: CorpusStatistics, limits: ValidationConfig) -> list[Frame]:
    """Return the corpus suites: whole-corpus shares, the first rows with a defect, shards, and a sample of passages."""

    def whole(e: Any) -> list[Any]:
        def most(column: str, share: float) -> Any:
            return e.ExpectColumnMaxToBeBetween(column=column, max_value=share, severity="critical")

        stopping = ("replacement", "control", "mojibake")
        return [
            *(most(name, 0.0) for name in ("malformed", "repeated_ids", "overlong")),
            most("repeated_contents", limits.max_duplicate_passages),
            *(most(name, limits.max_bad_encoding) for name in stopping),
            most("wordless", 0.001),
        ]

    def per_shard(e: Any) -> list[Any]:
        return [
            e.ExpectColumnValuesToBeBetween(column="rows", min_value=1, severity="critical"),
            e.ExpectColumnValuesToBeBetween(column="longest", max_value=limits.max_passage_chars, severity="critical"),
        ]

    def single(e: Any) -> list[Any]:
        return [e.ExpectColumnValuesToBeBetween(column=name, max_value=0, severity="warning") for name in _SHARES]

    def sampled(e: Any) -> list[Any]:
        return [
            e.ExpectColumnValuesToBeUnique(column="id", severity="critical"),
            e.ExpectColumnValuesToMatchRegex(column="contents", regex=r"\w", mostly=0.999, severity="critical"),
            e.ExpectColumnValueLengthsToBeBetween(column="contents", min_value=40, mostly=0.95, severity="warning"),
        ]

    shares = {name: round(corpus.share(name), 9) for name in _SHARES}
    return [
        Frame("corpus", [{"rows": corpus.rows, **shares}], whole, examples=corpus.examples),
        Frame("corpus rows", offending(corpus), single, ("line", "id", "text"), columns=("line", "id", "text", *_SHARES)),
        Frame("corpus shards", corpus.shards, per_shard, ("shard",), examples={"longest": corpus.examples.get("overlong", ())}),
        Frame("corpus sample", [{"id": name, "contents": text} for _, name, text in corpus.sample], sampled, ("id", "contents")),
    ]


def offending(corpus: CorpusStatistics) -> list[dict[str, Any]]:
    """Return the first rows of each defect, with a 1 in that defect's column."""
    clean = dict.fromkeys(_SHARES, 0)
    return [{**row, **clean, name: 1} for name in _SHARES for row in corpus.examples.get(name, ())]


def drift_frame(rows: Sequence[Mapping[str, Any]], limits: DriftConfig, stops: bool) -> Frame:
    """Return the suite on `drift.compare`'s rows; drift above the critical limits fails only where it `stops` the run."""

    def expect(e: Any) -> list[Any]:
        def most(column: str, level: str) -> Any:
            return e.ExpectColumnValuesToBeBetween(
                column=column, max_value=getattr(limits, f"{column}_{level}"), severity="warning" if level == "warn" else level
            )

        levels = ("warn", "critical") if stops else ("warn",)
        return [most(column, level) for column in ("rows", "shape", "vocabulary") for level in levels]

    return Frame("drift", rows, expect, ("set", "measure", "before", "after"))


def check(frames: Sequence[Frame], docs: Path) -> list[Check]:
    """Validate every frame and write the HTML data docs below `docs`, docs.SUMMARY first."""
    # Great Expectations would else report its use to its makers.
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import pandas as pd

    # By name and untyped: the type checker would read the whole of Great Expectations, which takes it longer than all of this project.
    gx: Any = import_module("great_expectations")
    progress_bars: Any = import_module("great_expectations.data_context.types.base").ProgressBarsConfig

    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.WARNING)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = progress_bars(globally=False)
    context.add_data_docs_site("docs", _site(docs))
    source = context.data_sources.add_pandas("workspace")
    checks: list[Check] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for frame in frames:
            batch = source.add_dataframe_asset(frame.suite).add_batch_definition_whole_dataframe("all")
            suite = context.suites.add(gx.ExpectationSuite(name=frame.suite, expectations=frame.expect(gx.expectations)))
            definition = context.validation_definitions.add(gx.ValidationDefinition(name=frame.suite, data=batch, suite=suite))
            checkpoint = context.checkpoints.add(
                gx.Checkpoint(name=frame.suite, validation_definitions=[definition], result_format=_format(frame))
            )
            result = checkpoint.run(batch_parameters={"dataframe": pd.DataFrame(list(frame.rows), columns=frame.columns)})
            for outcome in next(iter(result.run_results.values())).results:
                checks.append(_check(frame, outcome.to_json_dict()))
        context.build_data_docs(site_names=["docs"])
    write_summary([check.to_json() for check in checks], docs)
    return checks


def _site(docs: Path) -> Any:
    return {
        "class_name": "SiteBuilder",
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs)},
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        "site_section_builders": {
            "validations": {"renderer": {"module_name": f"{__package__}.escaped", "class_name": "EscapedResultsRenderer"}}
        },
    }


def _format(frame: Frame) -> dict[str, Any]:
    named = {"unexpected_index_column_names": list(frame.named), "return_unexpected_index_query": False} if frame.named else {}
    return {"result_format": "COMPLETE", "partial_unexpected_count": _LISTED, **named}


def _check(frame: Frame, outcome: dict[str, Any]) -> Check:
    config, result = outcome["expectation_config"], outcome["result"]
    column = str(config["kwargs"].get("column", ""))
    passed = bool(outcome["success"])
    return Check(
        suite=frame.suite,
        expectation=config["type"],
        column=column,
        limit=_limit(config["kwargs"]),
        observed=_observed(result, outcome["exception_info"]),
        severity=config["severity"],
        passed=passed,
        rows=() if passed else _rows(frame, column, result),
    )


def _limit(arguments: dict[str, Any]) -> str:
    names = ("min_value", "max_value", "mostly", "regex")
    return ", ".join(f"{name}={arguments[name]}" for name in names if arguments.get(name) is not None)


def _observed(result: dict[str, Any], raised: dict[str, Any]) -> str:
    if raised.get("raised_exception"):
        return f"not evaluated: {raised.get('exception_message')}"
    if "observed_value" in result:
        value = result["observed_value"]
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    return f"{result.get('unexpected_count', 0)} of {result.get('element_count', 0)} rows differ"


def _rows(frame: Frame, column: str, result: dict[str, Any]) -> tuple[Example, ...]:
    known = frame.examples.get(column) or [
        {name: value for name, value in row.items() if name in frame.named and value not in ("", None)}
        for row in (result.get("unexpected_index_list") or [])[:_SHOWN]
    ]
    return tuple(known[:_SHOWN])
