"""No text of the data becomes markup or a command: on every page that is written or linked to, and on the terminal."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from urllib.parse import unquote

import pytest

from research_rl.cli import main
from research_rl.config import Config
from research_rl.validation.docs import SUMMARY
from research_rl.validation.questions import COLUMNS
from research_rl.validation.suites import Frame, check, drift_frame, question_frame, schema_frame
from tests.unit.test_report import Page, evaluation, result

ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e"
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)><svg/onload=alert(3)>"
HOSTILE = f"{MARKUP}\"'><iframe src=javascript:alert(4)></iframe> $x ${{y}} {{{{7*7}}}} {ESCAPE}"
ACTIVE = {"iframe", "svg", "object", "embed", "base"}


def frames() -> list[Frame]:
    """Return suites whose every data-borne value is hostile and breaks an expectation, each with a severity of its own."""
    row = {**dict.fromkeys(COLUMNS, 1), "id": HOSTILE, "text": HOSTILE, "note": HOSTILE}
    passage = {"id": HOSTILE, "contents": HOSTILE}
    moved = {**dict.fromkeys(("set", "measure", "before", "after"), HOSTILE), **dict.fromkeys(("rows", "shape", "vocabulary"), 5.0)}

    def sampled(e: object) -> list[object]:
        return [
            e.ExpectColumnValuesToBeUnique(column="id", severity="critical"),
            e.ExpectColumnValueLengthsToBeBetween(column="contents", min_value=9000, severity="warning"),
            e.ExpectColumnValuesToMatchRegex(column="contents", regex="none", severity="critical"),
            e.ExpectColumnValuesToBeBetween(column="contents", max_value=0, severity="warning"),
        ]

    limits = Config().validation
    return [
        question_frame("train", [{name: row[name] for name in COLUMNS}] * 2, limits),
        schema_frame("dev", f"{HOSTILE}.jsonl:3: {HOSTILE}"),
        Frame("corpus sample", [passage] * 2, sampled, ("id", "contents")),
        drift_frame([moved], limits.drift, True),
    ]


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data docs of hostile data."""
    folder = tmp_path_factory.mktemp("docs") / "data-docs"
    logging.disable(logging.ERROR)
    checks = check(frames(), folder)
    logging.disable(logging.NOTSET)
    assert sum(not item.passed for item in checks) > 10
    return folder


def test_no_page_of_the_data_docs_holds_markup_of_the_data(docs: Path) -> None:
    pages = {path.relative_to(docs).as_posix(): path.read_text() for path in docs.rglob("*.html")}
    assert {name.split("/")[0] for name in pages} == {"expectations", "validations", "index.html", SUMMARY}
    for name, text in pages.items():
        page = Page(text)
        assert not ACTIVE & set(page.tags), name
        assert not [address for address in page.addresses if "alert" in address], name
        assert not [script for _, script in page.scripts if script.startswith("alert")], name
        assert MARKUP not in text, name


def test_no_script_runs_on_a_page_of_the_data_docs_whatever_stands_in_it(docs: Path) -> None:
    for path in docs.rglob("*.html"):
        policy = Page(path.read_text()).policy
        assert "default-src 'none'" in policy and "script-src 'unsafe" not in policy, path


def test_the_summary_links_every_suite_and_shows_the_rows_as_text(docs: Path) -> None:
    page = Page((docs / SUMMARY).read_text())
    assert len(page.addresses) == 4 and all((docs / unquote(address)).is_file() for address in page.addresses)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in (docs / SUMMARY).read_text()
    assert not page.scripts


def test_comparing_evaluations_prints_no_control_character_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / f"{name}{MARKUP.replace('/', '')}{ESCAPE}" for name in "ab"]
    for folder, answer in zip(folders, (f"Bob{ESCAPE}", "Ada"), strict=True):
        results = [result(row, answer) for row in range(4)]
        for item in results:
            object.__setattr__(item, "question", item.question + ESCAPE)
        evaluation(folder, results, data={"corpus": HOSTILE + folder.name[0]})
    assert main(["compare", *map(str, folders), "--html", str(tmp_path / "page.html")]) == 0
    printed = capsys.readouterr().out
    assert "Question 0?" in printed and not set(printed) & set("\x1b\x07\u202e")
    page = Page((tmp_path / "page.html").read_text())
    assert not page.scripts and not page.addresses and not ACTIVE & set(page.tags)


def test_an_error_prints_no_control_character_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path / f"a{ESCAPE}"), str(tmp_path)]) == 1
    printed = capsys.readouterr().err
    assert "nor the label" in printed and not set(printed) & set("\x1b\x07\u202e")


def test_a_state_prints_no_control_character_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / f"w{ESCAPE}"
    assert main(["init", "-w", str(folder)]) == 0
    (folder / "data").mkdir()
    (folder / "data" / "manifest.json").write_text(json.dumps({"seal": 1}))
    assert main(["status", "-w", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "torn" in printed and not set(printed) & set("\x1b\x07\u202e")
