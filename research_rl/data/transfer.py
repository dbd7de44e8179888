"""Fetch files from sources into a folder; after an interruption only what is missing is fetched. Knows retries and room on disk;
leaves what is on disk to `pieces`, the threads that fetch to `workers`, and the way to the bytes to a source.

Invariant: every wait and every number of tries is bounded.
"""

from __future__ import annotations

import fcntl
import re
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from research_rl.config import TransferConfig
from research_rl.data.pieces import Fetched, Located, PartialFile
from research_rl.data.sources import FileSource, Remote, Sources, TransientError
from research_rl.data.workers import Tell, Transfer, retrying
from research_rl.errors import ConfigError, DataError

__all__ = ["check_room", "fetch", "locate", "locked"]


def locate(names: Sequence[str], sources: Sources, sha256: Mapping[str, str], limits: TransferConfig, tell: Tell) -> list[Located]:
    """Ask the sources what every name stands for. Raises DataError for a missing file or a checksum that cannot fit."""
    located: list[Located] = []
    for number, name in enumerate(names):
        tell(f"locating {name}", 0.02 * number / len(names))
        source, inner = sources.of(name)
        remote = _locate(source, inner, limits)
        located.append(Located(name, source, remote, _expected(name, sha256.get(name), remote)))
    return located


def check_room(files: Sequence[Located], folder: Path, target: Path, output: int) -> None:
    """Raise DataError unless the disks hold what is still to fetch into `folder` and `output` bytes in `target`."""
    # The size of pieces, 1 here, plays no part in how many bytes are missing.
    missing = sum(PartialFile(file, folder, 1).missing() for file in _distinct(files) if file.remote.path is None)
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
            # The kernel releases this lock however the process ends; a file that marks the lock would be left behind by a kill.
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process downloads into {folder}; wait for it or end it") from None
        yield


def fetch(files: Sequence[Located], folder: Path, limits: TransferConfig, tell: Tell) -> dict[str, Fetched]:
    """Bring the files into `folder` and return them by name; files of a local folder stay where they are.

    A file that goes by several names is fetched once. Raises DataError naming file and reason when tries are used up; what was
    fetched stays for the next call. Any other error of a thread is raised as it is.
    """
    # A wrong checksum of a small file is told before hours go into a large one.
    smallest_first = sorted(_distinct(files), key=lambda file: file.remote.size or 0)
    jobs = {file.digest: PartialFile(file, folder, limits.piece_mb * 1_000_000) for file in smallest_first}
    Transfer(list(jobs.values()), limits, tell).run()
    return {file.name: _fetched(jobs[file.digest]) for file in files}


def _distinct(files: Sequence[Located]) -> list[Located]:
    """Return each file of a source once, with the sha256 that any of its names expects. Raises ConfigError when two are expected."""
    by_digest: dict[str, Located] = {}
    for file in files:
        first = by_digest.setdefault(file.digest, file)
        if first.sha256 and file.sha256 and first.sha256 != file.sha256:
            raise ConfigError(
                f"data.sha256 expects {first.sha256} of {first.name} and {file.sha256} of {file.name}, which are one file; correct one"
            )
        if file.sha256:
            by_digest[file.digest] = replace(first, sha256=file.sha256)
    return list(by_digest.values())


def _locate(source: FileSource, name: str, limits: TransferConfig) -> Remote:
    try:
        return retrying(limits.attempts)(source.locate, name)
    except TransientError as error:
        raise DataError(f"{error}; gave up after {limits.attempts} tries; check the address and the network") from error


def _expected(name: str, sha256: str | None, remote: Remote) -> str | None:
    if sha256 is None:
        return None
    sha256 = sha256.lower()
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ConfigError(f"data.sha256: {sha256!r} for {name} is no sha256; write its 64 hexadecimal digits")
    if remote.checksum and remote.checksum[0] == "sha256" and remote.checksum[1] != sha256:
        raise DataError(f"{remote.address} has sha256 {remote.checksum[1]}, data.sha256 says {sha256} for {name}; correct one of them")
    return sha256


def _fetched(file: PartialFile) -> Fetched:
    facts: dict[str, Any] = {"sha256": file.sha256}
    if file.remote.version:
        facts["version"] = file.remote.version
    return Fetched(file.path, file.sha256, facts, encoded=bool(file.remote.encoding))


def _per_disk(needs: Mapping[Path, int]) -> dict[Path, int]:
    """Add up needs of folders on one disk, under the first of them."""
    places: dict[int, tuple[Path, int]] = {}
    for folder, need in needs.items():
        # A folder that is to be made will lie on the disk of the nearest one that stands.
        while not folder.exists():
            folder = folder.parent
        device = folder.stat().st_dev
        place, before = places.get(device, (folder, 0))
        places[device] = (place, before + need)
    return dict(places.values())
