"""Two real steps of training for every choice of advantage, loss, correction and filter, and one in a folder with an awkward name."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from research_rl.pipeline.stages import Workspace
from research_rl.training.run.rollouts import read_rollouts, rollout_files
from tests.training import Training, workspace

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
SIZE = (
    *(f"policy.{item}" for item in ("hidden=64", "layers=2", "warmup_steps=60")),
    # The bonus for entropy moves the weights whatever these few episodes earn.
    *(f"train.{item}" for item in ("steps=2", "prompts_per_step=2", "rollouts_per_prompt=4", "lr=1e-3", "entropy_coef=0.1")),
    "trainer.save_every=1",
    "trainer.step_deadline_s=600",
)
AWKWARD = "é研究 ()[]{},=#'&!;~"
# Rollouts cut off at the limit all have the same length: some groups have a spread, some have none.
BY_LENGTH = "reward={rule: composed, terms: [{kind: length, weight: 1, target: 96}]}"
CHOICES: dict[str, list[str]] = {
    "dr_grpo, clip-higher": ["train.advantage=dr_grpo", "train.loss_mean=seq-mean-token-sum-norm", "train.clip_ratio_high=0.28"],
    "gspo, rloo, token TIS": ["train.loss=gspo", "train.advantage=rloo", "train.clip_ratio=0.0003", "train.rollout_correction.method=tis"],
    "cispo, opo, IcePop": ["train.loss=cispo", "train.advantage=opo", "train.rollout_correction.method=icepop"],
    "sapo": ["train.loss=sapo"],
    "geo_mean, sequence TIS": ["train.loss=geo_mean", "train.rollout_correction={method: tis, level: sequence, normalise: true}"],
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workspace, bytes]:
    """What comes before training, and the parameters it was built with."""
    space = workspace(tmp_path_factory.mktemp("knobs") / AWKWARD, *SIZE)
    return space, (space.root / "params.yaml").read_bytes()


@pytest.fixture
def space(built: tuple[Workspace, bytes]) -> Workspace:
    """Return the workspace without the choices of the test before, which its training wrote to params.yaml."""
    space, parameters = built
    (space.root / "params.yaml").write_bytes(parameters)
    return space


def trained(space: Workspace, *overrides: str) -> list[dict[str, Any]]:
    """Train and return the metrics of the steps."""
    training = Training(space, *overrides)
    assert training.process.wait(3000) == 0, training.said()
    return [json.loads(line)["metrics"] for line in (space.folder("train") / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CHOICES)
def test_two_steps_are_trained(name: str, space: Workspace) -> None:
    rows = trained(space, *CHOICES[name])
    assert len(rows) == 2
    assert all(math.isfinite(row["actor/grad_norm"]) and row["actor/grad_norm"] > 0 for row in rows)
    corrected = [metric for metric in rows[-1] if metric.startswith("rollout_corr/rollout_is_")]
    assert bool(corrected) == ("TIS" in name or "IcePop" in name), "weights are computed where they are asked for"


def test_dynamic_sampling_plays_further_questions(space: Workspace) -> None:
    rows = trained(space, BY_LENGTH, "train.filter_groups.enabled=true", "train.rollouts_per_prompt=2")
    episodes = list(read_rollouts(rollout_files(space.folder("train"))))
    for step, row in enumerate(rows, 1):
        groups: dict[str, set[float]] = {}
        for episode in (episode for episode in episodes if episode["step"] == step):
            groups.setdefault(episode["uid"], set()).add(episode["score"])
        flat = sum(len(scores) == 1 for scores in groups.values())
        assert row["episode/filtered_groups"] == pytest.approx(flat / len(groups)), "every group of equal rewards was left out"
        surplus = round(row["episode/surplus_groups"] * len(groups))
        assert len(groups) - flat - surplus == 2, "and a whole step of groups with a spread was trained on"
