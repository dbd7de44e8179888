"""A uvicorn server that answers what it accepted before it ends. Knows signals and time; knows no application.

Invariants: (1) from SIGTERM on the application drains: it refuses new work, and what was accepted goes on for up to `drain_s`; what still
goes on then is told to end and has a moment for its last words;
(2) a second signal ends at once; (3) an application that failed ends the server.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import FrameType

import uvicorn

__all__ = ["DrainingServer"]

_TICKS = 10
_QUIET_S = 0.2
"""How long no request may be under way before a draining server ends: a client may be between two packets."""
_LAST_WORDS_S = 3.0
"""What requests that are cut off get to say so."""


class DrainingServer(uvicorn.Server):
    """Calls `drain` at the first signal, ends once `active` says 0 or `drain_s` is over, and at once when `failed` says so.

    `cut`, where there is one, is called when `drain_s` is over: it lets requests end with an answer that says why.
    """

    def __init__(
        self,
        options: uvicorn.Config,
        *,
        drain: Callable[[], None],
        active: Callable[[], int],
        drain_s: float,
        failed: Callable[[], bool] = lambda: False,
        cut: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(options)
        self._cut = cut
        self._drain, self._active, self._drain_s, self._failed = drain, active, drain_s, failed
        self._draining = False
        self._until = self._quiet_since = float("inf")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start to drain; a second signal ends at once."""
        if self._draining:
            super().handle_exit(sig, frame)
            return
        # uvicorn raises what stands here once more at its end, so that the process ends as by the signal.
        self._captured_signals.append(sig)
        self._draining = True
        self._drain()
        self._until = time.monotonic() + self._drain_s

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end."""
        # uvicorn asks ten times a second; files are looked at once.
        failed = counter % _TICKS == 0 and self._failed()
        return failed or await super().on_tick(counter) or self._drained()

    def _drained(self) -> bool:
        now = time.monotonic()
        if self._active() or not self._draining:
            self._quiet_since = float("inf")
        else:
            self._quiet_since = min(self._quiet_since, now)
        if now >= self._until and self._cut:
            cut, self._cut = self._cut, None
            cut()
            self._until = now + _LAST_WORDS_S
        return now >= min(self._quiet_since + _QUIET_S, self._until)
