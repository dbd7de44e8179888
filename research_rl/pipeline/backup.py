"""Copy what a workspace cannot build again into one folder, and back. Knows files, manifests and sqlite; knows no stage.

Invariants: (1) a backup is an artifact: it stands whole, with a sha256 for each file, or not at all; (2) runs go on meanwhile, and what
they publish is copied whole or not at all; (3) nothing is restored from a backup that was altered, or over files unless that is asked for.

Databases are copied first: what they name is older than they are, so it is still there when the files are copied.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

from research_rl.errors import ConfigError, ManifestError
from research_rl.pipeline import manifest
from research_rl.pipeline.copying import clone
from research_rl.pipeline.manifest import MANIFEST, Manifest
from research_rl.pipeline.stages import Workspace

__all__ = ["STAGE", "backup", "restore"]

STAGE = "backup"
Say = Callable[[str], None]
_DATABASES = ("mlflow.db", ".prefect/prefect.db")
"""Tracking, and Prefect's runs, where they lie in the workspace; those of a server elsewhere are that server's to back up."""
_FILES = ("params.yaml", "data.dvc", "dvc.yaml", "dvc.lock", ".dvc/config", ".dvcignore")
_FOLDERS = ("data", "artifacts", "mlartifacts")
_WORK = ".work"
_KEPT_WORK = ("measured", "tracking", "dvc")
"""Of the unfinished work: what stages took, what MLflow was not sent yet, what was versioned. Checkpoints stay out, for their size."""
_UNFINISHED = (".tmp", ".old", ".copy", ".restored")
_PASSES = 5


def backup(workspace: Workspace, target: Path, say: Say) -> Manifest:
    """Write a backup of a workspace to `target`, which must not exist. Raises ConfigError or ManifestError."""
    target = target.resolve()
    if target.exists():
        raise ConfigError(f"{target} exists; name a folder that does not, one for each backup")
    if any(target.is_relative_to(workspace.root / name) for name in _FOLDERS):
        raise ConfigError(f"{target} lies in a folder that is backed up; name one outside data, artifacts and mlartifacts")
    with manifest.publish(target, STAGE, "", {}) as staging:
        for name in _DATABASES:
            if (workspace.root / name).is_file():
                _copy_database(workspace.root / name, staging.path / name)
                staging.counts["databases"] = staging.counts.get("databases", 0) + 1
        for name in _FILES:
            if (workspace.root / name).is_file():
                _copy(workspace.root / name, staging.path / name)
        staging.counts["artifacts"] = _copy_artifacts(workspace, staging.path, say)
        say("computing the sha256 of every file")
    return manifest.load(target, verify=False)


def _copy_database(source: Path, target: Path) -> None:
    """Copy a sqlite database as it stands between two transactions, whoever writes to it meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    address = f"{source.resolve().as_uri()}?mode=ro"
    with closing(sqlite3.connect(address, uri=True, timeout=60)) as standing, closing(sqlite3.connect(target)) as copy:
        standing.backup(copy)
        # One file: a copy that is restored without its write-ahead log would lack the newest transactions.
        copy.execute("PRAGMA journal_mode=DELETE")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    clone(source, target)


def _copy_artifacts(workspace: Workspace, target: Path, say: Say) -> int:
    """Copy all folders, again where something was published meanwhile; return how many whole artifacts the copy has."""
    torn = list[str]()
    for _ in range(_PASSES):
        before = _edition(workspace.root)
        for name in _FOLDERS:
            shutil.rmtree(target / name, ignore_errors=True)
            say(f"copying {name}")
            for path in _files(workspace.root / name):
                # It was of an artifact that was replaced since it was listed, which the comparison below sees.
                with suppress(FileNotFoundError):
                    _copy(path, target / path.relative_to(workspace.root))
        torn = _torn(target)
        if _edition(workspace.root) == before and not torn:
            return len(before)
        say("an artifact was published meanwhile; copying once more")
    what = ", ".join(torn) or "artifacts were published"
    raise ManifestError(f"{workspace.root} changed in each of {_PASSES} passes ({what}); back up between two stages")


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder: no work but what is kept, and nothing that is being published."""
    for path in sorted(folder.glob("*")):
        if path.is_dir() and path.name == _WORK:
            for name in _KEPT_WORK:
                yield from _files(path / name)
        elif path.name.startswith(".") and path.name.endswith(_UNFINISHED):
            continue
        elif path.is_dir():
            yield from _files(path)
        elif path.is_file():
            yield path


def _edition(root: Path) -> dict[str, bytes]:
    """Return the manifests that stand, by folder."""
    standing: dict[str, bytes] = {}
    for path in (path for name in _FOLDERS for path in _files(root / name) if path.name == MANIFEST):
        with suppress(FileNotFoundError):
            standing[str(path.parent.relative_to(root))] = path.read_bytes()
    return standing


def _torn(folder: Path) -> list[str]:
    """Return the artifacts of a copy that are not whole, by the sizes of their files."""
    paths = [path.parent for name in _FOLDERS for path in _files(folder / name) if path.name == MANIFEST]
    return [str(path.relative_to(folder)) for path in paths if manifest.found(path, verify=False) is None]


def restore(workspace: Workspace, source: Path, say: Say, *, replace: bool = False) -> Manifest:
    """Bring a backup into a workspace. Raises ManifestError for one that is torn or altered, ConfigError for a workspace with files.

    With `replace` the files of the backup take the place of those that stand; others stay.
    """
    say("comparing the sha256 of every file")
    artifact = manifest.load(source)
    if artifact.stage != STAGE:
        raise ManifestError(f"{source} is an artifact of stage {artifact.stage}, no backup; name a folder that `research backup` wrote")
    standing = sorted(name for name in (*_DATABASES, *_FILES, *_FOLDERS) if _stands(workspace.root / name))
    if standing and not replace:
        raise ConfigError(f"{workspace.root} has {', '.join(standing)}; name an empty workspace, or --replace what stands")
    # Manifests last: an artifact whose restoring was killed does not exist for any reader.
    ordered = sorted((entry.path for entry in artifact.files), key=lambda path: (path.rpartition("/")[2] == MANIFEST, path))
    for folder in {path.rpartition("/")[0] for path in ordered if path.endswith(f"/{MANIFEST}")}:
        shutil.rmtree(workspace.root / folder, ignore_errors=True)
    say(f"restoring {len(ordered):,} files")
    for name in ordered:
        _place(source / name, workspace.root / name)
    return artifact


def _stands(path: Path) -> bool:
    # A workspace that was only locked has a folder `artifacts` with its lock.
    return path.is_file() or any(True for _ in _files(path))


def _place(source: Path, target: Path) -> None:
    """Give `target` the content of `source` in one step; what belonged to an older database goes with it."""
    _copy(source, temporary := target.with_name(f".{target.name}.restored"))
    manifest.fsync(temporary)
    for ending in ("-wal", "-shm", "-journal"):
        target.with_name(target.name + ending).unlink(missing_ok=True)
    temporary.replace(target)
