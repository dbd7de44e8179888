"""Publish and read artifacts so that a torn one is never accepted. Knows folders and hashes, no stage's meaning.

Invariants: (1) a folder without a valid manifest.json does not exist for any reader; (2) the manifest is written
last, after every file is on disk; (3) a manifest holds no time and no machine path, so equal files give equal bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from research_rl import __version__
from research_rl.errors import ManifestError
from research_rl.pipeline.json_files import parse

__all__ = ["MANIFEST", "FileEntry", "Manifest", "Staging", "file_sha256", "found", "fsync", "load", "publish", "read", "sweep"]

MANIFEST = "manifest.json"
_CHUNK = 1 << 20
_LONGEST_PATH = 1000


class FileEntry(BaseModel):
    """One file of an artifact: path below the folder, size in bytes, sha256."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    size: int
    sha256: str

    @field_validator("path")
    @classmethod
    def _inside(cls, path: str) -> str:
        """Refuse a name that could lead out of the artifact, whoever wrote the manifest."""
        parts = PurePosixPath(path).parts
        if not parts or parts[0] == "/" or ".." in parts or "\0" in path or len(path) > _LONGEST_PATH:
            raise ValueError("no name of a file below the folder")
        return path


class Manifest(BaseModel):
    """What an artifact is made of and from."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    stage: str
    config_hash: str
    parameters: dict[str, Any] = {}
    parents: dict[str, str]
    code_version: str
    counts: dict[str, int]
    facts: dict[str, Any]
    files: tuple[FileEntry, ...]

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON: the name by which children refer to this artifact."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """Return the canonical JSON; the same for the same content."""
        return _canonical(self.model_dump(mode="json"))


def _sealed(tree: dict[str, Any]) -> bytes:
    """Return the bytes of manifest.json: the content and, as `seal`, its sha256, so that an altered manifest is known as such."""
    # Children name their parents' hashes; only the seal shows a flipped bit in the last manifest of a chain.
    return _canonical({**tree, "seal": hashlib.sha256(_canonical(tree)).hexdigest()})


def _canonical(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


@dataclass
class Staging:
    """A folder being filled; becomes an artifact when the `publish` block ends without an error."""

    path: Path
    counts: dict[str, int] = field(default_factory=dict[str, int])
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    measured: dict[str, Any] = field(default_factory=dict[str, Any])
    """What building it took; no part of the artifact."""


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def publish(
    target: Path,
    stage: str,
    config_hash: str,
    parents: Mapping[str, Manifest],
    parameters: Mapping[str, Any] | None = None,
    keep: Path | None = None,
) -> Generator[Staging]:
    """Fill a temporary folder beside `target`, then make it `target` in one rename.

    `parameters` are the values behind `config_hash`: with them a later change can be named.
    A `target` that is a symbolic link stays one: the folder that it leads to is replaced. With `keep` the artifact that stood
    there goes to that folder, in the place of what was kept before.
    An exception inside the block removes the temporary folder and leaves an older `target` as it was.
    """
    target = _real(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target)
    # In the same folder as `target`, so that the rename stays within one file system.
    staging = Staging(target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp")
    staging.path.mkdir()
    try:
        yield staging
        _seal(staging, stage, config_hash, {name: parent.hash for name, parent in sorted(parents.items())}, dict(parameters or {}))
        _swap(staging.path, target, keep)
    # Also Ctrl-C and the cancellation of a flow.
    except BaseException:
        shutil.rmtree(staging.path, ignore_errors=True)
        raise


def load(folder: Path, *, verify: bool = True, hashed: Callable[[Path], str] = file_sha256) -> Manifest:
    """Read a folder's manifest; with `verify`, compare size and sha256 of every file. Raises ManifestError.

    `hashed` gives the sha256 of a file, for callers that remember it (`verified.Verified`).
    """
    manifest = read(folder)
    for entry in manifest.files:
        _check(folder, entry, hashed if verify else None)
    return manifest


def found(folder: Path, *, verify: bool = True) -> Manifest | None:
    """Return what `load` does, None for a folder without a whole artifact."""
    try:
        return load(folder, verify=verify)
    except ManifestError:
        return None


def read(folder: Path) -> Manifest:
    """Return what a folder's manifest says; its files are not looked at. Raises ManifestError."""
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
        tree = parse(raw)
        seal = tree.pop("seal", None)
        manifest = Manifest.model_validate(tree)
        sealed = _sealed(tree)
    except FileNotFoundError:
        raise ManifestError(f"{folder} has no {MANIFEST}; build it with `research run <stage>`") from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be read ({error.strerror}); remove the folder and rerun") from None
    except (ValueError, AttributeError, TypeError) as error:  # not UTF-8, not JSON, not an object, or not these fields
        raise ManifestError(f"{path} is not a manifest ({type(error).__name__}); remove the folder and rerun") from None
    if seal is not None and raw != sealed:  # manifests of earlier versions have none
        raise ManifestError(f"{path} was altered: its seal does not fit its content; remove the folder and rerun")
    return manifest


def sweep(target: Path) -> None:
    """Remove what a killed publication of `target` left behind; finish a swap that was cut in the middle."""
    target = _real(target)
    # Killed between the two renames of `_swap`: the older artifact gets its name back. Killed after both: it is in the way.
    for old in target.parent.glob(f".{target.name}.*.old"):
        if target.exists():
            shutil.rmtree(old)
        else:
            old.rename(target)
    for temporary in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(temporary)


def _real(target: Path) -> Path:
    return target.resolve() if target.is_symlink() else target


def _seal(staging: Staging, stage: str, config_hash: str, parents: dict[str, str], parameters: dict[str, Any]) -> None:
    paths = sorted(path for path in staging.path.rglob("*") if path.is_file())
    files: list[FileEntry] = []
    for path in paths:
        fsync(path)
        name = path.relative_to(staging.path).as_posix()
        files.append(FileEntry(path=name, size=path.stat().st_size, sha256=file_sha256(path)))
    manifest = Manifest(
        stage=stage,
        config_hash=config_hash,
        parameters=parameters,
        parents=parents,
        code_version=__version__,
        counts=dict(sorted(staging.counts.items())),
        facts=staging.facts,
        files=tuple(files),
    )
    # Last: a folder with this file counts as an artifact.
    (staging.path / MANIFEST).write_bytes(_sealed(manifest.model_dump(mode="json")))
    fsync(staging.path / MANIFEST)
    # A file can be on disk without its name being there; folders hold the names.
    for folder in (*(path for path in staging.path.rglob("*") if path.is_dir()), staging.path):
        fsync(folder)


def _swap(new: Path, target: Path, keep: Path | None) -> None:
    # Two renames, because none replaces a folder that holds files; `sweep` finishes what a kill between them leaves.
    old = target.parent / f".{target.name}.{uuid.uuid4().hex}.old"
    if target.exists():
        target.rename(old)
    new.rename(target)
    fsync(target.parent)
    if keep and old.exists():
        shutil.rmtree(keep, ignore_errors=True)
        keep.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(old, keep)
    shutil.rmtree(old, ignore_errors=True)


def _check(folder: Path, entry: FileEntry, hashed: Callable[[Path], str] | None) -> None:
    path = folder / entry.path
    try:
        size = path.stat().st_size
    except OSError:
        raise ManifestError(f"{path} is missing though {MANIFEST} lists it; remove {folder} and rerun") from None
    if size != entry.size or not path.is_file():
        raise ManifestError(f"{path} has {size} bytes, its manifest says {entry.size}; remove {folder} and rerun")
    if hashed and (digest := hashed(path)) != entry.sha256:
        raise ManifestError(f"{path} has sha256 {digest[:12]}, its manifest says {entry.sha256[:12]}; remove {folder} and rerun")


def fsync(path: Path) -> None:
    """Have the disk keep a file, or a folder's names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
