"""What processes that accept on one socket know of each other: places in shared memory. Knows numbers; knows no socket.

Invariant: each place is written by one process at a time, the one that holds it, or their parent once that one is gone.
"""

from __future__ import annotations

import mmap
import struct

__all__ = ["Board"]

_PLACE = struct.Struct("<ii")
_GONE = (0, 0)
_IDLE = 2


class Board:
    """A place holds whether its process takes connections, whether it is idle, and how many connections it has.

    Made before the processes are forked that share it.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self._memory = mmap.mmap(-1, places * _PLACE.size)

    def write(self, place: int, connections: int, *, idle: bool) -> None:
        """Say that the process of this place takes connections, and how many it has."""
        self._put(place, (1 + _IDLE * idle, connections))

    def leave(self, place: int) -> None:
        """Say that nobody takes connections there."""
        self._put(place, _GONE)

    def fewest(self) -> int:
        """Return the smallest number of connections of a process that takes some; 0 where none does."""
        return min((connections for state, connections in self._all() if state), default=0)

    def counts(self) -> tuple[int, int]:
        """Return how many processes take connections, and how many of them are idle."""
        states = [state for state, _ in self._all() if state]
        return len(states), sum(state > _IDLE for state in states)

    def _all(self) -> list[tuple[int, int]]:
        return list(_PLACE.iter_unpack(self._memory[:]))

    def _put(self, place: int, values: tuple[int, int]) -> None:
        # By assignment, which copies all bytes at once; `pack_into` clears them first, and another process could read that.
        self._memory[place * _PLACE.size : (place + 1) * _PLACE.size] = _PLACE.pack(*values)
