"""Files on their way to this machine: their pieces, records and hashes on disk. Knows files and versions; knows no thread and no source.

A file is fetched in pieces, each appended to a file of its own, so what is on disk says how far it came, even after a
power cut. Invariants: (1) a file stands under its name only with the size and hash of its record; (2) bytes of two
versions are never mixed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_rl.data.sources import FileSource, Remote
from research_rl.pipeline.manifest import fsync

__all__ = ["Fetched", "Located", "PartialFile", "Piece"]

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Located:
    """A configured name with what it stands for and the sha256 the configuration expects, None when it names none."""

    name: str
    source: FileSource
    remote: Remote
    sha256: str | None

    @property
    def digest(self) -> str:
        """The same for every spelling of one file: bare, or as a whole address of the same place."""
        return hashlib.sha256(f"{self.source.key.rstrip('/')}/{self.remote.name}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Fetched:
    """A file on this machine: its path, sha256 and what to record about where it came from."""

    path: Path
    sha256: str
    facts: dict[str, Any]
    encoded: bool = False
    """Whether the source compressed the bytes on top of what the name says; the path then ends in that compression's suffix."""


class PartialFile:
    """One file on its way: its record, its pieces, its place."""

    def __init__(self, item: Located, folder: Path, piece_bytes: int) -> None:
        self.item, self.remote = item, item.remote
        self._digest = item.digest
        self.path = item.remote.path or folder / f"{self._digest}-{_file_name(item.remote)}"
        self._parts = folder / ".parts"
        self._record = self._parts / f"{self._digest}.json"
        self._joined = self._parts / f"{self._digest}.joined"
        self.sha256 = ""
        self.fetches = 0
        # Where nothing tells versions apart, pieces of two versions could be joined unseen: such a file is fetched in one go.
        self.ranges = self.remote.ranges and bool(self.remote.version or self.remote.checksum or item.sha256)
        self._piece_bytes = piece_bytes
        self.left = 0

    def missing(self) -> int:
        """Return the bytes still to fetch, 0 when the size is unknown."""
        # What is held of another version counts as nothing: `begin` removes it.
        if self.path.exists() or self.remote.size is None or not self._same_version():
            return 0 if self.path.exists() and self._same_version() else self.remote.size or 0
        held = sum(path.stat().st_size for path in self._parts.glob(f"{self._digest}.*") if path.suffix != ".json")
        return max(0, self.remote.size - held)

    def begin(self) -> list[Piece]:
        """Return the pieces to fetch; what another version left behind is removed."""
        self._parts.mkdir(parents=True, exist_ok=True)
        if not self._same_version():
            # The old bytes go first: a kill in between must not leave them under the record of the new version.
            self.drop()
            self._write({"version": self.remote.version, "size": self.remote.size, "piece_bytes": self._piece_bytes})
        # The pieces on disk were cut by the recorded size, whatever transfer.piece_mb is at the time of a rerun.
        size, step = self.remote.size, int(self._read()["piece_bytes"])
        if size is None or not self.ranges:
            bounds = [(0, size)]
        else:
            # One piece for an empty file, too, so that there is something to join.
            bounds = [(start, min(start + step, size)) for start in range(0, max(size, 1), step)]
        joined = self._joined.stat().st_size if self._joined.exists() else 0
        self.pieces = [Piece(self, n, start, stop, self._part(n)) for n, (start, stop) in enumerate(bounds)]
        incomplete = [piece for piece in self.pieces if not piece.complete(joined)]
        self.left = len(incomplete)
        return incomplete

    def standing(self) -> bool:
        """Return whether the file stands, its content as recorded; one that was altered is removed."""
        record = self._read()
        if not self.path.exists() or not self._same_version() or "sha256" not in record:
            return False
        if self._problem(self._hash(self.path)) or self.sha256 != record["sha256"]:
            self.path.unlink()
            return False
        return True

    def finish(self) -> str:
        """Join the pieces, compare size and hashes, and give the file its name; return what is wrong, or nothing."""
        self._join()
        problem = self._problem(self._hash(self._joined))
        if problem:
            self.drop()
            return problem
        # The hash before the name: killed in between, the joined file is hashed once more. The other way round a whole file would stand
        # unrecorded and be fetched again.
        self._write({**self._read(), "sha256": self.sha256})
        self._joined.replace(self.path)
        # A new name is safe on disk only with the folder that holds it.
        fsync(self.path.parent)
        return ""

    def used_in_place(self) -> str:
        """Hash a local file; return what is wrong with it, or nothing."""
        return self._problem(self._hash(self.path))

    def drop(self) -> None:
        """Remove everything held of this file but its record."""
        self.path.unlink(missing_ok=True)
        for path in self._parts.glob(f"{self._digest}.*"):
            if path != self._record:
                path.unlink()

    def _join(self) -> None:
        """Append the pieces to one file; a piece is removed only when it is safe in there, so a kill loses none."""
        if not self._joined.exists():
            # Renamed, not copied: a file of one piece costs no second writing.
            self.pieces[0].path.replace(self._joined)
        held = self._joined.stat().st_size
        with self._joined.open("r+b") as sink:
            for piece in self.pieces:
                if piece.path.exists():
                    # A kill while this piece was copied has left a part of it behind.
                    if held != piece.start:
                        sink.truncate(piece.start)
                    sink.seek(piece.start)
                    with piece.path.open("rb") as stream:
                        shutil.copyfileobj(stream, sink, _CHUNK)
                    held = sink.tell()
                    _flush(sink)
                    piece.path.unlink()
            _flush(sink)

    def _hash(self, path: Path) -> dict[str, str]:
        digests = {"sha256": hashlib.sha256()}
        size = path.stat().st_size
        if self.remote.checksum and self.remote.checksum[0] == "git-blob":
            # git's hash of a file has its length in front; FIPS builds of OpenSSL refuse SHA-1 unless told that no security rests on it.
            digests["git-blob"] = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as stream:
            while block := stream.read(_CHUNK):
                for digest in digests.values():
                    digest.update(block)
        measured = {"size": str(size), **{name: digest.hexdigest() for name, digest in digests.items()}}
        self.sha256 = measured["sha256"]
        return measured

    def _problem(self, measured: Mapping[str, str]) -> str:
        size = self.remote.size
        if size is not None and measured["size"] != str(size):
            return f"has {measured['size']} bytes, its source says {size}"
        for origin, (algorithm, value) in (
            ("its source says", self.remote.checksum or ("", "")),
            ("data.sha256 says", ("sha256", self.item.sha256 or "")),
        ):
            if value and measured[algorithm] != value:
                return f"has {algorithm} {measured[algorithm]}, {origin} {value}"
        return ""

    def _same_version(self) -> bool:
        """Whether what is held may be continued: same version and size, and something to tell versions apart by."""
        record, remote = self._read(), self.remote
        return (
            bool(remote.version or remote.checksum or self.item.sha256)
            and record.get("version") == remote.version
            and record.get("size") == remote.size
            and "piece_bytes" in record
        )

    def _part(self, number: int) -> Path:
        return self._parts / f"{self._digest}.{number:05d}"

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self._record.read_text())
        except (OSError, ValueError):
            return {}

    def _write(self, record: Mapping[str, Any]) -> None:
        temporary = self._record.with_suffix(".tmp")
        with temporary.open("w") as stream:
            stream.write(json.dumps(record))
            _flush(stream)
        temporary.replace(self._record)


@dataclass
class Piece:
    """A range of a file and the file that its bytes are appended to."""

    file: PartialFile
    number: int
    start: int
    stop: int | None
    path: Path

    def held(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size if self.path.exists() else 0

    def complete(self, joined: int) -> bool:
        """Whether all bytes are here, or already among the first `joined` of the joined file."""
        if self.stop is None:
            return joined > 0
        # The piece of an empty file ends at 0, which any joined file would seem to hold.
        return joined >= self.stop > 0 or (self.path.exists() and self.held() == self.stop - self.start)


def _file_name(remote: Remote) -> str:
    """Return the end of the file's name, with the suffixes that say how to read it, short enough for a file system (255 bytes)."""
    # The end is kept, for its suffixes; a character cut in two at the front is dropped.
    name = Path(remote.name.partition("?")[0]).name.encode()[-200:].decode(errors="ignore")
    return name + remote.encoding


def _flush(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
