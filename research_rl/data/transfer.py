"""Fetch files from sources into a folder so that any interruption costs nothing. Knows retries and room on disk; `pieces` holds
what is on disk, `workers` the threads that fetch it, a source the way to its bytes.

Invariant: every wait and every number of tries is bounded.
"""

from __future__ import annotations

import fcntl
import re
import shutil
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from research_rl.config import TransferConfig
from research_rl.data.pieces import Fetched, Located, PartialFile
from research_rl.data.sources import Remote, Sources, TransientError
from research_rl.data.workers import Tell, Transfer, pause
from research_rl.errors import ConfigError, DataError

__all__ = ["check_room", "fetch", "locate", "locked"]


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
    missing = sum(PartialFile(item, folder, 1).missing() for item in files if item.remote.path is None)
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
    jobs = [PartialFile(item, folder, limits.piece_mb * 1_000_000) for item in smallest_first]
    Transfer(jobs, limits, tell).run()
    found = {job.item.name: Fetched(job.path, job.sha256, _facts(job)) for job in jobs}
    return {item.name: found[item.name] for item in files}


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


def _facts(file: PartialFile) -> dict[str, Any]:
    facts: dict[str, Any] = {"sha256": file.sha256}
    return {**facts, "version": file.remote.version} if file.remote.version else facts


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
