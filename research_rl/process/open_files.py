"""How many files and connections this process may hold open. Knows the system's limit; opens nothing."""

from __future__ import annotations

import resource

__all__ = ["file_limit"]

_OTHER_FILES = 128
"""Open files that are no connections: index files, databases, logs, the listener."""


def file_limit() -> int:
    """Raise this process's limit of open files as far as it may; return how many connections it leaves room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The usual soft limit is 1,024 files; a process may raise it to the hard one by itself.
    if hard != resource.RLIM_INFINITY and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return max(soft - _OTHER_FILES, 16) if soft != resource.RLIM_INFINITY else 1 << 20
