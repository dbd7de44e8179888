"""The vectors of the benchmark at Wikipedia's size: questions find what was planted for them, and a resumed run draws the same."""

from __future__ import annotations

import json

import numpy as np

from benchmarks.wiki_vectors import Texts, _Cloud

ROWS, DIM, SHARD = 30_000, 64, 8_000


def cloud() -> tuple[_Cloud, np.ndarray, np.ndarray]:
    """Return clusters for 50 questions and 2 canaries, in rows 0 and 29,999."""
    draw = np.random.default_rng(3)
    vectors = draw.standard_normal((52, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    asked, given = vectors[:50], vectors[50:]
    return _Cloud.drawn(ROWS, asked.copy(), np.array([0, ROWS - 1]), given), asked, given


def test_every_question_has_its_row_and_neighbours_behind_it() -> None:
    made, asked, given = cloud()
    files = [range(start, min(start + SHARD, ROWS)) for start in range(0, ROWS, SHARD)]
    vectors = np.concatenate([made.vectors(number, rows) for number, rows in enumerate(files)])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(vectors[[0, ROWS - 1]], given)
    best = np.sort(asked @ vectors.T, axis=1)[:, ::-1]
    assert best[:, 0].min() > 0.8, "the planted row"
    assert 0.3 < best[:, 20].mean() < 0.8 < best[:, 0].mean(), "rows of its cluster"
    assert abs((vectors[:2000] @ vectors[2000:4000].T).mean()) < 0.05, "and most are far from each other"


def test_a_file_that_is_drawn_again_is_the_same() -> None:
    first, second = (cloud()[0] for _ in range(2))
    np.testing.assert_array_equal(first.vectors(2, range(16_000, 24_000)), second.vectors(2, range(16_000, 24_000)))
    assert not np.array_equal(first.vectors(1, range(8_000, 16_000)), first.vectors(2, range(16_000, 24_000)))


def test_lines_hold_the_texts_that_keys_are_made_of() -> None:
    texts = Texts(100)
    rows = [json.loads(line) for line in "".join(texts.lines(size=30)).splitlines()]
    assert [row["contents"] for row in rows] == texts.contents(range(100))
    assert [row["id"] for row in rows] == [str(row) for row in range(100)]
    assert texts.contents(range(97, 99)) == texts.contents(range(100))[97:99]
