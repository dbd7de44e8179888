"""What stands, what a run would build, and whether it fits. Reads manifests and sizes; builds nothing."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from research_rl import manifest
from research_rl.config import Config, config_hash
from research_rl.errors import ConfigError, ManifestError
from research_rl.stages import STAGES, Workspace
from research_rl.training import plan as training

__all__ = ["Row", "State", "describe", "state"]

State = Literal["current", "stale", "missing", "torn"]


@dataclass(frozen=True)
class Row:
    """One stage: its state, the first 12 digits of its manifest's hash, and why it is in that state."""

    stage: str
    state: State
    hash: str
    detail: str


def state(config: Config, workspace: Workspace) -> list[Row]:
    """Return the state of every stage in order; a stage below one that is not current is not current either."""
    rows: list[Row] = []
    current: set[str] = set()
    for name in STAGES:
        row = _row(name, config, workspace, current)
        rows.append(row)
        if row.state == "current":
            current.add(name)
    return rows


def _row(name: str, config: Config, workspace: Workspace, current: set[str]) -> Row:
    stage, folder = STAGES[name], workspace.folder(name)
    if not (folder / manifest.MANIFEST).is_file():
        return Row(name, "missing", "", stage.summary)
    try:
        found = manifest.load(folder)
    except ManifestError as error:
        return Row(name, "torn", "", str(error))
    short = found.hash[:12]
    if found.config_hash != config_hash(config, stage.sections):
        return Row(name, "stale", short, f"parameters changed in {', '.join(stage.sections)}")
    changed = [p for p in stage.parents if p not in current or _hash(workspace, p) != found.parents.get(p)]
    if changed:
        return Row(name, "stale", short, f"rebuilt or stale parent: {', '.join(changed)}")
    return Row(name, "current", short, ", ".join(f"{key} {value:,}" for key, value in found.counts.items()))


def _hash(workspace: Workspace, stage: str) -> str:
    return manifest.load(workspace.folder(stage), verify=False).hash


def describe(config: Config, workspace: Workspace) -> str:
    """Return the plan as text. Raises ConfigError when index or training cannot fit."""
    rows = state(config, workspace)
    lines = [f"profile {config.profile}, workspace {workspace.root}", ""]
    lines += [f"{row.stage:<10} {'skip' if row.state == 'current' else 'build':<6} {row.state}: {row.detail}" for row in rows]
    lines += ["", *_budget(config, workspace)]
    return "\n".join(lines)


def _budget(config: Config, workspace: Workspace) -> list[str]:
    lines = training.lines(config, workspace.folder("policy"))
    rows = _passages(config, workspace)
    if rows is None:
        return [*lines, "index: size known after download"]
    need = 2 * rows * config.encoder.dim * 4
    free = shutil.disk_usage(_existing(workspace.root)).free
    if need > free:
        raise ConfigError(
            f"{rows:,} passages x {config.encoder.dim} x 4 bytes need {need / 1e9:.1f} GB for vectors and index, "
            f"{free / 1e9:.1f} GB are free; free some room or lower encoder.dim"
        )
    return [*lines, f"index: {rows:,} passages, {need / 1e9:.2f} GB for vectors and index, {free / 1e9:.0f} GB free"]


def _passages(config: Config, workspace: Workspace) -> int | None:
    try:
        return manifest.load(workspace.folder("download"), verify=False).counts.get("passages")
    except ManifestError:
        return None


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)
