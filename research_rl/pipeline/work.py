"""Unfinished work that survives a kill, in units. Knows folders, hashes and seconds; knows no index.

Invariants: (1) a unit counts as finished only with its record, written after its files, whose sha256 they fit; (2) a
killed run redoes at most the unit it was in; (3) work begun for other parameters, parents or own files is never taken up.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from research_rl.pipeline.copying import place
from research_rl.pipeline.manifest import file_sha256, fsync
from research_rl.pipeline.stages import Context

__all__ = ["Work"]

Record = dict[str, Any]


class Work:
    """The work folder of one stage with these parameters and parents, and these sha256 of the user's own files."""

    def __init__(self, context: Context, own_files: Mapping[str, str] = {}) -> None:
        parents = [parent.hash for _, parent in sorted(context.parents.items())]
        own = [f"{name}:{digest}" for name, digest in sorted(own_files.items())]
        key = sha256("/".join([context.config_hash, *parents, *own]).encode()).hexdigest()[:16]
        self.folder = context.workspace.work(f"{context.stage.name}-{key}")
        for stale in self.folder.parent.glob(f"{context.stage.name}-*"):
            if stale != self.folder:
                shutil.rmtree(stale)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.seconds = 0.0
        """What all finished units took, those of earlier runs included."""

    def unit(self, name: str, build: Callable[[Path], Record]) -> Record:
        """Return the record of a unit; `build` fills its folder and returns what to record, unless that was done before."""
        folder = self.folder / name
        record = _finished(folder)
        if record is None:
            record = _build(folder, build)
        self.seconds += record["seconds"]
        return record["facts"]

    def finished(self, name: str) -> Record | None:
        """Return the record of a unit, None unless it stands whole."""
        record = _finished(self.folder / name)
        return record and record["facts"]

    def units(self) -> list[str]:
        """Return the names of the finished units."""
        return sorted(path.stem for path in self.folder.glob("*.json"))

    def link(self, unit: str, target: Path) -> None:
        """Give the files of a unit a second place in `target`."""
        for name, path in _files(self.folder / unit).items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            # Not a copy where it can be helped: the vectors of a large corpus take tens of gigabytes, and the work folder goes right after.
            place(path, target / name)

    def remove(self) -> None:
        """End the work."""
        shutil.rmtree(self.folder)


def _build(folder: Path, build: Callable[[Path], Record]) -> Record:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    started = time.monotonic()
    facts = build(folder)
    # Files, then the record, then its name: a record on disk means that its files are.
    for path in _files(folder).values():
        fsync(path)
    files = {name: file_sha256(path) for name, path in _files(folder).items()}
    record = {"facts": facts, "files": files, "seconds": round(time.monotonic() - started, 3)}
    temporary = folder.with_suffix(".tmp")
    temporary.write_text(json.dumps(record))
    temporary.replace(folder.with_suffix(".json"))
    return record


def _files(folder: Path) -> dict[str, Path]:
    """Return the files below a folder by their names there."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _finished(folder: Path) -> Record | None:
    try:
        record: Record = json.loads(folder.with_suffix(".json").read_text())
        whole = all(file_sha256(folder / name) == digest for name, digest in record["files"].items())
    except (OSError, ValueError, KeyError):
        return None
    return record if whole else None
