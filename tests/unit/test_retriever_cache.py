"""The cache holds a bounded number of passages, the newest results, and never mixes queries or counts."""

from __future__ import annotations

from research_rl.episode.trajectory import Passage
from research_rl.retriever.cache import ResultCache

PASSAGE = Passage("1", "x", 0.5)


def test_it_keeps_the_newest_and_no_more() -> None:
    cache = ResultCache(2)
    cache.put("a", 1, [PASSAGE])
    cache.put("b", 1, [PASSAGE])
    assert cache.get("a", 1) == [PASSAGE]
    cache.put("c", 1, [PASSAGE])
    assert (cache.get("b", 1), cache.get("a", 1), len(cache)) == (None, [PASSAGE], 2)
    assert cache.get("a", 2) is None


def test_large_results_take_the_room_of_many_small_ones() -> None:
    cache = ResultCache(10)
    for name in "abcdef":
        cache.put(name, 50, [PASSAGE] * 50)
    assert len(cache) == 2
    cache.put("too large", 1000, [PASSAGE] * 1000)
    assert (cache.get("too large", 1000), len(cache)) == (None, 2)


def test_with_no_entries_it_keeps_nothing() -> None:
    cache = ResultCache(0)
    cache.put("a", 1, [])
    assert (cache.get("a", 1), len(cache)) == (None, 0)
