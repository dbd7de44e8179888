"""How many processor cores this process may compute on: all, or its share where several serve together. Knows no library's threads."""

from __future__ import annotations

import os

__all__ = ["cores", "share_cores"]

_shared_by = 1


def cores() -> int:
    """Return the cores that this process may take, at least one."""
    return max(1, (os.cpu_count() or 1) // _shared_by)


def share_cores(processes: int) -> None:
    """Take only one of `processes` equal parts of the cores from now on; forks of this process do so, too."""
    global _shared_by
    _shared_by = processes
