"""How long a piece of work still takes, from how fast it went lately. Knows shares and a clock; knows no stage.

Invariants: (1) no estimate before the work was seen to advance twice: neither its start nor what stood before counts as its rate;
(2) none when all is done; (3) while nothing advances the estimate grows.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from research_rl.pipeline.meter import duration

__all__ = ["Remaining"]

_ADVANCES = 5
_WINDOW_S = 60.0
# Questions asked together end in bursts and a trickle of long ones. Only a look that grows with the time taken sees both.
_WINDOW_PART = 0.5
_MARKS = 60
"""Advances that are remembered of a window, so that memory stays bounded."""


class Remaining:
    """Told the share done (0 to 1) with every report, returns what to add to its text: `, about 3 min 20 s left`, or nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._share: float | None = None
        self._began = 0.0
        # Times of advances, and the share that was reached; the newest last.
        self._marks = deque[tuple[float, float]]()

    def __call__(self, share: float) -> str:
        """Take a report and return the estimate as text."""
        seconds = self.seconds(share)
        return "" if seconds is None else f", about {duration(seconds)} left"

    def seconds(self, share: float) -> float | None:
        """Take a report; return the seconds left at the rate of the last minute, half the time or five advances, whichever is longest."""
        now = self._clock()
        self._take(now, share)
        if not 0 < share < 1 or len(self._marks) < 2:
            return None
        began, first = self._marks[0]
        return (1 - share) * (now - began) / (share - first)

    def _take(self, now: float, share: float) -> None:
        if self._share is None:
            self._share = share
        # Within the work a report with 0, such as that a server starts, means that it knows no share.
        elif 0 < share < self._share:
            self._share = share
            self._marks.clear()  # work that is done again: the earlier rate says nothing of it
        elif share > self._share:
            self._share = share
            self._mark(now, share)

    def _mark(self, now: float, share: float) -> None:
        if not self._marks:
            self._began = now
        window = max(_WINDOW_S, (now - self._began) * _WINDOW_PART)
        if self._marks and now - self._marks[-1][0] < window / _MARKS:
            return
        self._marks.append((now, share))
        while len(self._marks) > _ADVANCES + 1 and now - self._marks[1][0] > window:
            self._marks.popleft()
