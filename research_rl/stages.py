"""The stages of the pipeline: their order, parents and parameters. Knows names; each stage's work lives elsewhere.

One table serves every driver: the command line, the Prefect tasks and dvc.yaml (which a test compares with it).
"""

from __future__ import annotations

import errno
import fcntl
import importlib
import json
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from research_rl import manifest
from research_rl.config import Config, config_hash
from research_rl.errors import ConfigError, ManifestError, StorageError
from research_rl.manifest import Manifest, Staging
from research_rl.meter import Meter

__all__ = ["STAGES", "Context", "Progress", "Stage", "Workspace", "current", "measured", "run_stage"]

Progress = Callable[[str, float], None]
"""Called with a short text and the share done (0 to 1)."""


def silent(text: str, share: float) -> None:
    """Progress for callers that do not watch."""


@dataclass(frozen=True)
class Stage:
    """One stage: `function` is `module:name`, called with a StageContext; it publishes `folder`."""

    name: str
    function: str
    parents: tuple[str, ...]
    sections: tuple[str, ...]
    folder: str
    summary: str


@dataclass(frozen=True)
class Workspace:
    """A folder with params.yaml, data/ and artifacts/. All paths are absolute."""

    root: Path

    def folder(self, stage: str) -> Path:
        """Return the folder that holds the artifact of `stage`."""
        return self.root / STAGES[stage].folder

    def work(self, name: str) -> Path:
        """Return the folder for unfinished, resumable work of `name`; no reader takes it for an artifact."""
        return self.root / "artifacts" / ".work" / name

    @property
    def services(self) -> Path:
        """Folder of pid files and logs of the services started for this workspace."""
        return self.root / ".services"


@dataclass(frozen=True)
class Context:
    """What a stage function is given: configuration, verified parents, where to publish, whom to tell."""

    stage: Stage
    config: Config
    workspace: Workspace
    parents: dict[str, Manifest]
    progress: Progress
    meter: Meter = field(default_factory=Meter)

    @property
    def config_hash(self) -> str:
        """Hash of the sections this stage depends on."""
        return config_hash(self.config, self.stage.sections)

    def parent(self, name: str) -> Path:
        """Return the folder of a parent artifact."""
        if name not in self.parents:
            raise ManifestError(f"stage {self.stage.name} has no parent {name!r}; its parents are {list(self.parents)}")
        return self.workspace.folder(name)

    @contextmanager
    def publish(self) -> Generator[Staging]:
        """Open the publication of this stage's artifact, see `manifest.publish`; what it took is kept beside it, see `measured`."""
        folder = self.workspace.folder(self.stage.name)
        with manifest.publish(folder, self.stage.name, self.config_hash, self.parents) as staging:
            yield staging
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        note = {"manifest": manifest.load(folder, verify=False).hash, "finished": finished, **self.meter.read(), **staging.measured}
        path = _measured(self.workspace, self.stage.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(note, indent=1) + "\n")


def measured(workspace: Workspace, found: Manifest) -> dict[str, Any]:
    """Return what building an artifact took here (`finished` in UTC, `seconds`, `peak_mib`, the stage's own figures); empty when it was built elsewhere."""
    try:
        note: dict[str, Any] = json.loads(_measured(workspace, found.stage).read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return note if note.pop("manifest", None) == found.hash else {}


def _measured(workspace: Workspace, stage: str) -> Path:
    return workspace.work("measured") / f"{stage}.json"


def _table(*stages: Stage) -> dict[str, Stage]:
    return {stage.name: stage for stage in stages}


STAGES = _table(
    Stage("download", "research_rl.data.download:run", (), ("seed", "data"), "data", "raw questions and passages"),
    Stage("validate", "tasks.validate:run_stage", ("download",), ("validation",), "artifacts/validated", "data-quality report"),
    Stage("prepare", "research_rl.data.prepare:run", ("download", "validate"), ("seed", "prepare"), "artifacts/prepared", "questions as parquet"),
    Stage("corpus", "research_rl.corpus.build:run", ("download", "validate"), ("corpus",), "artifacts/corpus", "passage store"),
    Stage("embed", "research_rl.embedding.build:run", ("corpus",), ("encoder",), "artifacts/embeddings", "passage vectors"),
    Stage("index", "research_rl.index.build:run", ("corpus", "embed"), ("index",), "artifacts/index", "search index"),
    Stage("policy", "research_rl.training.policy:run", (), ("seed", "policy", "prompt"), "artifacts/policy", "initial policy"),
    Stage("baseline", "research_rl.evaluation.evaluate:run_baseline", ("policy", "prepare", "corpus", "embed", "index"), ("prompt", "episode", "evaluation"), "artifacts/baseline", "evaluation before training"),
    Stage("train", "research_rl.training.train:run", ("policy", "prepare", "corpus", "embed", "index"), ("seed", "prompt", "episode", "reward", "train"), "artifacts/train", "GRPO"),
    Stage("export", "research_rl.training.export:run", ("policy", "train"), (), "artifacts/model", "trained policy as a Hugging Face folder"),
    Stage("evaluate", "research_rl.evaluation.evaluate:run_trained", ("export", "prepare", "corpus", "embed", "index"), ("prompt", "episode", "evaluation"), "artifacts/evaluation", "evaluation after training"),
    Stage("report", "research_rl.report.build:run", ("train", "baseline", "evaluate"), (), "artifacts/report", "curves, paired difference, trajectories"),
)  # fmt: skip


def current(name: str, config: Config, workspace: Workspace, *, verify: bool = True) -> Manifest | None:
    """Return the artifact of `name` if it is whole and was built from this configuration and these parents."""
    stage = STAGES[name]
    try:
        found = manifest.load(workspace.folder(name), verify=verify)
        parents = {parent: manifest.load(workspace.folder(parent), verify=False).hash for parent in stage.parents}
    except ManifestError:
        return None
    fits = found.stage == name and found.config_hash == config_hash(config, stage.sections) and found.parents == parents
    return found if fits else None


def run_stage(
    name: str,
    config: Config,
    workspace: Workspace,
    *,
    force: bool = False,
    progress: Progress = silent,
    function: Callable[[Context], None] | None = None,
) -> tuple[Manifest, bool]:
    """Build the artifact of `name` unless it is current; return its manifest and whether it was built.

    `function` does the stage's work in place of the table's, for drivers that watch it. Raises ConfigError for an unknown stage and ManifestError when a parent is missing, torn or stale.
    """
    if name not in STAGES:
        raise ConfigError(f"stage={name!r} is not one of {list(STAGES)}")
    with _alone(name, workspace, progress), _room(name, workspace):
        manifest.sweep(workspace.folder(name))
        if not force and (found := current(name, config, workspace)):
            return found, False
        stage = STAGES[name]
        parents = {parent: _parent(name, parent, config, workspace) for parent in stage.parents}
        work = function or _function(stage.function)
        work(Context(stage, config, workspace, parents, progress))
        return manifest.load(workspace.folder(name), verify=False), True


@contextmanager
def _alone(name: str, workspace: Workspace, progress: Progress) -> Generator[None]:
    """Wait until no other process builds this stage here; the system lifts the lock of a process that dies."""
    path = workspace.work("locks") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for the process that builds {name} now", 0.0)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextmanager
def _room(name: str, workspace: Workspace) -> Generator[None]:
    """Turn what libraries raise when a write does not fit into one StorageError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not _is_full(error):
            raise
        disk = shutil.disk_usage(workspace.root)
        raise StorageError(
            f"stage {name} could not write all it has to below {workspace.root}: {' '.join(str(error).split())}; with its unfinished files "
            f"gone, {disk.free / 1e6:,.1f} of {disk.total / 1e6:,.1f} MB free; make room, raise the limit on file sizes (ulimit -f) or "
            "use another disk, then rerun: finished shards are kept"
        ) from error


def _is_full(error: OSError | RuntimeError) -> bool:
    """numpy, faiss and pyarrow name the cause in words, or only that less was written than asked."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return re.search(r"No space left|File too large|Disk quota|\d+ requested and \d+ written", str(error)) is not None


def _parent(stage: str, parent: str, config: Config, workspace: Workspace) -> Manifest:
    found = current(parent, config, workspace)
    if found is None:
        raise ManifestError(
            f"stage {stage} needs {workspace.folder(parent)}, which is missing, torn or built from other parameters; "
            f"run `research run {parent}` first"
        )
    return found


def _function(path: str) -> Callable[[Context], None]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
