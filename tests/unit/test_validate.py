"""The stage validate: clean data passes, every kind of defect stops it and is shown, drift is measured against what was accepted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from research_rl.config import DriftConfig, ValidationConfig
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import Context
from research_rl.validation.columns import ENCODING_DEFECTS
from research_rl.validation.questions import COLUMNS
from research_rl.validation.stage import FIRST, QualityError, run_stage
from research_rl.validation.suites import remedy
from tests.defects import DEFECTS, context, snapshot


def accepted(found: Context) -> Manifest:
    run_stage(found)
    return manifest.load(found.workspace.folder("validate"))


def broken(error: QualityError) -> set[tuple[str, str]]:
    return {(item["suite"], item["column"]) for item in error.checks if not item["passed"] and item["severity"] == "critical"}


def test_clean_data_passes_and_the_result_stands_in_the_manifest(tmp_path: Path) -> None:
    found = accepted(context(tmp_path, snapshot()))
    assert found.counts == {"passages": 200, "train": 40, "dev": 40, "test": 40, "checks": len(found.facts["checks"]), "warnings": 0}
    assert found.facts["answer_coverage"] == {"train": 1.0, "dev": 1.0, "test": 1.0}
    assert found.facts["lengths"]["corpus"]["words"]["q50"] == 13
    assert found.facts["drift"] == {"against": FIRST, "measures": []}
    assert (tmp_path / "artifacts/.work/data-docs/summary.html").is_file()


def test_a_broken_check_names_its_limit_or_that_it_has_none(tmp_path: Path) -> None:
    """A user whose supporting passages are unknown was sent to "the limits in validation.*", where no such limit exists."""
    data = snapshot()
    for name in ("support not in the corpus", "answers nowhere"):
        DEFECTS[name][2](data)
    with pytest.raises(QualityError) as caught:
        run_stage(context(tmp_path, data))
    support = str(caught.value).partition("dev: ")[2].partition("\n  test: ")[0]
    assert "unknown_support" in support
    assert "name the corpus that the questions were written for" in support
    assert "limit: validation" not in support
    assert "note no such passage: p999" in support
    assert "limit: validation.min_answer_coverage" in str(caught.value)


def test_gold_answers_that_no_prediction_can_match_are_named(tmp_path: Path) -> None:
    """Evaluation counts such a question as wrong whatever is answered, so its owner must hear of it."""
    data = snapshot()
    data["dev"][3]["golden_answers"] += ["A", "!"]
    found = accepted(context(tmp_path, data))
    broken_checks = [item for item in found.facts["checks"] if not item["passed"]]
    assert [(item["suite"], item["column"], item["severity"]) for item in broken_checks] == [("dev", "unreachable", "warning")]
    assert "2 gold answers are empty once normalised and never match: ['A', '!']" in json.dumps(broken_checks[0])
    assert "line 4" in json.dumps(broken_checks[0]) or '"line": 4' in json.dumps(broken_checks[0])


def test_every_limit_that_a_message_names_is_a_parameter() -> None:
    suites = {
        "dev": COLUMNS,
        "corpus": ("repeated_contents", "longest", "overlong", *ENCODING_DEFECTS),
        "drift": ("rows", "shape", "vocabulary"),
    }
    named = [remedy(suite, column).removeprefix("limit: validation.") for suite, columns in suites.items() for column in columns]
    known = {*ValidationConfig.model_fields, *(f"drift.{name}" for name in DriftConfig.model_fields)}
    assert {name for name in named if name and " " not in name} <= known


def test_every_defect_stops_the_stage_and_is_shown(tmp_path: Path) -> None:
    data = snapshot()
    for _, _, spoil in DEFECTS.values():
        spoil(data)
    found = context(tmp_path, data)
    with pytest.raises(QualityError) as caught:
        run_stage(found)
    assert broken(caught.value) >= {(suite, column) for suite, column, _ in DEFECTS.values()}
    message = str(caught.value)
    for shown in (
        "line 10, id p9, text T word word",
        "line 4, id train3",
        "note as train line 1",
        "note nearly train line 2",
        "repeats line 1: Village 0",
    ):
        assert shown in message
    docs = tmp_path / "artifacts/.work/data-docs"
    suites = {name: "".join(path.read_text() for path in (docs / "validations" / name).rglob("*.html")) for name in ("test", "corpus rows")}
    assert "nearly train line 2" in suites["test"] and "repeats line 1: Village 0" in suites["corpus rows"]
    summary = (docs / "summary.html").read_text()
    assert f"{len(broken(caught.value))} critical failed" in summary and "note nearly train line 2" in summary
    assert not found.workspace.folder("validate").exists()


@pytest.mark.long
@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_breaks_its_own_check_alone(tmp_path: Path, name: str) -> None:
    data = snapshot()
    suite, column, spoil = DEFECTS[name]
    spoil(data)
    with pytest.raises(QualityError) as caught:
        run_stage(context(tmp_path, data))
    also = {("corpus shards", "longest")} if column == "overlong" else set()
    assert broken(caught.value) - also == {(suite, column)}


def spoil_files(folder: Path) -> None:
    with (folder / "corpus.jsonl").open("ab") as stream:
        stream.write(b'{"id": "torn", "cont\n{"id": "p3", "contents": "Twice\\nthe id p3 names two rows"}\n{"id": "", "contents": "x"}\n')


def test_torn_lines_and_repeated_ids_of_the_corpus_are_counted_and_shown(tmp_path: Path) -> None:
    with pytest.raises(QualityError) as caught:
        run_stage(context(tmp_path, snapshot(), edit=spoil_files))
    assert broken(caught.value) == {("corpus", "malformed"), ("corpus", "repeated_ids"), ("corpus sample", "id")}
    assert 'line 201, id , text {"id": "torn", "cont' in str(caught.value)
    assert "line 202, id p3, text repeats line 4: Twice" in str(caught.value)


@pytest.mark.parametrize("line", ['{"id": "x", "question": "Who?"}', '{"id": "x", "question": "Who?", "golden_answers": []}', '{"id"'])
def test_a_question_set_that_breaks_the_format_is_refused_with_file_and_line(tmp_path: Path, line: str) -> None:
    def edit(folder: Path) -> None:
        with (folder / "dev.jsonl").open("a") as stream:
            stream.write(line + "\n")

    with pytest.raises(QualityError, match=r"dev\.jsonl:41: ") as caught:
        run_stage(context(tmp_path, snapshot(), edit=edit))
    assert broken(caught.value) == {("dev", "problem")}


def shifted() -> dict[str, Any]:
    data = snapshot()
    data["corpus"] = data["corpus"][:160]
    for row in data["train"]:
        row["question"] = "How many trees " + "grow in the park and in the garden and by the road " * 4 + row["question"]
    return data


def test_drift_stops_the_stage_until_it_is_accepted(tmp_path: Path) -> None:
    accepted(context(tmp_path, snapshot()))
    with pytest.raises(QualityError, match=r"validation\.drift\.accept=true") as caught:
        run_stage(context(tmp_path, shifted()))
    assert broken(caught.value) == {("drift", "shape")}
    assert "set train, measure chars, before" in str(caught.value)
    assert manifest.load(tmp_path / "artifacts/validated").facts["drift"]["against"] == FIRST, "the accepted snapshot stays"
    found = accepted(context(tmp_path, shifted(), drift={"accept": True}))
    assert {row["set"] for row in found.facts["drift"]["measures"] if row.get("shape", 0) > 0.5} == {"train"}
    assert next(row["rows"] for row in found.facts["drift"]["measures"] if row["measure"] == "rows") == pytest.approx(0.2)
    assert found.counts["warnings"] == 2, "rows of the corpus and the shape of train are reported"
    again = accepted(context(tmp_path, shifted()))
    assert again.counts == found.counts, "what was accepted once stays accepted"


def test_validating_the_same_snapshot_again_gives_the_same_artifact(tmp_path: Path) -> None:
    accepted(context(tmp_path, snapshot()))
    second = accepted(context(tmp_path, shifted(), drift={"accept": True}))
    assert accepted(context(tmp_path, shifted(), drift={"accept": True})).hash == second.hash
    shutil.rmtree(tmp_path / "artifacts/validated")
    assert accepted(context(tmp_path, shifted())).facts["drift"]["against"] == FIRST


def test_a_changed_source_is_reported_and_accepted(tmp_path: Path) -> None:
    accepted(context(tmp_path, snapshot(), "one"))
    found = accepted(context(tmp_path, shifted(), "two"))
    report = json.loads((tmp_path / "artifacts/validated/report.json").read_text())
    assert {item["severity"] for item in report if item["suite"] == "drift"} == {"warning"} and found.counts["warnings"] == 2
