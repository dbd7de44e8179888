"""The time that is left: from the rate of late, none before there is one, and shown wherever long work reports."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from research_rl import cli
from research_rl.pipeline.remaining import Remaining


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def told(*reports: tuple[float, float]) -> list[float | None]:
    """Return the estimates for reports of (seconds since the one before, share)."""
    clock = Clock()
    remaining, found = Remaining(clock), list[float | None]()
    for seconds, share in reports:
        clock.now += seconds
        left = remaining.seconds(share)
        found.append(None if left is None else round(left, 6))
    return found


def test_there_is_no_estimate_before_there_is_a_rate_and_none_at_the_end() -> None:
    """The trainer takes 150 s to start: its first step says nothing of the pace, the second does."""
    assert told((0, 0.0), (150, 0.1), (20, 0.2), (20, 0.3), (140, 1.0)) == [None, None, 160.0, 140.0, None]


def test_what_an_earlier_run_had_done_is_not_taken_for_speed() -> None:
    """A run that goes on at 50 % has no rate until it advanced itself."""
    assert told((0, 0.5), (150, 0.6), (20, 0.7)) == [None, None, 60.0]


def test_the_rate_of_late_counts() -> None:
    """A fast first half is forgotten after five advances of a minute or more."""
    fast = [(1.0, share / 100) for share in range(1, 51)]
    slow = [(30.0, 0.5 + share / 100) for share in range(1, 8)]
    assert told((0, 0.0), *fast, *slow)[-1] == pytest.approx(30 * 43)


def test_bursts_and_trickles_are_not_taken_for_the_pace() -> None:
    """Twenty questions are asked at once, many end soon and a few late: hours of work were told as 25 minutes and as 14 hours by turns."""
    cells, cell = 20, [*[4.0] * 14, *[100.0] * 6]
    estimates = told((0, 0.0), *[(pause, (at + 1) / (cells * len(cell))) for at, pause in enumerate(cell * (cells // 2))])
    for at, left in enumerate(estimates[1:], start=0):
        if at >= 2 * len(cell):
            truth = sum(cell * cells) * (1 - at / (cells * len(cell)))
            assert left is not None and truth / 2 < left < truth * 2, at


def test_a_unit_that_takes_longer_raises_the_estimate() -> None:
    before, stuck = told((0, 0.0), (10, 0.25), (10, 0.5), (20, 0.5))[-2:]
    assert (before, stuck) == (20.0, 60.0)


def test_a_report_that_knows_no_share_changes_nothing() -> None:
    """Messages such as `starting the model server` carry 0."""
    assert told((0, 0.0), (10, 0.25), (10, 0.0), (10, 0.5), (0, 0.0)) == [None, None, None, 40.0, None]


def test_work_that_is_done_again_has_no_rate_at_first() -> None:
    assert told((0, 0.0), (10, 0.2), (10, 0.4), (5, 0.2), (30, 0.4), (10, 0.6))[3:] == [None, None, 20.0]


def test_many_reports_a_second_are_one_mark_and_bounded() -> None:
    clock = Clock()
    remaining = Remaining(clock)
    for number in range(200_000):
        clock.now += 0.001
        remaining.seconds(number / 400_000)
    assert remaining.seconds(0.5) == pytest.approx(200, rel=0.01)
    assert len(remaining._marks) <= 122


def reported(progress: Callable[[str, float], Any], clock: Clock) -> None:
    for share in (0.0, 0.25, 0.5):
        progress("some passages", share)
        clock.now += 30


def test_the_terminal_says_what_is_left_and_ends_at_100_percent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_QUIET_S", -1.0)
    clock = Clock()
    with cli._Printer("index") as printer:
        printer.remaining = Remaining(clock)
        reported(printer, clock)
    assert capsys.readouterr().err.splitlines() == [
        "index   0% some passages",
        "index  25% some passages",
        "index  50% some passages, about 1 min 0 s left",
        "index 100% done",
    ]


def test_a_rewritten_line_is_ended_when_the_work_fails(capsys: pytest.CaptureFixture[str]) -> None:
    """The error that follows stood behind the last progress, in one line."""
    with suppress(KeyError), cli._Printer("index") as printer:
        printer.terminal = True
        printer("some \x1b]0;passages", 0.5)
        raise KeyError
    assert capsys.readouterr().err == "\r\x1b[2Kindex  50% some \\x1b]0;passages\n"


def test_prefects_progress_and_log_say_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from tasks import stage

    shown = list[tuple[float, str]]()
    monkeypatch.setattr(stage, "_UPDATE_S", -1.0)
    monkeypatch.setattr(stage, "_LOG_S", -1.0)
    monkeypatch.setattr(stage, "create_progress_artifact", lambda share, key, description: shown.append((share, description)) or "id")
    monkeypatch.setattr(stage, "update_progress_artifact", lambda _, progress, description: shown.append((progress, description)))
    clock, logged = Clock(), list[str]()
    progress = stage.Progress("index", logged.append)
    progress.remaining = Remaining(clock)
    reported(progress, clock)
    progress.finish()
    left = "some passages, about 1 min 0 s left"
    assert shown == [(0.0, "some passages"), (25.0, "some passages"), (50.0, left), (100.0, "done")]
    assert logged == ["index 0%: some passages", "index 25%: some passages", f"index 50%: {left}"]
