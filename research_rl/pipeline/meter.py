"""Seconds, CPU-seconds and peak memory of a piece of work in this process, and how times are written. Knows the kernel's counters.

Other work in the same process counts too.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

__all__ = ["Meter", "duration", "moment", "peak_bytes"]

# See /proc/pid/clear_refs in proc(5): the peak begins anew at the present size.
_RESET_PEAK = "5"


class Meter:
    """Starts with its construction; where the kernel allows it, the peak of what ran before is forgotten."""

    def __init__(self) -> None:
        self._started, self._cpu = time.monotonic(), time.process_time()
        try:
            Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        except OSError:  # no such file outside Linux, or not ours to write: the peak then is the process's
            return

    def read(self) -> dict[str, float]:
        """Return `seconds`, `cpu_seconds` and `peak_mib` (resident memory, mapped files included) since the start."""
        seconds, cpu = time.monotonic() - self._started, time.process_time() - self._cpu
        return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "peak_mib": round(peak_bytes() / 2**20, 1)}


def moment(iso: str) -> str:
    """Return an ISO time as people read it, to the minute: `2026-11-27 09:30`."""
    return iso[:16].replace("T", " ")


def duration(seconds: float) -> str:
    """Return seconds in the units that people use: `7.5 s`, `3 min 20 s`, `61 h 5 min`."""
    # Rounded first: 59.97 seconds are a minute.
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"


def peak_bytes() -> int:
    """Return the process's highest resident memory."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
    except OSError:
        import resource

        # Bytes on macOS, KiB elsewhere.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
