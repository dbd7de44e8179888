"""What stands at the end of a run by hand: the result and what to open, and no link to a server that ended with the run."""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

import pytest
from results import played

from research_rl.errors import ManifestError
from research_rl.evaluation.results import write_results
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace
from research_rl.report.closing import closing
from tasks import quiet

DIFFERENCE = {"mean": 0.5, "low": 0.25, "high": 0.625, "n": 64}


def test_the_closing_lines_give_result_pages_and_a_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = Workspace(tmp_path)
    with pytest.raises(ManifestError):
        closing(space)
    with manifest.publish(space.folder("report"), "report", "x", {}) as staging:
        staging.facts |= {"before": {"f1": 0.25}, "after": {"f1": 0.75}, "difference": {"f1": DIFFERENCE}}
    with manifest.publish(space.folder("evaluate"), "evaluate", "x", {}) as staging:
        long, right = "Who " * 51 + "?", "Who's the founder of `Aldmoor` Mill?"
        rows = [played(0, "Bo", question="Missed?"), played(1, "Ada", question=long), played(2, "Ada", question=right)]
        write_results(staging.path, rows)
    monkeypatch.chdir(tmp_path)
    result, pages, command = closing(space)
    assert result.endswith(
        "F1 0.250 before and 0.750 after training, difference +0.500 (95 % interval +0.250 to +0.625, 64 held-out questions)"
    )
    assert pages.partition(";")[0].split()[1::2] == ["artifacts/report/report.html", "artifacts/report/trajectories.html"]
    assert "README.md" in pages
    typed = shlex.split(command.removeprefix("try:"))
    assert typed[-3:] == ["research", "ask", right], "a real question that the policy answers, as one word of the shell"
    assert not any("://" in line for line in (result, pages, command))


def test_a_run_without_a_lasting_server_logs_no_link_to_it(caplog: pytest.LogCaptureFixture) -> None:
    name = quiet.LOGGERS[0]
    logger = logging.getLogger(name)
    before = list(logger.filters)
    try:
        quiet.install(quiet.WithoutLink)
        quiet.install(quiet.WithoutLink)
        assert len(logger.filters) == len(before) + 1, "installed once, however often it is asked for"
        with caplog.at_level(logging.INFO, name):
            logger.addHandler(caplog.handler)
            logger.info("View at %s", "http://127.0.0.1:4200/runs/1")
            logger.info("Finished; view at leisure")
        assert [record.getMessage() for record in caplog.records if record.name == name][-1] == "Finished; view at leisure"
        assert not any("4200" in record.getMessage() for record in caplog.records)
    finally:
        logger.removeHandler(caplog.handler)
        for each in map(logging.getLogger, quiet.LOGGERS):
            each.filters = [item for item in each.filters if item in before or not isinstance(item, quiet.WithoutLink)]
