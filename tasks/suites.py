"""The data-quality suites in Great Expectations. Knows expectations and data frames; knows no files.

Invariant: what is returned holds no time, run id or path; those stand in the data docs alone.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from research_rl.config import ValidationConfig

__all__ = ["Check", "Frame", "check", "corpus_frames", "question_frame"]

_SHOWN = 3
QUESTION_COLUMNS = ("id", "question", "answers", "chars", "leaked", "answered", "unknown_support")
_CLEAN = r"\ufffd"


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
    rows: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return asdict(self)


@dataclass(frozen=True)
class Frame:
    """One suite: its name, its rows, `expect` which builds the expectations, and examples of offending rows by column."""

    suite: str
    rows: Sequence[dict[str, Any]]
    expect: Callable[[Any], list[Any]]
    examples: dict[str, list[str]]


def question_frame(split: str, rows: Sequence[dict[str, Any]], limits: ValidationConfig) -> Frame:
    """Return the suite of one question set; `rows` have the columns of QUESTION_COLUMNS."""

    def expect(e: Any) -> list[Any]:
        found = [
            e.ExpectTableColumnsToMatchSet(column_set=list(QUESTION_COLUMNS), severity="critical"),
            e.ExpectTableRowCountToBeBetween(min_value=1, severity="critical"),
            e.ExpectColumnValuesToBeUnique(column="id", severity="critical"),
            e.ExpectColumnValueLengthsToBeBetween(column="id", min_value=1, severity="critical"),
            e.ExpectColumnValueLengthsToBeBetween(column="question", min_value=3, max_value=4000, severity="critical"),
            e.ExpectColumnValuesToNotMatchRegex(column="question", regex=_CLEAN, severity="critical"),
            e.ExpectColumnValuesToBeUnique(column="question", mostly=0.99, severity="warning"),
            e.ExpectColumnValuesToBeBetween(column="answers", min_value=1, severity="critical"),
            e.ExpectColumnValuesToBeBetween(column="unknown_support", max_value=0, severity="critical"),
        ]
        if split != "train":
            found.append(e.ExpectColumnMeanToBeBetween(column="leaked", max_value=limits.max_leakage, severity="critical"))
        if split == "test":
            found.append(e.ExpectColumnMeanToBeBetween(column="answered", min_value=limits.min_answer_coverage, severity="critical"))
        return found

    examples = {
        "leaked": [row["id"] for row in rows if row["leaked"]],
        "answered": [row["id"] for row in rows if not row["answered"]],
    }
    return Frame(split, rows, expect, examples)


def corpus_frames(
    shards: Sequence[dict[str, int]],
    sample: Sequence[dict[str, str]],
    repeated: float,
    examples: dict[str, list[str]],
    limits: ValidationConfig,
) -> list[Frame]:
    """Return the corpus suites: one row per shard, one row of whole-corpus shares, and a sample of passages."""

    def per_shard(e: Any) -> list[Any]:
        return [
            e.ExpectColumnValuesToBeBetween(column="rows", min_value=1, severity="critical"),
            e.ExpectColumnValuesToBeBetween(column="longest", max_value=limits.max_passage_chars, severity="critical"),
            e.ExpectColumnValuesToBeBetween(column="replacement", max_value=0, severity="warning"),
            e.ExpectColumnValuesToBeBetween(column="untitled", max_value=0, severity="warning"),
        ]

    def whole(e: Any) -> list[Any]:
        return [e.ExpectColumnMaxToBeBetween(column="repeated_contents", max_value=limits.max_duplicate_passages, severity="critical")]

    def sampled(e: Any) -> list[Any]:
        return [
            e.ExpectColumnValuesToBeUnique(column="id", severity="critical"),
            e.ExpectColumnValueLengthsToBeBetween(column="contents", min_value=1, severity="critical"),
            e.ExpectColumnValuesToMatchRegex(column="contents", regex=r"\w", mostly=0.999, severity="critical"),
            e.ExpectColumnValueLengthsToBeBetween(column="contents", min_value=40, mostly=0.95, severity="warning"),
        ]

    return [
        Frame("corpus shards", shards, per_shard, examples),
        Frame("corpus", [{"repeated_contents": repeated}], whole, examples),
        Frame("corpus sample", sample, sampled, {}),
    ]


def check(frames: Sequence[Frame], docs: Path) -> list[Check]:
    """Validate every frame and write the HTML data docs below `docs`."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx
    import pandas as pd
    from great_expectations.data_context.types.base import ProgressBarsConfig

    logging.getLogger("great_expectations.data_context.types.base").setLevel(logging.WARNING)
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    context.add_data_docs_site("docs", _site(docs))
    source = context.data_sources.add_pandas("workspace")
    found: list[Check] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for frame in frames:
            batch = source.add_dataframe_asset(frame.suite).add_batch_definition_whole_dataframe("all")
            suite = context.suites.add(gx.ExpectationSuite(name=frame.suite, expectations=frame.expect(gx.expectations)))
            definition = context.validation_definitions.add(gx.ValidationDefinition(name=frame.suite, data=batch, suite=suite))
            checkpoint = context.checkpoints.add(
                gx.Checkpoint(name=frame.suite, validation_definitions=[definition], result_format=_format(frame))
            )
            result = checkpoint.run(batch_parameters={"dataframe": pd.DataFrame(list(frame.rows))})
            for outcome in next(iter(result.run_results.values())).results:
                found.append(_check(frame, outcome.to_json_dict()))
        context.build_data_docs(site_names=["docs"])
    return found


def _site(docs: Path) -> Any:
    return {
        "class_name": "SiteBuilder",
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs)},
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
    }


def _format(frame: Frame) -> dict[str, Any]:
    named = ["id"] if frame.rows and "id" in frame.rows[0] else []
    return {"result_format": "COMPLETE", "unexpected_index_column_names": named, "partial_unexpected_count": 20} if named else {
        "result_format": "COMPLETE"
    }  # fmt: skip


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
    names = ("column_set", "min_value", "max_value", "mostly", "regex")
    return ", ".join(f"{name}={arguments[name]}" for name in names if arguments.get(name) is not None)


def _observed(result: dict[str, Any], raised: dict[str, Any]) -> str:
    if raised.get("raised_exception"):
        return f"not evaluated: {raised.get('exception_message')}"
    if "observed_value" in result:
        value = result["observed_value"]
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    return f"{result.get('unexpected_count', 0)} of {result.get('element_count', 0)} rows differ"


def _rows(frame: Frame, column: str, result: dict[str, Any]) -> tuple[str, ...]:
    known = frame.examples.get(column)
    if known:
        return tuple(known[:_SHOWN])
    listed = result.get("unexpected_index_list") or []
    return tuple(str(row.get("id", row)) if isinstance(row, dict) else f"row {row}" for row in listed[:_SHOWN])
