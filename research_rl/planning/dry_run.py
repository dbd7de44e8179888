"""Show what a training run would do, completely, without doing it. Reads configuration; writes and starts nothing that lasts.

Everything shown is what would be used: our parameters, verl's overrides as they are passed, and the configuration verl itself
composes and validates from them in the policy environment.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from research_rl import config as configuration
from research_rl.config import Config, located
from research_rl.errors import TrainingError
from research_rl.paths import RUN_FROM, python_path
from research_rl.pipeline.stages import Workspace
from research_rl.planning import paper
from research_rl.planning.paper import PaperParameter
from research_rl.planning.plan import describe
from research_rl.training.run import overrides
from research_rl.training.run.run import interpreter, ray_folder

__all__ = ["DryRun", "compose", "dry_run"]


@dataclass(frozen=True)
class DryRun:
    """A resolved run: `hydra` is what verl understood, `compared` holds it against the paper."""

    config: Config
    plan: str
    arguments: list[str]
    agent: str
    hydra: dict[str, Any]
    compared: list[PaperParameter]

    @property
    def summary(self) -> str:
        """One sentence on how far the run is from the paper."""
        differing = [item for item in self.compared if not item.equal]
        unexplained = [item.parameter.name for item in self.compared if item.unexplained]
        named = f": {', '.join(unexplained)}" if unexplained else ""
        return (
            f"{len(self.compared)} hyperparameters: {len(self.compared) - len(differing)} as stated, {len(differing)} differ, "
            f"{len(unexplained)} of them without a reason{named}"
        )

    def text(self) -> str:
        """Return everything as markdown."""
        parts = {
            "Plan": f"```\n{self.plan}\n```",
            "Against arXiv 2503.19470 and its scripts": f"{self.summary}\n\n{paper.table(self.compared)}",
            "Parameters": f"```yaml\n{configuration.dump(self.config)}```",
            "Agent loop": f"```yaml\n{self.agent}```",
            "Overrides of verl": "```\n" + "\n".join(self.arguments) + "\n```",
            "verl's configuration, resolved": f"```yaml\n{yaml.safe_dump(self.hydra, sort_keys=True, width=120)}```",
        }
        return "\n\n".join([f"# Dry run of profile {self.config.profile}", *(f"## {name}\n\n{body}" for name, body in parts.items())])


def dry_run(config: Config, workspace: Workspace) -> DryRun:
    """Resolve a run. Raises ConfigError when it cannot fit, TrainingError when verl refuses its configuration."""
    plan, prepared = describe(config, workspace), workspace.folder("prepare")
    work = workspace.work("train")
    # Paths as the stage would use them; none has to exist, and nothing is made.
    paths = overrides.Paths(workspace.folder("policy"), prepared / "train.parquet", prepared / "dev.parquet", work, ray_folder(work))
    arguments = overrides.render(config, paths)
    hydra = compose(config, {config.profile: arguments})[config.profile]
    settings = overrides.agent_settings(located(config, workspace.root), paths, config.retriever.url or "<the retriever's address>")
    agent = yaml.safe_dump(settings, sort_keys=False)
    return DryRun(config, plan, arguments, agent, hydra, paper.compare(config, hydra))


def compose(config: Config, cases: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """Return verl's resolved configuration for each list of overrides. Raises TrainingError with verl's words."""
    # verl is installed in the policy environment alone.
    command = [str(interpreter(config)), "-m", "research_rl.training.policy_env.compose"]
    env = {**os.environ, **python_path(), "HYDRA_FULL_ERROR": "1"}
    done = subprocess.run(command, input=json.dumps(cases), capture_output=True, text=True, cwd=RUN_FROM, env=env)
    if done.returncode:
        raise TrainingError(f"verl refuses the configuration; its log ends with:\n{done.stderr[-3000:]}")
    # What verl's imports print comes before it.
    return json.loads(done.stdout.splitlines()[-1])
