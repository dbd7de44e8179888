"""The runner of the benchmarks keeps what was measured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as runner


def test_a_duel_that_finds_nothing_to_measure_says_so_and_leaves_earlier_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    monkeypatch.setenv("BENCH_WORKSPACE", str(tmp_path / "absent"))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "P18", "--quick"])
    (tmp_path / "P18.json").write_text("measured")
    assert runner.main() == 0
    assert (tmp_path / "P18.json").read_text() == "measured" and not (tmp_path / "P18.png").exists()
    assert capsys.readouterr().err.startswith("P18 measured nothing")
