"""Fetch files from sources into a folder so that any interruption costs nothing. Knows pieces, retries and hashes, no source.

A file is fetched in pieces side by side, each appended to a file of its own, so what is on disk says how far it came, even
after a power cut. Invariants: (1) a file stands under its name only with the size and hash of its record; (2) bytes of two
versions are never mixed; (3) every wait and every number of tries is bounded.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research_rl.config import TransferConfig
from research_rl.data.sources import Remote, Source, Sources, TransientError
from research_rl.errors import ConfigError, DataError
from research_rl.pipeline.manifest import fsync

__all__ = ["Fetched", "check_room", "fetch", "locate", "locked"]

Tell = Callable[[str, float], None]

_CHUNK = 1 << 20
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 30.0
_POLL_S = 0.1
_NOTICE_S = 15.0
_LEAVE_S = 2.0


@dataclass(frozen=True)
class Located:
    """A configured name with what it stands for and the sha256 the configuration expects, None when it names none."""

    name: str
    source: Source
    remote: Remote
    sha256: str | None


@dataclass(frozen=True)
class Fetched:
    """A file on this machine: its path, sha256 and what to record about where it came from."""

    path: Path
    sha256: str
    facts: dict[str, Any]


def locate(names: Sequence[str], sources: Sources, sha256: Mapping[str, str], limits: TransferConfig, tell: Tell) -> list[Located]:
    """Ask the sources what every name stands for. Raises DataError for a missing file or a checksum that cannot fit."""
    found: list[Located] = []
    for number, name in enumerate(names):
        tell(f"locating {name}", 0.02 * number / len(names))
        source, inner = sources.of(name)
        remote = _patiently(lambda source=source, inner=inner: source.locate(inner), limits)
        found.append(Located(name, source, remote, _expected(name, sha256.get(name), remote)))
    return found


def check_room(files: Sequence[Located], folder: Path, target: Path, output: int) -> None:
    """Raise DataError unless the disks hold what is still to fetch into `folder` and `output` bytes in `target`."""
    missing = sum(_File(item, folder, 1).missing() for item in files if item.remote.path is None)
    for place, need in _per_disk({folder: missing, target: output}).items():
        free = shutil.disk_usage(place).free
        if need > free:
            raise DataError(
                f"{need / 1e9:.2f} GB are needed below {place} ({missing / 1e9:.2f} GB to fetch, about {output / 1e9:.2f} GB for data/), "
                f"{free / 1e9:.2f} GB are free; free {(need - free) / 1e9:.2f} GB or use a workspace on a larger disk"
            )


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Keep `folder` to this process. Raises DataError when another one fetches into it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process downloads into {folder}; wait for it or end it") from None
        yield


def fetch(files: Sequence[Located], folder: Path, limits: TransferConfig, tell: Tell) -> dict[str, Fetched]:
    """Bring the files into `folder` and return them by name; files of a local folder stay where they are.

    Raises DataError naming file and reason when tries are used up; what was fetched stays for the next call.
    """
    smallest_first = sorted(files, key=lambda item: item.remote.size or 0)
    jobs = [_File(item, folder, limits.piece_mb * 1_000_000) for item in smallest_first]
    _Transfer(jobs, limits, tell).run()
    found = {job.item.name: Fetched(job.path, job.sha256, _facts(job)) for job in jobs}
    return {item.name: found[item.name] for item in files}


class _File:
    """One file on its way: its record, its pieces, its place."""

    def __init__(self, item: Located, folder: Path, piece_bytes: int) -> None:
        self.item, self.remote = item, item.remote
        digest = hashlib.sha256(f"{item.source.key}\n{item.remote.name}".encode()).hexdigest()[:16]
        self.path = item.remote.path or folder / f"{digest}-{Path(item.remote.name.partition('?')[0]).name}"
        self._parts = folder / ".parts"
        self._digest = digest
        self._record = self._parts / f"{digest}.json"
        self._joined = self._parts / f"{digest}.joined"
        self.sha256 = ""
        self.fetches = 0
        self.ranges = self.remote.ranges and bool(self.remote.version or self.remote.checksum or item.sha256)
        self._piece_bytes = piece_bytes
        self.left = 0

    def missing(self) -> int:
        """Return the bytes still to fetch, 0 when the size is unknown."""
        if self.path.exists() or self.remote.size is None or not self._same_version():
            return 0 if self.path.exists() and self._same_version() else self.remote.size or 0
        held = sum(path.stat().st_size for path in self._parts.glob(f"{self._digest}.*") if path.suffix != ".json")
        return max(0, self.remote.size - held)

    def begin(self) -> list[_Piece]:
        """Return the pieces to fetch; what another version left behind is removed."""
        self._parts.mkdir(parents=True, exist_ok=True)
        if not self._same_version():
            self.drop()
            self._write({"version": self.remote.version, "size": self.remote.size, "piece_bytes": self._piece_bytes})
        size, step = self.remote.size, int(self._read()["piece_bytes"])
        if size is None or not self.ranges:
            bounds = [(0, size)]
        else:
            bounds = [(start, min(start + step, size)) for start in range(0, max(size, 1), step)]
        joined = self._joined.stat().st_size if self._joined.exists() else 0
        self.pieces = [_Piece(self, n, start, stop, self._part(n)) for n, (start, stop) in enumerate(bounds)]
        wanted = [piece for piece in self.pieces if not piece.complete(joined)]
        self.left = len(wanted)
        return wanted

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
        self._write({**self._read(), "sha256": self.sha256})
        self._joined.replace(self.path)
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
            self.pieces[0].path.replace(self._joined)
        held = self._joined.stat().st_size
        with self._joined.open("r+b") as sink:
            for piece in self.pieces:
                if piece.path.exists():
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
            digests["git-blob"] = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        with path.open("rb") as stream:
            while block := stream.read(_CHUNK):
                for digest in digests.values():
                    digest.update(block)
        found = {"size": str(size), **{name: digest.hexdigest() for name, digest in digests.items()}}
        self.sha256 = found["sha256"]
        return found

    def _problem(self, found: Mapping[str, str]) -> str:
        size = self.remote.size
        if size is not None and found["size"] != str(size):
            return f"has {found['size']} bytes, its source says {size}"
        for origin, (algorithm, value) in (
            ("its source says", self.remote.checksum or ("", "")),
            ("data.sha256 says", ("sha256", self.item.sha256 or "")),
        ):
            if value and found[algorithm] != value:
                return f"has {algorithm} {found[algorithm]}, {origin} {value}"
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
class _Piece:
    """A range of a file and the file that its bytes are appended to."""

    file: _File
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
        return joined >= self.stop > 0 or (self.path.exists() and self.held() == self.stop - self.start)


class _Transfer:
    """Worker threads over pieces; the calling thread watches, reports and can be interrupted at any time."""

    def __init__(self, files: Sequence[_File], limits: TransferConfig, tell: Tell) -> None:
        self._files, self._limits, self._tell = files, limits, tell
        self._todo: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._errors: list[Exception] = []
        self._notice = ("", 0.0)
        self._open = len(files)
        remote = [file for file in files if file.remote.path is None]
        self._total = sum(file.remote.size or 0 for file in remote)
        self._missing = sum(file.missing() for file in remote)
        self._received = 0
        self._started = time.monotonic()

    def run(self) -> None:
        """Fetch everything or raise the first error."""
        self._todo.extend([lambda file=file: self._begin(file) for file in self._files])
        workers = [threading.Thread(target=self._work, name=f"transfer-{n}", daemon=True) for n in range(self._limits.parallel)]
        for worker in workers:
            worker.start()
        try:
            while any(worker.is_alive() for worker in workers):
                workers[-1].join(_POLL_S)
                self._report()
        finally:
            self._stop.set()
            deadline = time.monotonic() + _LEAVE_S
            for worker in workers:
                worker.join(max(0.0, deadline - time.monotonic()))
        if self._errors:
            raise self._errors[0]
        if self._open:
            raise RuntimeError(f"{self._open} files are unfinished though no transfer failed")

    def _work(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                step = self._todo.popleft() if self._todo else None
                if step is None and not self._open:
                    return
            if step is None:
                self._stop.wait(_POLL_S)
                continue
            try:
                step()
            except (DataError, OSError) as error:
                self._errors.append(_told(error))
                self._stop.set()

    def _begin(self, file: _File) -> None:
        if file.remote.path is not None:
            if problem := file.used_in_place():
                raise DataError(f"{file.path} {problem}; correct the file or data.sha256")
            self._close()
        elif file.standing():
            self._close()
        else:
            pieces = file.begin()
            if not pieces:
                self._finish(file)
            with self._lock:
                self._todo.extend([lambda piece=piece: self._piece(piece) for piece in pieces])

    def _close(self) -> None:
        with self._lock:
            self._open -= 1

    def _piece(self, piece: _Piece) -> None:
        """Fetch what is missing of a piece; the last one of a file finishes it."""
        self._fill(piece)
        if self._stop.is_set():
            return
        with self._lock:
            piece.file.left -= 1
            last = not piece.file.left
        if last:
            self._finish(piece.file)

    def _fill(self, piece: _Piece) -> None:
        fails = 0
        while not self._stop.is_set():
            before = piece.held()
            try:
                self._receive(piece)
                return
            except TransientError as error:
                fails = 1 if piece.file.ranges and piece.held() > before else fails + 1
                if fails >= self._limits.attempts:
                    raise DataError(
                        f"{error}; gave up after {fails} tries without progress; check the network and rerun to go on"
                    ) from error
                self._wait(piece, error, fails)

    def _wait(self, piece: _Piece, error: TransientError, fails: int) -> None:
        seconds = pause(fails, error.wait_s)
        self._say(f"{piece.file.item.name}: {error}; try {fails + 1} of {self._limits.attempts} in {seconds:.1f} s")
        self._stop.wait(seconds)

    def _receive(self, piece: _Piece) -> None:
        """Append bytes until the piece is whole; a transfer that cannot be continued begins anew."""
        remote = piece.file.remote
        if not piece.file.ranges:
            piece.path.unlink(missing_ok=True)
        held = piece.held()
        if piece.stop is not None and piece.start + held == piece.stop:
            piece.path.touch()
            return
        with piece.path.open("ab", buffering=0) as sink, piece.file.item.source.read(remote, piece.start + held, piece.stop) as body:
            for block in body:
                if self._stop.is_set():
                    return
                held += len(block)
                if piece.stop is not None and piece.start + held > piece.stop:
                    raise TransientError(f"{remote.address} sent more than the {piece.stop - piece.start:,} bytes asked for")
                if sink.write(block) != len(block):
                    raise OSError(errno.ENOSPC, "the last write was cut short", str(piece.path))
                with self._lock:
                    self._received += len(block)
        if piece.stop is not None and piece.start + held < piece.stop:
            raise TransientError(f"{remote.address} ended after {piece.start + held:,} of {piece.stop:,} bytes")

    def _finish(self, file: _File) -> None:
        problem = file.finish()
        if not problem:
            self._close()
            return
        file.fetches += 1
        if file.fetches >= self._limits.attempts:
            remedy = "correct data.sha256 or the file at its source"
            raise DataError(f"{file.remote.address} {problem}; refused after {file.fetches} fetches; {remedy}")
        self._say(f"{file.item.name} {problem}; fetching it again ({file.fetches + 1} of {self._limits.attempts})")
        with self._lock:
            self._missing += file.remote.size or 0
            self._todo.append(lambda: self._begin(file))

    def _say(self, text: str) -> None:
        self._notice = (text, time.monotonic())

    def _report(self) -> None:
        total, missing = self._total, max(0, self._missing - self._received)
        rate = self._received / max(time.monotonic() - self._started, 1e-9)
        done = len(self._files) - self._open
        text = f"{done} of {len(self._files)} files, {_bytes(total - missing)} of {_bytes(total)}, {_bytes(rate)}/s"
        if rate and missing:
            text += f", {_clock(missing / rate)} left"
        notice, said = self._notice
        if notice and time.monotonic() - said < _NOTICE_S:
            text += f"; {notice}"
        self._tell(text, 0.02 + 0.48 * (total - missing) / max(total, 1))


def pause(fails: int, asked_s: float = 0.0) -> float:
    """Return seconds to wait after `fails` failures in a row: doubling, drawn at random, at least what the server asked for."""
    return max(asked_s, random.uniform(0.5, 1.0) * min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** (fails - 1)))


def _patiently(call: Callable[[], Remote], limits: TransferConfig) -> Remote:
    for fails in range(1, limits.attempts):
        try:
            return call()
        except TransientError as error:
            time.sleep(pause(fails, error.wait_s))
    try:
        return call()
    except TransientError as error:
        raise DataError(f"{error}; gave up after {limits.attempts} tries; check the address and the network") from error


def _expected(name: str, wanted: str | None, remote: Remote) -> str | None:
    if wanted is None:
        return None
    wanted = wanted.lower()
    if not re.fullmatch("[0-9a-f]{64}", wanted):
        raise ConfigError(f"data.sha256: {wanted!r} for {name} is no sha256; write its 64 hexadecimal digits")
    if remote.checksum and remote.checksum[0] == "sha256" and remote.checksum[1] != wanted:
        raise DataError(f"{remote.address} has sha256 {remote.checksum[1]}, data.sha256 says {wanted} for {name}; correct one of them")
    return wanted


def _facts(file: _File) -> dict[str, Any]:
    facts: dict[str, Any] = {"sha256": file.sha256}
    return {**facts, "version": file.remote.version} if file.remote.version else facts


def _told(error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"the disk is full ({error}); free some room and rerun to go on where it stopped")
    return (
        DataError(f"cannot keep what is fetched: {error}; make the workspace writable and rerun") if isinstance(error, OSError) else error
    )


def _per_disk(needs: Mapping[Path, int]) -> dict[Path, int]:
    """Add up needs of folders on one disk, under the first of them."""
    places: dict[int, tuple[Path, int]] = {}
    for folder, need in needs.items():
        while not folder.exists():
            folder = folder.parent
        device = folder.stat().st_dev
        place, before = places.get(device, (folder, 0))
        places[device] = (place, before + need)
    return dict(places.values())


def _flush(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.2f} GB"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
