"""The cache holds at most so many results, the newest, and never mixes queries, counts or indexes."""

from __future__ import annotations

from research_rl.episode.trajectory import Passage
from research_rl.retriever.cache import ResultCache

FOUND = [Passage("1", "x", 0.5)]


def test_it_keeps_the_newest_and_no_more() -> None:
    cache = ResultCache(2, "index")
    cache.put("a", 1, FOUND)
    cache.put("b", 1, FOUND)
    assert cache.get("a", 1) == FOUND
    cache.put("c", 1, FOUND)
    assert (cache.get("b", 1), cache.get("a", 1), len(cache)) == (None, FOUND, 2)
    assert cache.get("a", 2) is None


def test_with_no_entries_it_keeps_nothing() -> None:
    cache = ResultCache(0, "index")
    cache.put("a", 1, FOUND)
    assert (cache.get("a", 1), len(cache)) == (None, 0)
