"""The gate closes for a sick service only, for a bounded time, and says so once; the supervisor's clock leaves that time out."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from research_rl.episode.trajectory import SearchFault
from research_rl.retriever.gate import Note, Patience, PauseGate
from research_rl.training.run import pauses
from research_rl.training.run.pauses import Pauses

PATIENCE = Patience(window_s=5.0, least=3, share=0.5, longest_s=20.0)
SHORT = replace(PATIENCE, longest_s=0.3)


def drive(faults: list[SearchFault | None], well: bool, patience: Patience = PATIENCE) -> tuple[list[Note], int]:
    """Report faults, wait at the gate; return the notes and how often the service was asked meanwhile."""
    notes: list[Note] = []
    asked = 0

    async def probe() -> bool:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0)
        return well

    async def run() -> None:
        gate = PauseGate(probe, patience, notes.append)
        for fault in faults:
            gate.report(fault)
        await gate.wait()
        assert not gate.closed

    asyncio.run(run())
    return notes, asked


def test_it_closes_past_the_share_and_opens_with_the_probe() -> None:
    notes, asked = drive([None, *[SearchFault.TIMEOUT] * 2, SearchFault.GARBAGE], well=True)
    assert [note.event for note in notes] == ["paused", "resumed"]
    assert notes[0].faults == {"timeout": 2, "garbage": 1} and notes[0].searches == 4
    assert asked == 1


def test_a_death_after_many_answers_is_seen_at_once() -> None:
    notes, _ = drive([*[None] * 50, *[SearchFault.UNREACHABLE] * 3], well=True)
    assert [(note.event, note.searches) for note in notes] == [("paused", 53), ("resumed", 53)]


def test_it_gives_up_in_bounded_time() -> None:
    notes, asked = drive([SearchFault.UNREACHABLE] * 3, well=False, patience=SHORT)
    assert [note.event for note in notes] == ["paused", "gave_up"] and asked >= 1
    assert notes[1].at - notes[0].at > 0.25


@pytest.mark.parametrize(
    "faults",
    [
        [SearchFault.TIMEOUT] * 2,
        [None, SearchFault.TIMEOUT] * 3,
        [SearchFault.EMPTY_QUERY, SearchFault.NOTHING, SearchFault.REFUSED] * 3,
    ],
)
def test_few_failures_and_the_models_own_close_nothing(faults: list[SearchFault | None]) -> None:
    assert drive(faults, well=False) == ([], 0)


def test_what_lies_before_the_window_is_forgotten() -> None:
    async def run() -> bool:
        gate = PauseGate(_never, Patience(window_s=0.05, least=3, share=0.5, longest_s=9.0), lambda note: None)
        gate.report(SearchFault.TIMEOUT)
        gate.report(SearchFault.TIMEOUT)
        await asyncio.sleep(0.1)
        gate.report(SearchFault.TIMEOUT)
        return gate.closed

    assert asyncio.run(run()) is False


def test_only_faults_of_the_service_count() -> None:
    own = {SearchFault.EMPTY_QUERY, SearchFault.NOTHING, SearchFault.REFUSED}
    assert {fault for fault in SearchFault if not fault.is_service} == own
    for fault in SearchFault:
        notes, _ = drive([fault] * 3, well=True)
        assert bool(notes) is fault.is_service, fault


async def _never() -> bool:
    return False


def test_a_pause_of_several_workers_counts_once_and_one_without_end_is_bounded(tmp_path: Path) -> None:
    now = time.time()
    pauses.append(tmp_path, Note("paused", now - 10, {"timeout": 3}, 3))
    pauses.append(tmp_path, Note("resumed", now - 6, {"timeout": 3}, 3))
    (tmp_path / "other-7.jsonl").write_text(f'{{"event": "paused", "at": {now - 8}}}\n')
    seen = Pauses(tmp_path, longest_s=3.0)
    assert [note["event"] for note in seen.news()] == ["paused", "paused", "resumed"]
    assert seen.news() == []
    assert seen.seconds(now - 60, now) == pytest.approx(5.0)
    assert seen.seconds(now - 7, now) == pytest.approx(2.0)
    assert seen.seconds(now, now) == 0.0
