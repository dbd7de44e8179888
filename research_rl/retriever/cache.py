"""Keep the newest results of one index. Knows queries and passages; knows no HTTP and no time.

Invariant: at most `entries` results are held; the one unused for longest goes first.
"""

from __future__ import annotations

from collections import OrderedDict

from research_rl.episode.trajectory import Passage

__all__ = ["ResultCache"]


class ResultCache:
    """Results by index, query and number of passages; for one thread. With 0 entries it holds nothing."""

    def __init__(self, entries: int, index: str) -> None:
        self._entries, self._index = entries, index
        self._kept: OrderedDict[tuple[str, str, int], list[Passage]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, query: str, top_k: int) -> list[Passage] | None:
        """Return what was kept for a query, None when nothing was."""
        found = self._kept.get((self._index, query, top_k))
        if found is not None:
            self._kept.move_to_end((self._index, query, top_k))
        return found

    def put(self, query: str, top_k: int, found: list[Passage]) -> None:
        """Keep a result."""
        self._kept[self._index, query, top_k] = found
        self._kept.move_to_end((self._index, query, top_k))
        while len(self._kept) > self._entries:
            self._kept.popitem(last=False)
