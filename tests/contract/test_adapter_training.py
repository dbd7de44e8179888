"""Two real steps of training a low-rank adapter, and its merge: only adapted weights differ from the policy's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from research_rl import config
from research_rl.pipeline.run import run_stage
from research_rl.serving.tensors import floats, tensors
from tests.training import Training, workspace

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
SIZE = (
    *(f"policy.{item}" for item in ("hidden=64", "layers=2", "warmup_steps=60")),
    # The bonus for entropy moves the weights whatever these few episodes earn.
    *(f"train.{item}" for item in ("steps=2", "prompts_per_step=2", "rollouts_per_prompt=4", "lr=1e-2", "entropy_coef=0.1")),
    "trainer.save_every=1",
    "train.lora_rank=4",
    "train.lora_alpha=8",
)


def test_an_adapter_is_trained_and_merged(tmp_path: Path) -> None:
    space = workspace(tmp_path / "adapter", *SIZE)
    training = Training(space)
    assert training.process.wait(900) == 0, training.said()
    made, _ = run_stage("export", config.load(space.root / "params.yaml"), space)
    assert made.facts["loaded"] == "generated, all scores finite"
    before, after = tensors(space.folder("policy")), tensors(space.folder("export"))
    moved = {name for name in before if np.any(floats(before[name]) != floats(after[name]))}
    assert moved == {name for name in before if "_proj." in name}
