"""Folders as compressed parts of bounded size, and back. Standard library only: it also runs on the bare machine.

Usage there: python benchmarks/gpu/pack.py PARTS TARGET. Invariants: (1) `listing.json` is written last, so parts without it were never
finished; (2) nothing is unpacked before every part has the size and the sha256 of the listing.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import shutil
import sys
import tarfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

LISTING = "listing.json"
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 2, "dict_size": 64 << 20}]


class Parts(io.RawIOBase):
    """A stream that is cut into files `part.000`, `part.001`, ... of at most `size` bytes, hashed while they are written."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        self.entries: list[dict[str, Any]] = []
        self._file: io.BufferedWriter | None = None
        self._hash, self._room = hashlib.sha256(), 0

    def writable(self) -> bool:
        """Say yes."""
        return True

    def write(self, data: Any) -> int:
        """Append bytes, opening the next part whenever one is full."""
        rest = memoryview(data).cast("B")
        while rest:
            if self._room == 0:
                self._next()
            piece = rest[: self._room]
            assert self._file
            self._file.write(piece)
            self._hash.update(piece)
            self._room -= len(piece)
            rest = rest[len(piece) :]
        return memoryview(data).nbytes

    def finish(self) -> None:
        """Close the last part."""
        if self._file:
            name, size = Path(self._file.name).name, self._file.tell()
            self._file.close()
            self.entries.append({"name": name, "bytes": size, "sha256": self._hash.hexdigest()})
            self._file = None

    def _next(self) -> None:
        self.finish()
        self._file = (self.folder / f"part.{len(self.entries):03d}").open("wb")
        self._hash, self._room = hashlib.sha256(), self.size


def pack(source: Path, folder: Path, size: int, origin: str, leave_out: Sequence[str] = ()) -> dict[str, Any]:
    """Pack `source` into parts of at most `size` bytes below `folder`; return the listing. `origin` says what it was made from."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    parts: Any = Parts(folder, size)
    with lzma.open(parts, "wb", filters=_FILTERS) as stream, tarfile.open(fileobj=stream, mode="w|") as archive:
        archive.add(source, arcname=".", filter=_without(leave_out))
    parts.finish()
    listing = {"origin": origin, "parts": parts.entries}
    temporary = folder / f"{LISTING}.tmp"
    temporary.write_text(json.dumps(listing, indent=1))
    temporary.replace(folder / LISTING)
    return listing


def packed(folder: Path, origin: str) -> dict[str, Any] | None:
    """Return the listing of parts that stand and were made from `origin`, else None."""
    try:
        listing = json.loads((folder / LISTING).read_text())
    except FileNotFoundError:
        return None
    return listing if listing["origin"] == origin and not torn(folder, listing) else None


def torn(folder: Path, listing: dict[str, Any]) -> list[str]:
    """Return the parts that are missing, cut or altered."""
    bad: list[str] = []
    for entry in listing["parts"]:
        path = folder / entry["name"]
        whole = path.is_file() and path.stat().st_size == entry["bytes"]
        if not whole or hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
            bad.append(entry["name"])
    return bad


def unpack(folder: Path, target: Path) -> None:
    """Bring the parts back to a folder, which appears only when it is complete. Raises ValueError for parts that do not fit."""
    listing = json.loads((folder / LISTING).read_text())
    if bad := torn(folder, listing):
        named = ", ".join(bad)
        raise ValueError(f"of {len(listing['parts'])} parts of {folder} these are missing, cut or altered: {named}; bring them again")
    temporary = target.with_name(f"{target.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)
    stream: Any = _Joined([folder / entry["name"] for entry in listing["parts"]])
    with stream, tarfile.open(fileobj=stream, mode="r|xz") as archive:
        archive.extractall(temporary, filter="data")
    temporary.rename(target)


class _Joined(io.RawIOBase):
    """Files read one after the other."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [path.open("rb") for path in paths]
        self._at = 0

    def read(self, size: int = -1) -> bytes:
        while self._at < len(self._files):
            if piece := self._files[self._at].read(size):
                return piece
            self._at += 1
        return b""

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


def _without(patterns: Sequence[str]) -> Callable[[tarfile.TarInfo], tarfile.TarInfo | None]:
    def keep(item: tarfile.TarInfo) -> tarfile.TarInfo | None:
        name = item.name.removeprefix("./")
        return None if any(fnmatch(name, pattern) for pattern in patterns) else item

    return keep


if __name__ == "__main__":
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
