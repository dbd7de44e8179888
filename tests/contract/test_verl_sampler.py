"""`train.filter_groups` changes what a step is trained on: verl's trainer builds our replay buffer, and a real TransferQueue feeds it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from research_rl.config import Config
from research_rl.paths import CHECKOUT
from research_rl.training.run.overrides import Paths, render
from research_rl.training.run.run import interpreter
from tests.contract.ray_limits import TOO_SLOW

SPREAD, FLAT = [0.0, 1.0], [1.0, 1.0]
REWARDS = {
    "off": [FLAT, SPREAD],
    "on": [FLAT, SPREAD, FLAT, SPREAD, SPREAD],
    "endless": [FLAT] * 99,
}


def config(enabled: bool) -> Config:
    filtering = {"enabled": enabled, "max_batches": 3}
    return Config.model_validate({"train": {"prompts_per_step": 2, "rollouts_per_prompt": 2, "filter_groups": filtering}})


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    work = tmp_path_factory.mktemp("w")
    paths = Paths(*(work / name for name in ("model", "train.parquet", "dev.parquet", "work", "ray")))
    cases = {name: {"overrides": render(config(name != "off"), paths), "rewards": rewards, "batch": 2} for name, rewards in REWARDS.items()}
    script = Path(__file__).with_name("verl_sampler.py")
    env = {**os.environ, "PYTHONPATH": str(CHECKOUT), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [str(interpreter(Config())), str(script)], input=json.dumps(cases), capture_output=True, text=True, env=env, cwd=work
    )
    if f"Ray {TOO_SLOW}" in done.stderr:
        pytest.skip("Ray did not start within its own limits, which this machine is too slow for")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_without_the_filter_a_group_of_equal_rewards_is_trained_on(found: dict[str, Any]) -> None:
    assert found["off"] == {"trained": [0, 1], "metrics": {}, "played": 2}


def test_with_the_filter_further_questions_take_the_place_of_groups_of_equal_rewards(found: dict[str, Any]) -> None:
    """verl refills two questions for one: group 0 goes, groups 2 and 3 come, group 2 goes; of those with a spread two are trained on."""
    on = found["on"]
    assert set(on["trained"]) <= {1, 3, 4} and len(on["trained"]) == 2
    assert on["metrics"]["training/filter_groups/evicted_samples"] == 2


def test_questions_without_any_spread_end_in_an_error_that_names_the_limit(found: dict[str, Any]) -> None:
    assert found["endless"]["played"] == 6, "three batches of two"
    assert "only 0 of the groups of train.filter_groups.max_batches=3 batches differ in reward, 2 are needed" in found["endless"]["error"]
