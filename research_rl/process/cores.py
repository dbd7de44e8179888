"""The processor: how many cores this process may compute on, all or its share where several serve together, and which numbers they
multiply. Knows no library's threads.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cores", "multiplies_bfloat16", "share_cores"]

_shared_by = 1


def cores() -> int:
    """Return the cores that this process may take, at least one."""
    return max(1, (os.cpu_count() or 1) // _shared_by)


def share_cores(processes: int) -> None:
    """Take only one of `processes` equal parts of the cores from now on; forks of this process do so, too."""
    global _shared_by
    _shared_by = processes


def multiplies_bfloat16() -> bool:
    """Return whether the processor multiplies matrices of bfloat16; otherwise libraries emulate that, several times slower than float32."""
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text(errors="replace") if cpu.is_file() else ""
    return " amx_bf16" in flags or " avx512_bf16" in flags
