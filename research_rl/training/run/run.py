"""One training run: what it is made of, who is told of it, and how it ended. Knows folders and names; starts nothing."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from research_rl.config import Config
from research_rl.errors import TrainingError
from research_rl.paths import interpreter_path
from research_rl.process.private import private_folder
from research_rl.retriever.source import Taping
from research_rl.training.run import launch
from research_rl.training.run.checkpoints import Checkpoint
from research_rl.training.run.overrides import Paths
from research_rl.training.run.remote import Store
from research_rl.training.run.watch import Finding

__all__ = ["AttemptOutcome", "Run", "TrainHooks", "interpreter", "ray_folder"]


class TrainHooks:
    """What a caller wants to hear while training runs; each call comes from the supervising thread, in order of steps.

    A run that resumes in a new process repeats the calls of the steps it keeps, so that a fresh listener sees them all.
    """

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Hear a finished step's metrics."""

    def on_rollouts(self, step: int, path: Path) -> None:
        """Hear where a step's episodes lie: gzip, one JSON object a line."""

    def on_checkpoint(self, step: int, path: Path) -> None:
        """Hear of a whole, sealed checkpoint; its folder is removed when newer ones take its place."""

    def on_attempt(self, number: int, resume: int) -> None:
        """Hear that the trainer is started for the `number`-th time, going on from step `resume` (0: from the beginning)."""

    def on_attempt_end(self, number: int, why: str | None) -> None:
        """Hear why a start of the trainer ended, None when all steps are done. Never called when this process is killed."""

    def on_finding(self, finding: Finding, last_good: Checkpoint | None) -> None:
        """Hear of a rule of `watch` whose breach begins or stops the run, and of the last good checkpoint."""


@dataclass(frozen=True)
class Run:
    """One training run: what to train, where to work, whom to search, with which tape. `services` holds the trainer's pid file."""

    config: Config
    paths: Paths
    services: Path
    retriever_url: str
    retriever_token: str | None = None
    store: Store | None = None
    taping: Taping | None = None

    @cached_property
    def launcher(self) -> launch.Launcher:
        """What starts the trainer."""
        return launch.launcher(self.config, self.services, self.retriever_url)

    @property
    def interpreter(self) -> Path:
        """The policy environment's interpreter; on a cluster only its nodes need to have it."""
        if self.config.cluster.launcher == "local":
            return interpreter(self.config)
        return interpreter_path(self.config.environments.policy, "environments.policy")

    @property
    def metrics(self) -> Path:
        """The merged metrics, one line a step."""
        return self.paths.work / "metrics.jsonl"

    @property
    def rollouts(self) -> Path:
        """One compressed file of episodes per step."""
        return self.paths.work / "rollouts"

    @property
    def logs(self) -> Path:
        """One log and one raw metrics file per attempt."""
        return self.paths.work / "logs"


@dataclass
class AttemptOutcome:
    """How a run ended: its last checkpoint, the attempts it took and the trajectories lost on the way."""

    checkpoint: Checkpoint
    attempts: int
    lost: int


def interpreter(config: Config) -> Path:
    """Return the policy environment's interpreter. Raises TrainingError when it is not there, ConfigError when it cannot be."""
    path = interpreter_path(config.environments.policy, "environments.policy")
    if not path.is_file():
        raise TrainingError(f"environments.policy={config.environments.policy!r} does not exist ({path}); run `make setup` or set it")
    return path


def ray_folder(work: Path) -> Path:
    """Return Ray's folder for a work folder: short, since a socket's path may have 107 bytes only, and below one of this user alone.

    Ray gives its own folder mode 0777, and everybody can tell its name. Raises ServiceError when the user's folder is another's.
    """
    own = private_folder(Path(tempfile.gettempdir()) / f"rr-{os.getuid()}")
    return own / hashlib.sha256(str(work).encode()).hexdigest()[:10]
