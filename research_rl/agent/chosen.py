"""Which model a service answers with. Names are those of `research evaluate --model`; an alias of the registry is told apart from them.

Invariant: a chosen model stays the one that was chosen: its folder is fetched again when another artifact has taken its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from research_rl.config import Config
from research_rl.errors import ConfigError, ServiceError
from research_rl.evaluation import cells
from research_rl.pipeline.json_files import read_object
from research_rl.pipeline.stages import Workspace
from research_rl.process.private import write_private
from research_rl.process.registry import FetchedVersion
from research_rl.serving.model import served_name

__all__ = ["AliasMemory", "Chosen", "Fetch", "alias_of", "choose", "of_alias", "of_folder", "registered"]

Fetch = Callable[[str], FetchedVersion]
"""Returns the registered version NAME@ALIAS or NAME/VERSION, as `Registry.fetch` does. Raises ConfigError and ServiceError."""


@dataclass(frozen=True)
class Chosen:
    """A model: how a person names it, its folder, and the name under which it is served; `again` fetches a version of the registry."""

    name: str
    folder: Path
    again: Callable[[], Path] | None = None
    served: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "served", served_name(self.folder))

    def place(self) -> Path:
        """Return the folder that holds this model now. Raises ConfigError and ServiceError."""
        # A version that was trained here lies in the workspace, where the next training replaces it.
        return self.again() if self.again and served_name(self.folder) != self.served else self.folder


def of_folder(folder: Path) -> Chosen:
    """Return the model of a folder."""
    return Chosen(str(folder), folder)


def choose(choice: str, config: Config, workspace: Workspace, fetch: Fetch, option: str = "--model") -> Chosen:
    """Return the model that `choice` names. Raises ConfigError, ModelError and ServiceError."""
    if choice.startswith(cells.REGISTRY):
        return of_alias(choice.removeprefix(cells.REGISTRY), fetch)
    return Chosen(choice, cells.model_folder(choice, config, workspace, lambda name: fetch(name).folder, option)[1])


def of_alias(name: str, fetch: Fetch) -> Chosen:
    """Return the registered version NAME@ALIAS or NAME/VERSION, under the name of its version. Raises ConfigError and ServiceError."""
    fetched = fetch(name)
    version = f"{name.rpartition('@')[0]}/{fetched.version}" if "@" in name else name
    return Chosen(f"{cells.REGISTRY}{version}", fetched.folder, lambda: fetch(version).folder)


def alias_of(choice: str) -> str | None:
    """Return NAME@ALIAS where `choice` is registry:NAME@ALIAS, whose version can move; None for every other name."""
    name = choice.removeprefix(cells.REGISTRY)
    return name if name != choice and "@" in name else None


def registered(choice: str, config: Config) -> str:
    """Return the name of a challenger; a bare number is a version of `tracking.registered_model`. Raises ConfigError without one."""
    if not choice.isdecimal():
        return choice
    if not config.tracking.registered_model:
        raise ConfigError(f"--shadow {choice} is a version's number, but tracking.registered_model is empty; name registry:NAME/{choice}")
    return f"{cells.REGISTRY}{config.tracking.registered_model}/{choice}"


@dataclass(frozen=True)
class AliasMemory:
    """The version that an alias named last, kept in a file, so that a service starts while the registry does not answer."""

    path: Path

    def keep(self, alias: str, chosen: Chosen) -> None:
        """Remember what `alias` stands for."""
        record = {"alias": alias, "name": chosen.name, "folder": str(chosen.folder), "served": chosen.served}
        write_private(self.path, json.dumps(record))

    def recall(self, alias: str) -> Chosen | None:
        """Return what `alias` stood for; None when nothing is remembered, or its folder holds another model by now."""
        if not self.path.is_file():
            return None
        record: dict[str, Any] = read_object(self.path, ServiceError, "remove it")
        if record.get("alias") != alias or not (folder := Path(str(record.get("folder")))).is_dir():
            return None
        chosen = Chosen(str(record.get("name")), folder)
        return chosen if chosen.served == record.get("served") else None
