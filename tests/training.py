"""A real training small enough to be broken many times: `research run train` as a user starts it, and what it has on disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from research_rl import config
from research_rl.paths import CHECKOUT
from research_rl.pipeline.run import run_stage
from research_rl.pipeline.stages import Workspace
from research_rl.training.run.metrics_log import MetricsLog

SMALLEST: dict[str, Any] = {
    "data.generated.entities": 60,
    "data.generated.train_questions": 64,
    "data.generated.dev_questions": 8,
    "data.generated.test_questions": 16,
    "policy.hidden": 64,
    "policy.layers": 2,
    "policy.warmup_steps": 60,
    "train.steps": 3,
    "train.prompts_per_step": 4,
    "train.rollouts_per_prompt": 4,
    "trainer.micro_batch": 8,
    "trainer.save_every": 1,
    "evaluation.rows": 8,
    "evaluation.bootstrap": 100,
    "episode.max_response_tokens": 128,
    "episode.max_result_tokens": 64,
}
"""The whole chain of the laptop profile at the smallest size that still trains, saves and measures."""
SMALL = (
    *(f"data.generated.{item}" for item in ("entities=60", "train_questions=512", "dev_questions=8", "test_questions=16")),
    *(f"episode.{item}" for item in ("max_response_tokens=96", "max_result_tokens=48")),
    "trainer.micro_batch=8",
    "trainer.step_deadline_s=60",
    # These policies earn next to no reward, which these rules would rightly stop.
    *(f"watch.{rule}.action=warn" for rule in ("reward_spread", "no_signal", "answered", "cut_off", "searches", "response_short")),
)
BEFORE_TRAINING = ("download", "validate", "prepare", "corpus", "embed", "index", "policy")


def sections(**values: Any) -> dict[str, dict[str, Any]]:
    """Return values of `train` and `trainer`, given by bare name, as those two sections."""
    trainer = {name: value for name, value in values.items() if name in config.TrainerConfig.model_fields}
    return {"train": {name: value for name, value in values.items() if name not in trainer}, "trainer": trainer}


def workspace(root: Path, *overrides: str) -> Workspace:
    """Return a workspace with every stage before training."""
    root.mkdir()
    space = Workspace(root)
    resolved = config.load_profile("laptop", [*SMALL, *overrides])
    config.save(resolved, root / "params.yaml")
    for name in BEFORE_TRAINING:
        run_stage(name, resolved, space)
    return space


class Training:
    """One training; `overrides` are those of its call."""

    def __init__(self, space: Workspace, *overrides: str) -> None:
        self.space, self.overrides = space, overrides
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start or resume it."""
        command = [sys.executable, "-m", "research_rl", "run", "train", "-w", str(self.space.root), *self.overrides]
        with (self.space.root / "driver.log").open("ab") as log:
            return subprocess.Popen(command, cwd=CHECKOUT, stdout=log, stderr=subprocess.STDOUT)

    @property
    def work(self) -> Path:
        """Where the unfinished run lies."""
        return next(iter(self.space.root.glob("artifacts/.work/train-*")), self.space.root / "none")

    def said(self) -> str:
        """Return the end of what it printed."""
        return (self.space.root / "driver.log").read_text()[-3000:]

    def logged(self) -> int:
        """Return the last step that is on disk."""
        return MetricsLog(self.work / "metrics.jsonl").last

    def members(self, word: str) -> list[psutil.Process]:
        """Return its processes whose command line holds `word`."""
        found: list[psutil.Process] = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if word in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found
