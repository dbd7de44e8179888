"""A night is measured once, compared with the accepted one, and accepted unless it fell."""

from __future__ import annotations

from pathlib import Path

import pytest

from research_rl.evaluation import cells, night
from research_rl.evaluation.evaluate import write_evaluation
from research_rl.evaluation.named import folder
from research_rl.evaluation.night import Night
from research_rl.evaluation.results import Result
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import Workspace, silent
from tests.results import CONFIG, lost, played
from tests.unit.test_gate_run import COUNT, Ring, questions, ring, tokenizer

__all__ = ["ring", "tokenizer"]


def measured(ring: Ring, name: str) -> Night:
    config = ring.config()
    model = cells.model(str(ring.workspace.root / name), config, ring.workspace)
    return night.measure(config, ring.workspace, model, silent)


def test_nights_are_measured_once_and_a_fall_is_not_accepted(ring: Ring) -> None:
    first = measured(ring, "fair")
    assert first.fresh and first.against is None and night.accepted(ring.workspace) == first.folder
    assert ring.asked("fair") == COUNT
    assert not measured(ring, "fair").fresh and ring.asked("fair") == COUNT, "nothing changed, so nothing is asked"
    fallen = measured(ring, "bad")
    assert fallen.regressed == ["even", "odd"] and fallen.against == first.folder.name
    assert all(drift.high < 0 and drift.n == COUNT // 2 for drift in fallen.drifts)
    assert night.accepted(ring.workspace) == first.folder, "a fall is not what later nights are compared with"
    risen = measured(ring, "good")
    assert risen.regressed == [] and risen.against == first.folder.name and night.accepted(ring.workspace) == risen.folder
    night.accept(ring.workspace, fallen)
    assert night.accepted(ring.workspace) == fallen.folder, "a person may accept what fell"


def test_a_night_asks_nothing_that_a_gate_has_asked(ring: Ring) -> None:
    ring.meet("good", "bad")
    before = ring.asked("good")
    measured(ring, "good")
    assert before < COUNT == ring.asked("good")


def asks(ring: Ring, **names: object) -> None:
    """Put other prepared questions into the workspace."""
    with manifest.publish(ring.workspace.folder("prepare"), "prepare", str(names), {}) as staging:
        questions(staging.path, **names)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "unknown"),
    [
        ({"text": "another question number {n}."}, ("even", "odd")),
        ({"sources": ("even",)}, ("odd",)),
        ({"sources": ("even", "odd"), "few": 9}, ("odd",)),
    ],
)
def test_a_night_that_compares_nothing_is_no_night_without_a_fall(ring: Ring, names: dict[str, object], unknown: tuple[str, ...]) -> None:
    first = measured(ring, "fair")
    asks(ring, **names)
    second = measured(ring, "fair")
    assert second.fresh and second.against == first.folder.name and second.regressed == []
    assert second.unknown == unknown and second.verdict == f"no fall; not comparable on {', '.join(unknown)}"
    assert night.accepted(ring.workspace) == first.folder, "what later nights are compared with stays"
    night.accept(ring.workspace, second)
    assert measured(ring, "good").against == second.folder.name and night.accepted(ring.workspace) != first.folder


def kept(workspace: Workspace, name: str, results: list[Result]) -> Night:
    """Publish these results as a night and compare it."""
    target = workspace.root / "artifacts" / "nights" / name
    with manifest.publish(target, night.STAGE, name, {}, {"model": name}) as staging:
        write_evaluation(staging, CONFIG, results, {})
    return night._compared(CONFIG, workspace, target, fresh=True)


def moved(sets: int, falls: int) -> tuple[list[Result], list[Result]]:
    """Return two nights of 20 questions a set; in the first set so many answers became wrong, and none right."""
    places = [(number, row) for number in range(sets) for row in range(20)]
    before = [played(number * 20 + row, "Ada", source=f"set {number}") for number, row in places]
    after = [played(number * 20 + row, "Bob" if number == 0 and row < falls else "Ada", source=f"set {number}") for number, row in places]
    return before, after


@pytest.mark.parametrize(("sets", "falls", "fell"), [(1, 6, True), (4, 6, False), (4, 9, True), (1, 0, False)])
def test_false_alarms_are_held_over_the_sets_together(tmp_path: Path, sets: int, falls: int, fell: bool) -> None:
    # Six of six against: 2 / 2^6 = 0.031, which is above 0.05 when it is one of four. Nine of nine: 0.004 and 0.016.
    workspace = Workspace(tmp_path)
    before, after = moved(sets, falls)
    night.accept(workspace, kept(workspace, "first", before))
    found = kept(workspace, "second", after)
    assert found.regressed == (["set 0"] if fell else []) and found.unknown == ()
    first = found.drifts[0]
    assert first.p == pytest.approx(min(1.0, sets * 2 / 2**falls), abs=0.02)


def test_an_accepted_night_of_another_version_is_not_comparable(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    before, after = moved(1, 0)
    first = kept(workspace, "first", before)
    night.accept(workspace, first)
    path, facts = first.folder / "results.jsonl", first.manifest.facts
    text = "".join(f'{line[:-1]}, "more": 1}}\n' for line in path.read_text().splitlines())
    with manifest.publish(first.folder, night.STAGE, "first", {}, {"model": "first"}) as staging:
        write_evaluation(staging, CONFIG, before, {})
        (staging.path / "results.jsonl").write_text(text)
        staging.facts |= facts
    assert kept(workspace, "second", after).unknown == ("set 0",)


def test_nights_are_named_by_their_folders(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    found = kept(workspace, "after-0123", [lost(0)])
    for name in ("after-0123", found.manifest.hash[:8]):
        assert folder(name, workspace, lambda _: []) == found.folder
