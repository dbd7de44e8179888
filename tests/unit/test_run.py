"""The runner of the tiers: every tier runs although one fails, and its table and exit code tell which."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import run

SUITE = "import pytest\ndef test_right(): pass\ndef test_wrong(): assert {wrong}\n@pytest.mark.skip\ndef test_skipped(): pass\n"


def tiers(folder: Path, *, wrong: bool) -> dict[str, list[list[str]]]:
    for name, text in (("first", SUITE.format(wrong=not wrong)), ("second", SUITE.format(wrong=True))):
        (folder / name).mkdir()
        (folder / name / "test_it.py").write_text(text)
    suites = {name: [[sys.executable, "-m", "pytest", "-c", "/dev/null", str(folder / name)]] for name in ("first", "second")}
    return {"lint": [[sys.executable, "-c", f"raise SystemExit({int(wrong)})"], [sys.executable, "-c", ""]], **suites}


@pytest.mark.parametrize(
    ("wrong", "lines"),
    [
        (True, ["lint 1 1 0", "first 1 1 1", "second 2 0 1", "all 4 2 2"]),
        (False, ["lint 2 0 0", "first 2 0 1", "second 2 0 1", "all 6 0 2"]),
    ],
)
def test_every_tier_runs_and_is_in_the_table(
    wrong: bool, lines: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(run, "TIERS", tiers(tmp_path, wrong=wrong))
    assert run.main([]) == int(wrong)
    written = capfd.readouterr().out.splitlines()
    assert [" ".join(line.split()[:4]) for line in written[-4:]] == lines
    assert any("2 passed, 1 skipped" in line for line in written), "pytest's own closing line stays"


def test_an_unknown_tier_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["unti"]) == 2
    assert f"unknown tier unti; the tiers are {', '.join(run.TIERS)}" in capsys.readouterr().err


def test_what_the_time_is_not_enough_for_is_named_and_counts_as_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    waits, fails = ([sys.executable, "-c", code] for code in ("import time; time.sleep(600)", "raise SystemExit(1)"))
    monkeypatch.setattr(run, "TIERS", {"first": [waits], "second": [fails]})
    assert run.main(["--minutes", "0.02"]) == 0
    written = capfd.readouterr().out.splitlines()
    assert [" ".join(line.split()[:4]) for line in written[-4:-2]] == ["first 0 0 0", "second 0 0 0"]
    assert written[-1] == "the time was up: not run, or not to the end: first, second"


def test_tiers_whose_tests_wait_are_one_command_and_one_row_when_named_together() -> None:
    plan = run.planned(["lint", "unit", "contract", "fault", "flow"])
    assert list(plan) == ["lint", "unit", "flow+contract+fault"]
    assert plan["flow+contract+fault"][0][-3:] == ["tests/flow", "tests/contract", "tests/fault"]
    assert run.planned(["long", "contract"]) == {"long": run.TIERS["long"], "contract": run.TIERS["contract"]}


def test_lint_runs_beside_the_tier_after_it_and_is_shown_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each waits for a file of the other's."""
    waits = "import sys, time, pathlib; me, other = map(pathlib.Path, sys.argv[2:]); me.touch()\n"
    waits += "while not other.exists(): time.sleep(0.01)\nprint(sys.argv[1], 'met')"
    files = [str(tmp_path / name) for name in ("a", "b")]
    lint, first = ([sys.executable, "-c", waits, name, *order] for name, order in (("lint", files), ("first", files[::-1])))
    monkeypatch.setattr(run, "TIERS", {"lint": [lint], "first": [first]})
    assert run.main(["--minutes", "2"]) == 0
    written = capfd.readouterr().out.splitlines()
    assert [line for line in written if line.startswith(("==", "lint met", "first met"))] == [
        "== first",
        "first met",
        "== lint",
        "lint met",
    ]
    assert [" ".join(line.split()[:4]) for line in written[-3:]] == ["lint 1 0 0", "first 1 0 0", "all 2 0 0"]
