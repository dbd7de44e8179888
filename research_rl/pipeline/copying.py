"""Give a file a second place. Knows file systems; knows no artifact.

`clone` makes a copy that no later edit of the original can alter, `place` a second name of a finished file that nobody edits any more.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path

from research_rl.pipeline.manifest import fsync

__all__ = ["clone", "place"]

_FICLONE = 0x40049409
"""Linux's request to share a file's blocks until one of the two is written to (btrfs, XFS, bcachefs)."""
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS})
"""Another file system, or one that has no second names or no more of them."""


def clone(source: Path, target: Path) -> None:
    """Give `target` the content of `source`: shared blocks where the file system can, else a copy."""
    with source.open("rb") as original, target.open("wb") as copy:
        try:
            # Not a hard link: an edit under one name, or DVC's cache, would alter the file under the other.
            fcntl.ioctl(copy.fileno(), _FICLONE, original.fileno())
        except OSError:  # another file system, or one that cannot
            shutil.copyfile(source, target)


def place(source: Path, target: Path) -> None:
    """Give a finished file a second name; a copy, on disk when this returns, where the file system has none (a folder of
    `artifacts` may be a symbolic link to another disk).

    DVC may have put a symbolic link to its cache in the file's place: then the file itself gets the name.
    Raises FileExistsError where `target` exists.
    """
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        temporary = target.with_name(f".{target.name}.copy")
        shutil.copyfile(source, temporary)
        fsync(temporary)
        temporary.rename(target)
