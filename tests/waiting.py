"""Wait for what another process does. How long a busy machine takes is no property of the code, so every test waits as patiently."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

PATIENCE_S = 1800.0


def until(true: Callable[[], object], over: Callable[[], object] = lambda: False, pause_s: float = 0.1) -> bool:
    """Return whether `true()` came to hold, asked every `pause_s` seconds; give up when `over()` holds or after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not (held := bool(true())) and not over() and time.monotonic() < deadline:
        time.sleep(pause_s)
    return held or bool(true())


def ended(pid: int) -> bool:
    """Return whether a process is gone, or waits only for its parent to notice."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
