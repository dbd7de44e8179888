"""Stage corpus: turn the checked corpus file into the passage store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from research_rl.corpus import store
from research_rl.data import flashrag
from research_rl.data.download import CORPUS
from research_rl.stages import Context
from research_rl.trajectory import Passage

__all__ = ["run"]

_REPORT_EVERY = 10_000


def run(context: Context) -> None:
    """Publish the passage store; counts hold `passages` and `shards`. Raises DataError for a bad line."""
    rows, total = context.config.corpus.shard_rows, context.parents["download"].counts["corpus"]
    with context.publish() as staging:
        passages = store.write(_watched(context, context.parent("download") / CORPUS, total), staging.path, rows)
        staging.counts |= {"passages": passages, "shards": -(-passages // rows)}
        staging.facts["shard_rows"] = rows


def _watched(context: Context, path: Path, total: int) -> Iterator[Passage]:
    for number, passage in enumerate(flashrag.read_passages(path), 1):
        if number % _REPORT_EVERY == 0:
            context.progress(f"{number:,} of {total:,} passages", number / max(total, 1))
        yield passage
