"""What stands, what a run would build, and whether it fits. Reads manifests and sizes; builds nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from research_rl.config import Config, changes, config_hash, located, parameters
from research_rl.errors import ManifestError
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.meter import duration, moment
from research_rl.pipeline.run import outside, standing
from research_rl.pipeline.stages import STAGES, Workspace, measured
from research_rl.pipeline.verified import Verified
from research_rl.planning import knowledge, training

__all__ = ["Row", "State", "check", "describe", "state"]

State = Literal["current", "stale", "missing", "torn"]
_SHOWN = 4


@dataclass(frozen=True)
class Row:
    """One stage: its state, the first 12 digits of its manifest's hash, and why it is in that state."""

    stage: str
    state: State
    hash: str
    detail: str


def state(config: Config, workspace: Workspace, *, reread: bool = False) -> list[Row]:
    """Return the state of every stage in order; a stage below one that is not current is not current either.

    Bytes are read of files that were not read before or changed since, with `reread` of all files.
    """
    verified = Verified(workspace.verified, reread=reread)
    rows: list[Row] = []
    current: set[str] = set()
    for name in STAGES:
        row = _row(name, config, workspace, current, verified)
        rows.append(row)
        if row.state == "current":
            current.add(name)
    return rows


def _row(name: str, config: Config, workspace: Workspace, current: set[str], verified: Verified) -> Row:
    stage, folder = STAGES[name], workspace.folder(name)
    if not (folder / manifest.MANIFEST).is_file():
        return Row(name, "missing", "", stage.summary)
    try:
        # With the bytes: `research status` is where damage is looked for.
        artifact = manifest.load(folder, hashed=verified.sha256)
    except ManifestError as error:
        return Row(name, "torn", "", str(error))
    short = artifact.hash[:12]
    if artifact.config_hash != config_hash(located(config, workspace.root), stage.sections):
        return Row(name, "stale", short, _changed(artifact, located(config, workspace.root)))
    # By hash, because a parent that was built again may stand whole and current and still be another.
    changed = [p for p in stage.parents if p not in current or _hash(workspace, p) != artifact.parents.get(p)]
    if changed:
        return Row(name, "stale", short, f"rebuilt or stale parent: {', '.join(changed)}")
    if others := outside(stage, config, workspace, artifact):
        return Row(name, "stale", short, _first(others))
    counts = ", ".join(f"{key} {value:,}" for key, value in artifact.counts.items())
    return Row(name, "current", short, "; ".join(filter(None, (counts, _cost(workspace, artifact)))))


def _cost(workspace: Workspace, artifact: Manifest) -> str:
    """Return when an artifact was built and how long that took, empty when it was built elsewhere."""
    note = measured(workspace, artifact)
    return f"built {moment(note['finished'])} UTC in {duration(note['seconds'])}" if note else ""


def _changed(artifact: Manifest, config: Config) -> str:
    """Name the parameters in which an artifact differs from the configuration."""
    lines = changes(artifact.parameters, parameters(config, STAGES[artifact.stage].sections)) if artifact.parameters else []
    if not lines:
        return f"parameters changed in {', '.join(STAGES[artifact.stage].sections)}"
    return _first(lines)


def _first(lines: list[str]) -> str:
    return "; ".join(lines[:_SHOWN]) + (f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else "")


def _hash(workspace: Workspace, stage: str) -> str:
    return manifest.load(workspace.folder(stage), verify=False).hash


def describe(config: Config, workspace: Workspace) -> str:
    """Return the plan as text. Raises ConfigError when training cannot fit; see `check` for the knowledge side."""
    rows = state(config, workspace)
    lines = [f"profile {config.profile}, workspace {workspace.root}", ""]
    lines += [f"{row.stage:<10} {'skip' if row.state == 'current' else 'build':<6} {row.state}: {row.detail}" for row in rows]
    return "\n".join(
        [
            *lines,
            "",
            *_knowledge(config, workspace),
            "",
            *training.lines(config, workspace.folder("policy") if standing("policy", config, workspace) else None),
        ]
    )


def check(config: Config, workspace: Workspace) -> None:
    """Raise ConfigError when the knowledge side cannot fit on the disk or in memory."""
    # Without a snapshot or a known corpus there is nothing to reckon with.
    rows = knowledge.passages(config, workspace)
    if rows is not None:
        knowledge.refuse(knowledge.estimates(config, workspace, rows), config, workspace)


def _knowledge(config: Config, workspace: Workspace) -> list[str]:
    rows = knowledge.passages(config, workspace)
    if rows is None:
        return [f"knowledge side: sizes known after download ({config.data.corpus} is not among {list(knowledge.KNOWN)})"]
    return [*knowledge.table(knowledge.estimates(config, workspace, rows), rows), knowledge.service(config, rows)]
