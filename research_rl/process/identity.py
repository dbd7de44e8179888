"""Which process a pid file means: a pid, when it started since boot, and which boot that was. Knows /proc; knows no service.

A start time in seconds since 1970 changes when the clock is set, so it is counted in clock ticks since boot.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Identity"]

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_ENDED = {b"Z", b"X"}


@dataclass(frozen=True)
class Identity:
    """A process that no later process with the same pid is taken for; `started` is in clock ticks since boot."""

    pid: int
    started: int
    boot: str

    @classmethod
    def of(cls, pid: int) -> Identity | None:
        """Return the identity of a process, None when it ended."""
        try:
            # Pid and name are cut off: the name may hold spaces. The rest begins with field 3 of proc(5), the state; 22 is the start.
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        # The second when the process ends between opening and reading.
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in _ENDED else cls(pid, int(fields[19]), _BOOT.read_text().strip())

    @classmethod
    def own(cls) -> Identity:
        """Return the identity of this process."""
        own = cls.of(os.getpid())
        assert own, "this process runs"
        return own

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Identity:
        """Read what `to_json` gave. A record of an earlier release names no boot; no living process equals it. Raises KeyError."""
        return cls(int(record["pid"]), int(record["started"]), str(record.get("boot", "")))

    def to_json(self) -> dict[str, Any]:
        """Return the fields for a pid file."""
        return asdict(self)

    def alive(self) -> bool:
        """Return whether this very process still runs."""
        return Identity.of(self.pid) == self
