"""Build one stage: whether its artifact is current, the locks around it, and a full disk told as one error. Knows no stage's work."""

from __future__ import annotations

import errno
import fcntl
import importlib
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from research_rl.config import Config, config_hash, located
from research_rl.errors import ConfigError, ManifestError, StorageError
from research_rl.pipeline import manifest, taped
from research_rl.pipeline.extras import missing_extras
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import STAGES, Context, Progress, Stage, Workspace, silent
from research_rl.pipeline.verified import Verified

__all__ = ["current", "outside", "room", "run_stage", "standing", "work_of"]


def current(name: str, config: Config, workspace: Workspace, *, verify: bool = True) -> Manifest | None:
    """Return the artifact of `name` if it is whole and was built from this configuration and these parents.

    With `verify` the files' bytes count, of which those are read that were not read before or changed since.
    """
    stage = STAGES[name]
    try:
        artifact = manifest.load(workspace.folder(name), verify=verify, hashed=Verified(workspace.verified).sha256)
        # Which parents they are decides; their bytes are compared by the stage that reads them.
        parents = {parent: taped.loaded(parent, config, workspace).hash for parent in stage.parents}
    except ManifestError:
        return None
    fits = (
        artifact.stage == name
        and artifact.config_hash == config_hash(located(config, workspace.root), stage.sections)
        and artifact.parents == parents
    )
    # Last: the user's own files may have to be read.
    return artifact if fits and not outside(stage, config, workspace, artifact) else None


def outside(stage: Stage, config: Config, workspace: Workspace, artifact: Manifest) -> list[str]:
    """Return in what the user's own files, from which an artifact was built, are others now, one line a file."""
    return _function(stage.outside)(config, workspace, artifact) if stage.outside else []


def standing(name: str, config: Config, workspace: Workspace) -> Manifest | None:
    """Return the artifact of `name` if it and all it was built from fit this configuration; sizes are compared, bytes are not.

    What lies in a workspace may belong to another profile than the one that was named: a plan must not reckon with it.
    """
    above = all(standing(parent, config, workspace) for parent in STAGES[name].parents)
    return current(name, config, workspace, verify=False) if above else None


def run_stage(
    name: str,
    config: Config,
    workspace: Workspace,
    *,
    force: bool = False,
    refresh: bool = False,
    progress: Progress = silent,
    function: Callable[[Context], None] | None = None,
    on_build: Callable[[], None] = lambda: None,
) -> tuple[Manifest, bool]:
    """Build the artifact of `name` unless it is current; return its manifest and whether it was built.

    With `refresh` a current artifact is built again when the machines that its data came from hold something newer. `function` does
    the stage's work in place of the table's, for drivers that watch it; `on_build` is called before that work begins. Raises ConfigError
    for an unknown stage or a missing optional library, and ManifestError when a parent is missing, torn or stale.
    """
    if name not in STAGES:
        raise ConfigError(f"stage={name!r} is not one of {list(STAGES)}")
    # The lock comes before `sweep`, which would remove the unfinished folder of another builder, and before `current`: the process
    # that was waited for may have built the artifact.
    with _alone(name, workspace, progress), room(f"stage {name}", workspace), missing_extras():
        manifest.sweep(workspace.folder(name))
        stage = STAGES[name]
        artifact = None if force else current(name, config, workspace)
        if artifact and not (refresh and _newer(stage, config, workspace, artifact, progress)):
            return artifact, False
        parents = {parent: _parent(name, parent, config, workspace) for parent in stage.parents}
        work = function or work_of(stage)
        on_build()
        work(Context(stage, config, workspace, parents, progress, force))
        return manifest.load(workspace.folder(name), verify=False), True


def work_of(stage: Stage) -> Callable[[Context], None]:
    """Return what does a stage's work."""
    return _function(stage.function)


def _newer(stage: Stage, config: Config, workspace: Workspace, artifact: Manifest, progress: Progress) -> bool:
    """Return whether other machines hold something newer than an artifact, and tell each reason."""
    reasons: list[str] = _function(stage.newer)(config, workspace, artifact, progress) if stage.newer else []
    for reason in reasons:
        progress(reason, 0.0)
    return bool(reasons)


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
def room(what: str, workspace: Workspace) -> Generator[None]:
    """Turn what libraries raise when a write does not fit into one StorageError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not _is_full(error):
            raise
        disk = shutil.disk_usage(workspace.root)
        raise StorageError(
            f"{what} could not write all it has to below {workspace.root}: {' '.join(str(error).split())}; with its unfinished files "
            f"gone, {disk.free / 1e6:,.1f} of {disk.total / 1e6:,.1f} MB free; make room, raise the limit on file sizes (ulimit -f) or "
            "use another disk, then rerun: finished shards are kept"
        ) from error


def _is_full(error: OSError | RuntimeError) -> bool:
    """numpy, faiss and pyarrow name the cause in words, or only that less was written than asked."""
    # EFBIG is the limit on file sizes (ulimit -f), which has the same remedies.
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    return re.search(r"No space left|File too large|Disk quota|\d+ requested and \d+ written", str(error)) is not None


def _parent(stage: str, parent: str, config: Config, workspace: Workspace) -> Manifest:
    # A tape that is replayed holds the manifest of an index that is not here.
    artifact = taped.replaced(parent, config, workspace) or current(parent, config, workspace)
    if artifact is None:
        raise ManifestError(
            f"stage {stage} needs {workspace.folder(parent)}, which is missing, torn or built from other parameters; "
            f"run `research run {parent}` first"
        )
    return artifact


def _function(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
