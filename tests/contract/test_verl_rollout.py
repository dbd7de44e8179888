"""Our agent workers put into TransferQueue what verl's own put, in fewer sendings and with one loop for all episodes."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from research_rl.config import Config
from research_rl.paths import CHECKOUT
from research_rl.training.run.run import interpreter

UNREAD = {"raw_prompt", "extra_info", "index"}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    script = Path(__file__).with_name("verl_rollout.py")
    command = [str(interpreter(Config())), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(CHECKOUT)})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def rows(puts: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[Any, Any]]:
    return {
        (put["partition"], key): (tag, row) for put in puts for key, tag, row in zip(put["keys"], put["tags"], put["rows"], strict=True)
    }


def test_the_trainer_finds_the_same_trajectories_with_the_same_tags(found: dict[str, Any]) -> None:
    verls, ours = rows(found["verl"]["put"]), rows(found["ours"]["put"])
    assert verls.keys() == ours.keys() and len(ours) == 10
    for name, (tag, row) in verls.items():
        assert ours[name][0] == tag
        assert ours[name][1] == {field: value for field, value in row.items() if field not in UNREAD}


def test_finished_trajectories_leave_together(found: dict[str, Any]) -> None:
    assert [len(put["keys"]) for put in found["verl"]["put"]] == [1] * 10
    assert [len(put["keys"]) for put in found["ours"]["put"]] == [5, 5]


def test_one_loop_plays_all_episodes(found: dict[str, Any]) -> None:
    assert (found["verl"]["made"], found["ours"]["made"]) == (10, 1)


def test_the_only_server_is_asked_for_once_and_never_given_back(found: dict[str, Any]) -> None:
    assert found["balancer"] == {"servers": [["s", "handle"]] * 4, "asked": 1, "told": 0}
