"""Copy a file so that neither copy can alter the other, without the cost of a copy where the file system shares blocks."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

__all__ = ["clone"]

_FICLONE = 0x40049409
"""Linux's request to share a file's blocks until one of the two is written to (btrfs, XFS, bcachefs)."""


def clone(source: Path, target: Path) -> None:
    """Give `target` the content of `source`: shared blocks where the file system can, else a copy."""
    with source.open("rb") as original, target.open("wb") as copy:
        try:
            # Not a hard link: an edit under one name, or DVC's cache, would alter the file under the other.
            fcntl.ioctl(copy.fileno(), _FICLONE, original.fileno())
        except OSError:  # another file system, or one that cannot
            shutil.copyfile(source, target)
