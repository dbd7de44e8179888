"""Ask the registry of trained policies, which lives in MLflow. Starts the command that knows MLflow; imports nothing of it.

Only a checkout has that command: an installed wheel holds the method alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_rl.process.checkout_command import answer

__all__ = ["COMMAND", "FetchedVersion", "Registry"]

COMMAND = "tasks.tracking.champion"


@dataclass(frozen=True)
class FetchedVersion:
    """A version of a registered model: its number, and the folder of this machine that holds it."""

    version: str
    folder: Path


@dataclass(frozen=True)
class Registry:
    """The registry that a workspace's parameters name."""

    workspace: Path
    profile: str | None = None
    overrides: Sequence[str] = ()

    def fetch(self, name: str) -> FetchedVersion:
        """Return the version NAME@ALIAS or NAME/VERSION; it is downloaded once. Raises ConfigError and ServiceError."""
        answer = self.call("fetch", name)
        return FetchedVersion(str(answer["version"]), Path(answer["folder"]))

    def folder(self, name: str) -> Path:
        """Return the folder of the version NAME@ALIAS or NAME/VERSION, as `fetch`."""
        return self.fetch(name).folder

    def champion(self, model: str | None) -> str | None:
        """Return how to name the champion of `model`, None when it has none. Raises ServiceError when the registry does not answer."""
        version = self.call("show", model)["champion"] if model else None
        return f"registry:{model}/{version}" if version else None

    def call(self, action: str, *names: str, **options: str) -> dict[str, Any]:
        """Return the answer to one action. Raises ConfigError for what is refused, and ServiceError when the registry fails."""
        arguments = ["--workspace", str(self.workspace), *(["--profile", self.profile] if self.profile else [])]
        # Option and value in one word: a reason may begin with a dash.
        arguments += [*(f"--override={item}" for item in self.overrides), action, *names, *(f"--{k}={v}" for k, v in options.items())]
        absent = f"the registry is asked by `python -m {COMMAND}`, which only a checkout has; run this there"
        return answer(COMMAND, action, arguments, absent)
