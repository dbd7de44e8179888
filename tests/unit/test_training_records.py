"""Metrics have each step once; episodes sum up to metrics, and a crash leaves no half line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from research_rl.episode.trajectory import Author, SearchRecord, Segment, StopReason, Trajectory
from research_rl.reward.rules import grade
from research_rl.training.run import episodes
from research_rl.training.run.metrics_log import MetricsLog, Tail, numbers, parsed


def test_a_step_done_again_replaces_and_no_step_is_missing(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.put(step, {"reward": float(step)})
    log.rewind(1)
    assert log.missing(3) == [2, 3]
    log.put(2, {"reward": 20.0})
    again = MetricsLog(tmp_path / "metrics.jsonl")
    assert [(step, row["reward"]) for step, row in again.rows.items()] == [(1, 1.0), (2, 20.0)]
    assert again.last == 2


def test_tail_returns_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path)
    assert tail.lines() == []
    path.write_bytes(b"one\ntw")
    assert tail.lines() == ["one"]
    with path.open("ab") as stream:
        stream.write(b"o\nthree\n")
    assert tail.lines() == ["two", "three"]
    assert tail.lines() == []


@pytest.mark.parametrize("torn", ['{"step": 3, "da', "", "7", '{"step": 3}', '{"data": {}}', '{"step": "3", "data": {}}'])
def test_a_torn_line_of_metrics_is_none(torn: str) -> None:
    assert parsed(torn) is None
    assert parsed('{"step": 3, "data": {"a": 1}}') == {"step": 3, "data": {"a": 1}}


def test_numbers_drops_texts_nulls_and_infinities() -> None:
    assert numbers({"a": 1, "b": 0.5, "c": None, "d": "x", "e": float("nan"), "f": float("inf"), "g": True}) == {"a": 1.0, "b": 0.5}


def play(text: str, stop: StopReason, searches: int = 0, eos: bool = True) -> Trajectory:
    ids = tuple(range(len(text)))
    segments = [Segment(Author.MODEL, ids, (0.0,) * len(ids), text)]
    records = [SearchRecord("q", ("p",), 0.1) for _ in range(searches)]
    return Trajectory((1, 2), segments, records, stop, eos)


def rows(folder: Path) -> list[dict[str, Any]]:
    right = "<think>a</think><answer>\\boxed{Nile}</answer>"
    plays = [("q1", 0, right, StopReason.ANSWERED), ("q1", 1, "no", StopReason.MALFORMED), ("q2", 0, "x", StopReason.TOKEN_LIMIT)]
    for name, rollout, text, stop in reversed(plays):
        trajectory = play(text, stop, searches=2)
        graded = grade(trajectory, ["Nile"], "repository", "</s>")
        row = {"id": name, "uid": f"u-{name}", "rollout": rollout, **episodes.record(trajectory, graded)}
        episodes.append(folder, 7, "train", row)
    return episodes.gather(folder, 7)


def test_episodes_come_back_in_order_and_sum_up(tmp_path: Path) -> None:
    found = rows(tmp_path)
    assert [(row["id"], row["rollout"]) for row in found] == [("q1", 0), ("q1", 1), ("q2", 0)]
    metrics = episodes.summarise(found)
    assert metrics["episode/reward"] == pytest.approx(1 / 3)
    assert metrics["episode/searches"] == 2.0
    assert metrics["episode/mixed_groups"] == 0.5
    assert episodes.losses(found, prompts=2, group=2) == {"episode/lost": 1.0, "episode/lost_groups": 1.0}
    assert sum(metrics[f"episode/stop/{reason}"] for reason in StopReason) == pytest.approx(1.0)


def test_workers_of_two_nodes_with_one_process_id_write_files_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("node-a", "node-b"):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        episodes.append(tmp_path, 7, "train", {"id": host, "uid": "u", "rollout": 0})
    assert len(list((tmp_path / "train" / "000007").iterdir())) == 2
    assert [row["id"] for row in episodes.gather(tmp_path, 7)] == ["node-a", "node-b"]


def test_a_line_cut_by_a_crash_is_left_out(tmp_path: Path) -> None:
    rows(tmp_path)
    part = next((tmp_path / "train" / "000007").iterdir())
    part.write_bytes(part.read_bytes() + b'{"id": "q3", "rol')
    assert len(episodes.gather(tmp_path, 7)) == 3


def test_later_episodes_are_forgotten_and_validation_stays_apart(tmp_path: Path) -> None:
    found = rows(tmp_path)
    episodes.append(tmp_path, 7, "dev", {**found[0], "id": "dev"})
    assert all(row["id"] != "dev" for row in episodes.gather(tmp_path, 7))
    episodes.discard_after(tmp_path, 6)
    assert episodes.steps(tmp_path) == []
    assert json.dumps(episodes.summarise([])) == "{}"
