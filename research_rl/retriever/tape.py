"""The search tape: what the searches of one index brought, in one compact database that can be searched in the index's place.

Knows queries, replies and files; knows no HTTP and no episode. Invariants: (1) a reply comes back as it was recorded: ids, texts, order
and scores, bit by bit; (2) a query with a number of passages has one reply, the first that was kept; (3) each process records into a
part of its own, a database that loses at most the record it was in when its process is killed; (4) parts become an artifact with a
manifest, replaced as a whole, and are removed only after that.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import sqlite3
import struct
import zlib
from collections.abc import Generator, Iterable
from contextlib import closing, contextmanager
from hashlib import blake2b
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

from research_rl.episode.agent import SearchFailure
from research_rl.episode.trajectory import Passage, SearchFault
from research_rl.errors import ManifestError, StorageError
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import Workspace
from research_rl.pipeline.taped import PARENTS, folder_of, manifest_folder

__all__ = ["FILE", "Reply", "Shelf", "Tape", "TapePart"]

FILE = "searches.sqlite"
"""The database of a published tape."""
_STAGE, _SHOWN = "tape", 12
_DIGEST, _SCORE = 16, struct.Struct("<d")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS passages (digest BLOB PRIMARY KEY, id BLOB NOT NULL, contents BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS replies (query BLOB, top_k INTEGER, hits BLOB, refusal BLOB, PRIMARY KEY (query, top_k)) WITHOUT ROWID;
"""
_DIFFERING = """
SELECT count(*) FROM part.replies p JOIN replies r USING (query, top_k) WHERE p.hits IS NOT r.hits OR p.refusal IS NOT r.refusal
"""
_LOG = logging.getLogger(__name__)

Reply = list[Passage] | SearchFailure
"""Passages, or the retriever's refusal of this very query."""


class Tape:
    """The replies of one database, each passage once, texts compressed.

    A reply's `hits` are the digests of its passages with their scores; texts are UTF-8 in which half a surrogate pair, as JSON from
    elsewhere may hold it, keeps its bytes. For one thread at a time.
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    @classmethod
    def open(cls, path: Path) -> Tape:
        """Open a published tape for reading only. Raises ManifestError for a file that is no tape."""
        # Immutable: a published file never changes, so no reader needs a lock, and the folder may be read-only.
        database = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro&immutable=1", uri=True, check_same_thread=False)
        try:
            database.execute("SELECT count(*) FROM (SELECT 1 FROM replies LIMIT 1)")
        except sqlite3.DatabaseError as error:
            database.close()
            raise ManifestError(f"{path} cannot be read as a tape ({error}); remove {path.parent} and record again") from None
        return cls(database)

    def find(self, query: str, top_k: int) -> Reply | None:
        """Return the reply to a query, None when it was not recorded."""
        row = self._database.execute("SELECT hits, refusal FROM replies WHERE query=? AND top_k=?", (_bytes(query), top_k)).fetchone()
        if row is None:
            return None
        hits, refusal = row
        if refusal is not None:
            return SearchFailure(_text(refusal), SearchFault.REFUSED)
        size = _DIGEST + _SCORE.size
        return [self._passage(hits[place : place + size]) for place in range(0, len(hits), size)]

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    def _passage(self, hit: bytes) -> Passage:
        row = self._database.execute("SELECT id, contents FROM passages WHERE digest=?", (hit[:_DIGEST],)).fetchone()
        return Passage(_text(row[0]), _text(zlib.decompress(row[1])), _SCORE.unpack(hit[_DIGEST:])[0])


class TapePart(Tape):
    """What one process records: a tape of its own in `folder`, locked for as long as it is open. Raises OSError and sqlite3.Error."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path, self._lock = _new(folder)
        database = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
        # One process alone uses it, so that its log needs no shared memory, which network file systems lack; a record is not waited
        # for on the disk, yet the file is whole after a power cut.
        for setting in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL"):
            database.execute(f"PRAGMA {setting}")
        database.executescript(_SCHEMA)
        super().__init__(database)

    def add(self, query: str, top_k: int, reply: Reply) -> None:
        """Record a reply unless the query has one."""
        refusal = _bytes(reply.reason) if isinstance(reply, SearchFailure) else None
        passages = [] if isinstance(reply, SearchFailure) else [(_digest(passage), passage) for passage in reply]
        hits = b"".join(digest + _SCORE.pack(passage.score) for digest, passage in passages)
        known = "SELECT 1 FROM passages WHERE digest=?"
        new = {digest: each for digest, each in passages if self._database.execute(known, (digest,)).fetchone() is None}
        rows = [(digest, _bytes(each.id), zlib.compress(_bytes(each.contents))) for digest, each in new.items()]
        # All or nothing: a reply never names a passage that is not there.
        self._database.execute("BEGIN")
        try:
            self._database.executemany("INSERT OR IGNORE INTO passages VALUES (?, ?, ?)", rows)
            self._database.execute("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?)", (_bytes(query), top_k, hits, refusal))
            self._database.execute("COMMIT")
        except BaseException:
            # Where the disk is full SQLite may have rolled back by itself.
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Close the part, to be taken into the tape; one without a record is removed."""
        empty = self._database.execute("SELECT NOT EXISTS (SELECT 1 FROM replies)").fetchone()[0]
        super().close()
        if empty:
            _remove(self._path)
        os.close(self._lock)


class Shelf:
    """The tape of the index that a workspace's manifest names, and the parts that were recorded for it and are not yet on it."""

    def __init__(self, workspace: Workspace, index: Manifest) -> None:
        self._workspace, self._index = workspace, index
        self.folder = folder_of(workspace, index.hash)
        work = workspace.work(f"tape-{index.hash[:_SHOWN]}")
        self.parts, self.missing = work / "parts", work / "missing"

    def standing(self, *, verify: bool = True) -> Manifest | None:
        """Return the manifest of the published tape, None when there is none or it is torn."""
        artifact = manifest.found(self.folder, verify=verify)
        return artifact if artifact and artifact.parents.get("index") == self._index.hash else None

    def gather(self) -> Manifest | None:
        """Publish what the finished parts hold together with the tape that stands, and remove them; return the manifest.

        Parts that a living process writes are left to it.
        """
        with self._alone(), _finished(self.parts) as parts:
            if parts:
                self._publish(parts)
            for path in parts:
                _remove(path)
        return self.standing(verify=False)

    def forget(self) -> None:
        """Remove the finished parts: nobody knows which index gave their replies."""
        with _finished(self.parts) as parts:
            for path in parts:
                _remove(path)

    @contextmanager
    def _alone(self) -> Generator[None]:
        """Wait until no other process publishes: of two that read the same tape the later would drop what the earlier added."""
        self.parts.parent.mkdir(parents=True, exist_ok=True)
        with (self.parts.parent / "lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _publish(self, parts: Iterable[Path]) -> None:
        before = self.standing()
        index = self._index
        with manifest.publish(self.folder, _STAGE, index.hash, {"index": index}, {"index": index.hash}) as staging:
            target = staging.path / FILE
            if before:
                shutil.copyfile(self.folder / FILE, target)
            differing = before.counts["differing"] if before else 0
            for name in PARENTS:
                # With them the tape is searched also where the index is not.
                manifest_folder(staging.path, name).mkdir()
                shutil.copyfile(self._source(name), manifest_folder(staging.path, name) / manifest.MANIFEST)
            try:
                counts = _joined(target, parts)
            except sqlite3.Error as error:
                raise StorageError(f"{target} cannot be written ({error}); make room and run again: what was recorded is kept") from None
            staging.counts |= {**counts, "differing": differing + counts["differing"]}

    def _source(self, name: str) -> Path:
        own = self._workspace.folder(name) / manifest.MANIFEST
        return own if own.is_file() else manifest_folder(self.folder, name) / manifest.MANIFEST


def _joined(target: Path, parts: Iterable[Path]) -> dict[str, int]:
    """Add parts to the database `target`, which may not be there yet; return how much it holds then, and how many replies differed."""
    with closing(sqlite3.connect(target, isolation_level=None)) as database:
        # Of a kill nothing has to be undone, as the folder never becomes an artifact then; of a part that proves torn its records have.
        database.execute("PRAGMA journal_mode=MEMORY")
        database.executescript(_SCHEMA)
        differing = sum(_take(database, path) for path in parts)
        counts = {name: int(database.execute(f"SELECT count(*) FROM {name}").fetchone()[0]) for name in ("replies", "passages")}
    return {**counts, "differing": differing}


def _take(database: sqlite3.Connection, part: Path) -> int:
    """Copy what is new in a part; return how many of its replies differ from those that stand, as parallel processes may bring them."""
    try:
        # Opened by itself first: that finishes or undoes what a killed process left in its log.
        with closing(sqlite3.connect(part)) as opened:
            opened.executescript(_SCHEMA)
        database.execute("ATTACH ? AS part", (str(part),))
        try:
            differing = int(database.execute(_DIFFERING).fetchone()[0])
            for table in ("passages", "replies"):
                database.execute(f"INSERT OR IGNORE INTO {table} SELECT * FROM part.{table}")
        finally:
            database.execute("DETACH part")
        return differing
    except sqlite3.DatabaseError as error:
        # Its subclasses tell of a full disk and the like, after which the part is still good.
        if type(error) is not sqlite3.DatabaseError:
            raise
        _LOG.warning("%s is torn (%s); the searches that were recorded there have to be made again", part, error)
        return 0


def _new(folder: Path) -> tuple[Path, int]:
    """Lock a new part; return its path and the handle that holds the lock."""
    while True:
        path = folder / f"{uuid4().hex}.part"
        # A file beside the database: SQLite has locks of its own on that, and some file systems know only one kind.
        handle = os.open(_lock(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        fcntl.flock(handle, fcntl.LOCK_EX)
        # Between the two lines above another process may have taken it for a finished part and removed it.
        if os.fstat(handle).st_nlink:
            return path, handle
        os.close(handle)


@contextmanager
def _finished(folder: Path) -> Generator[list[Path]]:
    """Yield the parts whose processes have closed them or died, locked."""
    held: dict[Path, int] = {}
    try:
        for lock in sorted(folder.glob("*.lock")):
            try:
                handle = os.open(lock, os.O_RDWR)
            except FileNotFoundError:  # taken by another process meanwhile
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held[lock.with_suffix(".part")] = handle
            except BlockingIOError:
                os.close(handle)
        yield list(held)
    finally:
        for handle in held.values():
            os.close(handle)


def _lock(part: Path) -> Path:
    return part.with_suffix(".lock")


def _remove(part: Path) -> None:
    """Remove a part; its lock goes last, so that a kill in between leaves nothing that is not found again."""
    for path in (part.with_name(f"{part.name}-wal"), part.with_name(f"{part.name}-shm"), part, _lock(part)):
        path.unlink(missing_ok=True)


def _digest(passage: Passage) -> bytes:
    return blake2b(_bytes(passage.id) + b"\0" + _bytes(passage.contents), digest_size=_DIGEST).digest()


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(value: bytes) -> str:
    return value.decode("utf-8", "surrogatepass")
