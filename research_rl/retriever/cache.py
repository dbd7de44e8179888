"""Keep the newest results of one index. Knows queries and passages; knows no HTTP and no time.

Invariant: what is held is bounded by passages, not only by results; the result unused for longest goes first.
"""

from __future__ import annotations

from cachetools import LRUCache

from research_rl.episode.trajectory import Passage

__all__ = ["ResultCache"]

_ENTRY = 10
"""Passages that count as one entry: a result of a thousand passages takes the room of a hundred."""


class ResultCache:
    """Results by query and number of passages; for one thread. With 0 entries it holds nothing."""

    def __init__(self, entries: int) -> None:
        self._results: LRUCache[tuple[str, int], list[Passage]] = LRUCache(entries, getsizeof=_entries)

    def __len__(self) -> int:
        return len(self._results)

    def get(self, query: str, top_k: int) -> list[Passage] | None:
        """Return the result of a query, None when it is not held."""
        return self._results.get((query, top_k))

    def put(self, query: str, top_k: int, passages: list[Passage]) -> None:
        """Hold a result, unless it alone is larger than the cache."""
        if _entries(passages) <= self._results.maxsize:
            self._results[query, top_k] = passages


def _entries(passages: list[Passage]) -> int:
    return max(1, -(-len(passages) // _ENTRY))
