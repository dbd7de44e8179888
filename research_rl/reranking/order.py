"""Put the candidates of a search in a new order, within a time. Knows pairs of texts, scores and a clock; knows no model and no index.

Invariants: (1) a passage that was read scores above 0 and stands before all that were not; those score below 0 and keep their order, so
that the replies of an index's parts can be merged by score; (2) the reply of fewer passages is the beginning of the reply of more,
whoever else is searched for at the same time; (3) the first candidates of all queries are read before the second of any.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from research_rl.episode.trajectory import Passage

__all__ = ["Found", "Pair", "Reranker", "Scorer", "Watch"]

Found = list[list[Passage]]
Pair = tuple[str, str]
"""A query and a passage."""
Watch = Callable[[int, int, float], None]
"""Told after each joint search: pairs read, pairs left for want of time, seconds."""
_FIRST = 8
"""Pairs that are read before it is known how long a pair takes."""


class Scorer(Protocol):
    """Says how well passages answer queries."""

    def scores(self, pairs: Sequence[Pair]) -> Sequence[float]:
        """Return a number a pair, greater for a better passage. Raises ModelError for one that is not finite."""
        ...


class Reranker:
    """Reads the first `candidates` passages of each query, for up to `budget_ms` milliseconds a joint search; for one thread.

    `watch` may be set to be told what each joint search took.
    """

    def __init__(
        self, scorer: Scorer, candidates: int, budget_ms: float | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.candidates, self.budget_ms = candidates, budget_ms
        self.watch: Watch | None = None
        self._scorer, self._clock = scorer, clock

    def order(self, queries: Sequence[str], results: Sequence[Sequence[Passage]]) -> Found:
        """Return the passages of each query in the new order: those that were read by their score, then the others."""
        started = self._clock()
        # By place first, so that a budget is shared out evenly among the queries.
        deepest = min(self.candidates, max(map(len, results), default=0))
        places = [(place, query) for place in range(deepest) for query in range(len(queries)) if place < len(results[query])]
        pairs = [(queries[query], results[query][place].contents) for place, query in places]
        scores: list[dict[int, float]] = [{} for _ in queries]
        read = list(self._read(pairs, started))
        # Read in order until the time is spent: pairs at the end may be without a score.
        for (place, query), score in zip(places, read, strict=False):
            scores[query][place] = score
        if self.watch:
            self.watch(len(read), len(pairs) - len(read), self._clock() - started)
        return [_ordered(passages, scores[query]) for query, passages in enumerate(results)]

    def _read(self, pairs: Sequence[Pair], started: float) -> Iterator[float]:
        """Yield the scores of the pairs in order, all of them or as many as there is time for."""
        done, size = 0, len(pairs) if self.budget_ms is None else _FIRST
        while size and done < len(pairs):
            scores = self._scorer.scores(pairs[done : done + size])
            done += len(scores)
            yield from scores
            if self.budget_ms is not None:
                spent = self._clock() - started
                fits = int(done * (self.budget_ms / 1000 - spent) / max(spent, 1e-9))
                # Half of what fits at the rate so far: the next pairs may be longer.
                size = max(0, fits if fits <= _FIRST else fits // 2)


def _ordered(passages: Sequence[Passage], scores: dict[int, float]) -> list[Passage]:
    # Equal scores keep the order of the index: `sorted` is stable.
    best = sorted(scores, key=lambda place: -scores[place])
    read = [replace(passages[place], score=_between(scores[place])) for place in best]
    left = [passage for place, passage in enumerate(passages) if place not in scores]
    return read + [replace(passage, score=-float(place)) for place, passage in enumerate(left, 1)]


def _between(score: float) -> float:
    """Return the logistic function of a score: between 0 and 1, in the same order as far as the numbers of Python tell."""
    return 1 / (1 + math.exp(-score)) if score > -700 else math.exp(-700)
