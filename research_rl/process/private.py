"""Files and folders that their owner alone can read. Knows no content. Standard library only."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from research_rl.errors import ServiceError

__all__ = ["private_folder", "write_private"]


def write_private(path: Path, text: str) -> None:
    """Write a file of mode 0600 in one step: a reader sees the old text or the new, and nobody else sees either."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    # Left by a killed process that had the same pid.
    temporary.unlink(missing_ok=True)
    # O_EXCL: a link that somebody laid under this name is refused and not followed.
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.write(text)
    temporary.replace(path)


def private_folder(path: Path) -> Path:
    """Make a folder of mode 0700 unless it is there, and return it.

    Raises ServiceError when it belongs to another user or is a link: in a shared folder such as /tmp anybody may make it first.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    # After `mkdir`, which accepts what is there already; lstat, because a link to a folder of ours is not ours to trust.
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ServiceError(
            f"{path} is not a folder of user {os.getuid()} (owner {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o}); "
            "remove it, or set TMPDIR to a folder of your own"
        )
    if stat.S_IMODE(status.st_mode) & 0o077:
        path.chmod(0o700)
    return path
