"""The frame of a duel: alternate both sides, take medians, say whether the goal holds. Knows no contestant."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Duel", "alternate", "cpu_seconds"]

Measure = Callable[[], float]


@dataclass(frozen=True)
class Duel:
    """One result: medians of both sides in `unit`, their ratio (above 1: ours is better), the goal for it, and what else was measured."""

    id: str
    what: str
    unit: str
    ours: float
    peer: float
    ratio: float
    goal: float
    rounds: int
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether the ratio reaches its goal."""
        return self.ratio >= self.goal


def cpu_seconds() -> float:
    """CPU time of this process and of its ended children, user and system."""
    parts = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in parts)


def rate(work: Callable[[], int], seconds: float) -> float:
    """Return units of work per CPU-second, measured over at least `seconds` of CPU time."""
    started, done = cpu_seconds(), 0
    while (used := cpu_seconds() - started) < seconds:
        done += work()
    return done / used


def elapsed(work: Callable[[], object]) -> float:
    """Return wall seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def alternate(name: str, what: str, unit: str, ours: Measure, peer: Measure, goal: float, rounds: int, *, less: bool = False) -> Duel:
    """Measure both sides in turns and compare medians; `less` says that smaller is better."""
    pairs = [(ours(), peer()) for _ in range(rounds)]
    mine, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Duel(name, what, unit, mine, theirs, theirs / mine if less else mine / theirs, goal, rounds)
