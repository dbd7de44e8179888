"""A gate before searches that closes when too many fail. Knows fault counts, time and a probe; knows no HTTP, no episode.

Invariants: (1) it is closed for at most `longest_s` at a stretch; (2) it opens once the probe succeeds; (3) what the model
did wrong closes nothing; (4) every closing is noted once, and so is its end.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from research_rl.episode.trajectory import SearchFault

__all__ = ["Note", "Patience", "PauseGate"]

_PROBE_EVERY_S = 1.0


@dataclass(frozen=True)
class Patience:
    """When searches pause: the last `least` failed, or more than `share` of those ended in the last `window_s` and at least `least`.

    A service that dies after many good answers shows in the first way long before it does in the second.
    """

    window_s: float
    least: int
    share: float
    longest_s: float


@dataclass(frozen=True)
class Note:
    """What happened to the gate. `faults` counts the window's failures, `searches` all that ended in it; `at` is Unix time."""

    event: Literal["paused", "resumed", "gave_up"]
    at: float
    faults: dict[str, int]
    searches: int

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready record."""
        return {"event": self.event, "at": self.at, "faults": self.faults, "searches": self.searches}


class PauseGate:
    """A `SearchGate`; for one event loop. `probe` says whether searching works again and may take its time; `note` must not raise."""

    def __init__(self, probe: Callable[[], Awaitable[bool]], patience: Patience, note: Callable[[Note], None]) -> None:
        self._probe, self._patience, self._note = probe, patience, note
        self._window: deque[tuple[float, SearchFault | None]] = deque()
        self._open = asyncio.Event()
        self._open.set()
        self._watcher: asyncio.Task[None] | None = None

    @property
    def closed(self) -> bool:
        """Whether searches wait."""
        return not self._open.is_set()

    async def wait(self) -> None:
        """Return once the gate is open."""
        await self._open.wait()

    def report(self, fault: SearchFault | None) -> None:
        """Count a search's end, and close the gate when too many failed. What ends while it is closed was asked before: ignored."""
        if self.closed:
            return
        now = time.monotonic()
        # What the model did wrong, such as an empty query, shows that the service answers.
        self._window.append((now, fault if fault is not None and fault.is_service else None))
        # Ends at the entry of this moment at the latest.
        while self._window[0][0] < now - self._patience.window_s:
            self._window.popleft()
        if fault is not None and self._too_many():
            self._open.clear()
            # Kept, since the event loop itself holds tasks by weak references only.
            self._watcher = asyncio.create_task(self._watch())

    def _faults(self) -> dict[str, int]:
        return dict(Counter(str(fault) for _, fault in self._window if fault is not None))

    def _too_many(self) -> bool:
        failed, least = sum(self._faults().values()), self._patience.least
        if failed < least:
            return False
        in_a_row = all(fault is not None for _, fault in list(self._window)[-least:])
        return in_a_row or failed > self._patience.share * len(self._window)

    async def _watch(self) -> None:
        self._tell("paused")
        try:
            async with asyncio.timeout(self._patience.longest_s):
                await self._until_well()
            self._tell("resumed")
        except TimeoutError:
            self._tell("gave_up")
        finally:
            # The failures from before would close the gate again at the first one after.
            self._window.clear()
            self._open.set()

    async def _until_well(self) -> None:
        while not await self._probe():
            await asyncio.sleep(_PROBE_EVERY_S)

    def _tell(self, event: Literal["paused", "resumed", "gave_up"]) -> None:
        self._note(Note(event, time.time(), self._faults(), len(self._window)))
