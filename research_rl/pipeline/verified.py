"""Remember which sha256 a file had when its bytes were last read, so that an unchanged one is not read again. Knows files alone.

A file is taken for unchanged while device, inode, size, time of change and time of status change (which no program can set) are what
they were when its bytes were read. Invariants: (1) a file that was modified so shortly before it was read that a second change would
bear the same time is not remembered; (2) a memory that cannot be read or written costs time, never a result.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from research_rl.pipeline.manifest import file_sha256

__all__ = ["Verified"]

_RACY_NS = 2_000_000_000
"""Coarsest clock of the file systems in use (FAT: 2 s); within it two changes may bear one time."""
_BUSY_S = 5.0
_TABLE = (
    "CREATE TABLE IF NOT EXISTS verified (device INTEGER, inode INTEGER, size INTEGER, modified INTEGER, changed INTEGER, sha256 TEXT, "
    "PRIMARY KEY (device, inode))"
)

Stamp = tuple[int, int, int, int, int]


class Verified:
    """Hashes of files, remembered in the database `path`. `clock` gives the time in nanoseconds.

    With `reread` every file is read, and what was remembered of it is replaced.
    """

    def __init__(self, path: Path, *, reread: bool = False, clock: Callable[[], int] = time.time_ns) -> None:
        self._path, self._reread, self._clock = path, reread, clock

    def sha256(self, path: Path) -> str:
        """Return the sha256 of a file's content. Raises OSError like `file_sha256`."""
        before, now = _stamp(path), self._clock()
        known = None if self._reread else self._recall(before)
        if known is not None:
            return known
        sha256 = file_sha256(path)
        if _stamp(path) == before and max(before[3:]) < now - _RACY_NS:
            self._remember(before, sha256)
        return sha256

    def _recall(self, stamp: Stamp) -> str | None:
        if not self._path.is_file():
            return None
        try:
            with closing(self._open()) as database:
                query = "SELECT sha256 FROM verified WHERE device=? AND inode=? AND size=? AND modified=? AND changed=?"
                row = database.execute(query, stamp).fetchone()
        except sqlite3.Error:
            return None
        return str(row[0]) if row else None

    def _remember(self, stamp: Stamp, sha256: str) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as database, database:
                database.execute(_TABLE)
                database.execute("INSERT OR REPLACE INTO verified VALUES (?, ?, ?, ?, ?, ?)", (*stamp, sha256))
        except sqlite3.DatabaseError as error:
            if type(error) is sqlite3.DatabaseError:  # not a database any more: made anew
                self._path.unlink(missing_ok=True)
        except OSError:  # a workspace that may only be read
            return

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=_BUSY_S)


def _stamp(path: Path) -> Stamp:
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
