"""Stage embed: one vector a passage, in shards that survive a kill. Knows shards and resuming; leaves text to encoders.

Invariants: (1) a killed run redoes at most the shard it was in; (2) the artifact carries its encoder, so that queries cannot meet
another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from research_rl.corpus.store import PassageStore
from research_rl.embedding import ENCODER, Encoded
from research_rl.paths import cache_folder
from research_rl.pipeline.stages import Context
from research_rl.pipeline.work import Work

__all__ = ["run"]

_BATCH = 1000
# Passages that the retriever searches for at its start, and how much of their text is the query.
_CANARIES = 8
_CANARY_CHARS = 300


@dataclass(frozen=True)
class _Built:
    """The encoder at work: vector length, what to record about it, and how to encode shards, in any order."""

    dim: int
    facts: dict[str, Any]
    encode: Callable[[Iterable[range], Callable[[int], None]], Iterator[tuple[range, Encoded]]]


def run(context: Context) -> None:
    """Publish vectors-NNNNN.npy (float32, [rows, dim], unit length) and `encoder/`. Raises ModelError.

    kind none publishes neither, `encoder.vectors` off only the encoder.
    """
    store = PassageStore(context.parent("corpus"), context.parents["corpus"])
    if context.config.encoder.kind == "none":
        _publish_nothing(context, store)
        return
    work = Work(context)
    built = _lexical(context, store, work) if context.config.encoder.kind == "lexical" else _sentence(context, store, work)
    shards = _encode_all(context, store, built, work) if context.config.encoder.vectors else {}
    with context.publish() as staging:
        for name in shards:
            work.link(name, staging.path)
        work.link(ENCODER, staging.path / ENCODER)
        staging.counts |= {"vectors": len(store) if shards else 0, "shards": len(shards), "dim": built.dim}
        staging.facts |= {"encoder": built.facts, "canaries": _canaries(store)}
        if padding := _padding(shards.values()):
            staging.facts["padding"] = padding
    # Only once the artifact stands: until then this is what a killed run goes on from.
    work.remove()


def _publish_nothing(context: Context, store: PassageStore) -> None:
    with context.publish() as staging:
        staging.counts |= {"vectors": 0, "shards": 0, "dim": 0}
        staging.facts |= {"encoder": {"kind": "none"}, "canaries": _canaries(store)}


def _lexical(context: Context, store: PassageStore, work: Work) -> _Built:
    from research_rl.embedding.lexical import LexicalEncoder

    def fit(folder: Path) -> dict[str, Any]:
        LexicalEncoder.fit((texts for _, texts in store.batches(_BATCH)), context.config.encoder.dim).save(folder)
        return {}

    work.unit(ENCODER, fit)
    encoder = LexicalEncoder.load(work.folder / ENCODER)

    def encode(shards: Iterable[range], progress: Callable[[int], None]) -> Iterator[tuple[range, Encoded]]:
        for shard in shards:
            vectors = np.empty((len(shard), encoder.dim), np.float32)
            for start in range(0, len(shard), _BATCH):
                texts = store.texts(shard.start + start, min(shard.start + start + _BATCH, shard.stop))
                vectors[start : start + len(texts)] = encoder.encode_passages(texts)
                progress(start + len(texts))
            yield shard, Encoded(vectors)

    facts = {"kind": "lexical", "dim": encoder.dim, "normalised": True, "query_prefix": "", "passage_prefix": ""}
    return _Built(encoder.dim, facts, encode)


def _sentence(context: Context, store: PassageStore, work: Work) -> _Built:
    from research_rl.embedding import models, presets, workers
    from research_rl.embedding.sentence import SentenceEncoder, fast_bfloat16

    config = context.config.encoder
    source = models.resolve(config, context.config.transfer, cache_folder())
    settled = presets.settle(config, source)
    folder = work.folder / ENCODER

    def copy(target: Path) -> dict[str, Any]:
        models.copy_model(source, target)
        return {}

    work.unit(ENCODER, copy)
    facts = {
        "kind": "sentence",
        "model": config.model if (config.model or "").startswith("pypi:") else Path(config.model or "").name,
        "model_sha256": models.tree_sha256(folder),
        "dtype": fast_bfloat16() if config.dtype == "auto" else config.dtype,
        **settled,
    }
    encoder = SentenceEncoder.load(folder, facts, threads=context.config.encoding.threads)

    def encode(shards: Iterable[range], progress: Callable[[int], None]) -> Iterator[tuple[range, Encoded]]:
        def read(shard: range) -> list[str]:
            return store.texts(shard.start, shard.stop)

        with encoder:
            yield from workers.encode(context.config.encoding, encoder, folder, shards, read, progress)

    return _Built(encoder.dim, encoder.facts, encode)


def _encode_all(context: Context, store: PassageStore, built: _Built, work: Work) -> dict[str, dict[str, Any]]:
    """Return the record of every shard by the name of its unit, in row order."""
    size, total = context.config.encoder.shard_rows, len(store)
    report = _Reporter(context, total)
    names = {range(start, min(start + size, total)): f"vectors-{start // size:05d}" for start in range(0, total, size)}
    records = {name: work.finished(name) for name in names.values()}
    missing = [shard for shard, name in names.items() if records[name] is None]
    report.skip(total - sum(map(len, missing)))
    for shard, encoded in built.encode(missing, report.inside):
        records[names[shard]] = work.unit(names[shard], partial(_save, encoded, names[shard]))
        report.close(len(shard))
    return {name: record for name, record in records.items() if record is not None}


class _Reporter:
    """Tells progress with the rate of this run, finished shards of an earlier one left out."""

    def __init__(self, context: Context, total: int) -> None:
        self._progress, self._total = context.progress, max(total, 1)
        self._kept = self._done = 0
        self._started = self._told = time.monotonic()

    def skip(self, rows: int) -> None:
        self._kept += rows

    def close(self, rows: int) -> None:
        self._done += rows
        self.inside(0)

    def inside(self, rows: int) -> None:
        now = time.monotonic()
        # A message a second at most: encoders report every batch.
        if now - self._told < 1.0:
            return
        self._told, done = now, self._done + rows
        text = f"{self._kept + done:,} of {self._total:,} passages, {done / (now - self._started):,.0f}/s"
        self._progress(text, (self._kept + done) / self._total)


def _save(encoded: Encoded, name: str, folder: Path) -> dict[str, Any]:
    np.save(folder / f"{name}.npy", encoded.vectors)
    return {"tokens": encoded.tokens, "padding": encoded.padding}


def _padding(records: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return the tokens of all passages and the share of padding among those computed; nothing without tokens."""
    counts = [(int(record["tokens"]), int(record["padding"])) for record in records]
    tokens, padding = sum(count for count, _ in counts), sum(count for _, count in counts)
    return {"tokens": tokens, "share": round(padding / (tokens + padding), 4)} if tokens else {}


def _canaries(store: PassageStore) -> list[dict[str, Any]]:
    """Return passages spread over the corpus whose own beginning, as a query, should find them."""
    rows = sorted({int(row) for row in np.linspace(0, len(store) - 1, _CANARIES)}) if len(store) else []
    return [
        {"row": row, "id": passage.id, "query": passage.contents[:_CANARY_CHARS]}
        for row, passage in zip(rows, store.get(rows), strict=True)
    ]
