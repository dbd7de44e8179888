"""Append-only files of JSON records, one a line, that survive a full disk and a killed writer. Knows no record's meaning.

Invariants: (1) a record that could not be written whole is cut off again, so that the next one starts on its own line; (2) the torn
last line of a killed writer is cut off, and said so in the log, before anything is appended; (3) a reader gets whole lines only, and
a line that is not JSON costs itself alone; (4) threads and processes may append to one file at the same time.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research_rl.pipeline.json_files import parse

__all__ = ["append", "own_file", "read", "to_line"]

_BLOCK = 1 << 16
logger = logging.getLogger(__name__)


def own_file(folder: Path) -> Path:
    """Return the file of this process in a folder into which processes of several machines write."""
    # With the host's name, since processes of two machines may have the same id.
    return folder / f"{socket.gethostname()}-{os.getpid()}.jsonl"


def append(path: Path, record: Mapping[str, Any], *, sync: bool = False, private: bool = False) -> None:
    """Add one record; with `sync` it is on the disk, not only with the operating system, when this returns.

    A file that is made here is for its owner alone where it is `private`. Makes missing folders.
    Raises OSError when the record does not fit; the file then ends with the record before it.
    """
    line, handle = to_line(record), _open(path, 0o600 if private else 0o644)
    try:
        # Released with the handle. Without it a line that another writer has begun would be taken for a torn one.
        fcntl.flock(handle, fcntl.LOCK_EX)
        # A killed writer's unfinished line would otherwise run together with this one and cost both.
        size = _mend(handle, path)
        _write_whole(handle, line, size)
        if sync:
            os.fsync(handle)
    finally:
        os.close(handle)


def to_line(record: Mapping[str, Any]) -> bytes:
    """Return a record as its line."""
    # JSON from elsewhere can hold half of a surrogate pair, for which UTF-8 has no bytes.
    return (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode(errors="backslashreplace")


def read(path: Path, offset: int = 0) -> list[tuple[int, Any]]:
    """Return the records that begin at byte `offset` or later, each with the offset behind it; none while there is no file.

    A line that is not JSON is logged and passed over.
    """
    if not path.is_file():
        return []
    with path.open("rb") as stream:
        stream.seek(offset)
        block = stream.read()
    records: list[tuple[int, Any]] = []
    # What follows the last newline is still being written, or torn; the next reading begins there.
    for line in block.split(b"\n")[:-1]:
        offset += len(line) + 1
        try:
            records.append((offset, parse(line)))
        except ValueError as error:
            logger.warning("%s: the line that ends at byte %d is not JSON and is passed over (%s)", path, offset, error)
    return records


def _open(path: Path, mode: int) -> int:
    """Open for reading and appending; only the first record has to make the folder."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    try:
        return os.open(path, flags, mode)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, mode)


def _mend(handle: int, path: Path) -> int:
    """Cut off a torn last line; return the file's size."""
    size = os.fstat(handle).st_size
    if size == 0 or os.pread(handle, 1, size - 1) == b"\n":
        return size
    whole = _end_of_whole_lines(handle, size)
    os.ftruncate(handle, whole)
    logger.warning("%s ended with %d bytes of an unfinished line, which are cut off", path, size - whole)
    return whole


def _end_of_whole_lines(handle: int, size: int) -> int:
    stop = size
    while stop:
        start = max(0, stop - _BLOCK)
        place = os.pread(handle, stop - start, start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        stop = start
    return 0


def _write_whole(handle: int, line: bytes, size: int) -> None:
    """Write all of a line, or nothing: a disk that fills up takes the first part of it and refuses the rest."""
    written = 0
    try:
        while written < len(line):
            written += os.write(handle, line[written:])
    except OSError:
        os.ftruncate(handle, size)
        raise
