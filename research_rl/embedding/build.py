"""Stage embed: one vector a passage, in shards that survive a kill. Knows shards and resuming; leaves text to encoders.

Invariants: (1) a killed run redoes at most the shard it was in; (2) the artifact carries its encoder, so that queries cannot meet
another one; (3) a text whose vector by this very encoder stands in the artifact that is replaced is not encoded again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from research_rl.corpus.store import PassageStore
from research_rl.embedding import ENCODER, Encoded, Vectors, models
from research_rl.embedding.standing import ShardPlan, StandingVectors, keys_name, keys_of
from research_rl.paths import cache_folder
from research_rl.pipeline import arrays
from research_rl.pipeline.copying import place
from research_rl.pipeline.stages import Context
from research_rl.pipeline.work import Work

__all__ = ["run"]

_BATCH = 1000
# Passages that the retriever searches for at its start, and how much of their text is the query.
_CANARIES = 8
_CANARY_CHARS = 300
_CHANGES = ("added", "changed", "reused", "encoded")

_Read = Callable[[range], list[str]]
"""Returns the texts of a shard that are to be encoded."""


@dataclass(frozen=True)
class _Built:
    """The encoder at work: vector length, what to record about it, and how to encode what is read of shards, in any order."""

    dim: int
    facts: dict[str, Any]
    encode: Callable[[Iterable[range], _Read, Callable[[int], None]], Iterator[tuple[range, Encoded]]]


def run(context: Context) -> None:
    """Publish vectors-NNNNN.npy (float32, [rows, dim], unit length), their keys-NNNNN.npy and `encoder/`. Raises ModelError.

    kind none publishes none of them, `encoder.vectors` off only the encoder. What changed against the artifact that is replaced is
    kept beside the new one (`stages.measured`), so that the artifact itself is the one that a build from nothing gives.
    """
    store = PassageStore(context.parent("corpus"), context.parents["corpus"])
    if context.config.encoder.kind == "none":
        _publish_nothing(context, store)
        return
    own = models.own_hashes(context.config.encoder, context.workspace)
    work = Work(context, own)
    built = _lexical(context, store, work) if context.config.encoder.kind == "lexical" else _sentence(context, work)
    standing = StandingVectors.of(context.workspace.folder("embed"), context.standing(), work.folder / ENCODER, built.facts)
    shards = _encode_all(context, store, built, work, standing) if context.config.encoder.vectors else {}
    with context.publish() as staging:
        for name in shards:
            work.link(name, staging.path)
        work.link(ENCODER, staging.path / ENCODER)
        staging.counts |= {"vectors": len(store) if shards else 0, "shards": len(shards), "dim": built.dim}
        staging.facts |= {"encoder": built.facts, "canaries": _canaries(store), **({"source_files": own} if own else {})}
        changes = _changes(shards.values(), standing)
        staging.measured |= {**changes, **_padding(shards.values())}
    if len(standing):
        context.progress(", ".join(f"{count:,} {name}" for name, count in changes.items()), 1.0)
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

    def encode(shards: Iterable[range], read: _Read, progress: Callable[[int], None]) -> Iterator[tuple[range, Encoded]]:
        for shard in shards:
            texts = read(shard)
            vectors = np.empty((len(texts), encoder.dim), np.float32)
            for start in range(0, len(texts), _BATCH):
                some = texts[start : start + _BATCH]
                vectors[start : start + len(some)] = encoder.encode_passages(some)
                progress(start + len(some))
            yield shard, Encoded(vectors)

    facts = {"kind": "lexical", "dim": encoder.dim, "normalised": True, "query_prefix": "", "passage_prefix": ""}
    return _Built(encoder.dim, facts, encode)


def _sentence(context: Context, work: Work) -> _Built:
    from research_rl.embedding import presets, workers
    from research_rl.embedding.sentence import SentenceEncoder, number_format

    config = context.config.encoder
    source = models.resolve(config, context.config.transfer, cache_folder(), context.workspace.root)
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
        "dtype": number_format(config.dtype),
        **settled,
    }
    encoder = SentenceEncoder.load(folder, facts, threads=context.config.encoding.threads)

    def encode(shards: Iterable[range], read: _Read, progress: Callable[[int], None]) -> Iterator[tuple[range, Encoded]]:
        with encoder:
            yield from workers.encode(context.config.encoding, encoder, folder, shards, read, progress)

    return _Built(encoder.dim, encoder.facts, encode)


def _encode_all(context: Context, store: PassageStore, built: _Built, work: Work, standing: StandingVectors) -> dict[str, dict[str, Any]]:
    """Return the record of every shard by the name of its unit, in row order."""
    size, total = context.config.encoder.shard_rows, len(store)
    report = _EncodingProgress(context, total)
    names = {range(start, min(start + size, total)): f"vectors-{start // size:05d}" for start in range(0, total, size)}
    records = {name: work.finished(name) for name in names.values()}
    missing = [shard for shard, name in names.items() if records[name] is None]
    report.skip(total - sum(map(len, missing)))
    shards = _Shards(store, standing, built.dim)

    def save(shard: range, encoded: Encoded) -> None:
        name = names[shard]
        records[name] = work.unit(name, partial(shards.save, shard, encoded, name))
        report.close(len(shard))

    for shard, encoded in built.encode(shards.wanting(missing, save), shards.read, report.inside):
        save(shard, encoded)
    return {name: record for name, record in records.items() if record is not None}


class _Shards:
    """The shards to be made: each is planned when the encoder asks for it, and saved with the vectors that stand already."""

    def __init__(self, store: PassageStore, standing: StandingVectors, dim: int) -> None:
        self._store, self._standing, self._dim = store, standing, dim
        self._plans = dict[range, ShardPlan]()
        self._texts = dict[range, list[str]]()

    def wanting(self, shards: Iterable[range], save: Callable[[range, Encoded], None]) -> Iterator[range]:
        """Yield the shards with texts to be encoded; the others are saved at once."""
        for shard in shards:
            ids, texts = self._store.columns(shard.start, shard.stop)
            plan = self._plans[shard] = self._standing.plan(keys_of(ids, texts), shard.start)
            if plan.changes["encoded"]:
                self._texts[shard] = [texts[place] for place in plan.missing]
                yield shard
            else:
                save(shard, Encoded(np.empty((0, self._dim), np.float32)))

    def read(self, shard: range) -> list[str]:
        """Return the texts of a shard that are to be encoded; once."""
        return self._texts.pop(shard)

    def save(self, shard: range, encoded: Encoded, name: str, folder: Path) -> dict[str, Any]:
        """Write vectors and keys of a shard into `folder`; return what to record."""
        plan, number = self._plans.pop(shard), int(name.removeprefix("vectors-"))
        if plan.same:
            place(plan.same, folder / f"{name}.npy")
        else:
            arrays.save(folder / f"{name}.npy", self._vectors(plan, encoded))
        arrays.save(folder / keys_name(number), plan.keys)
        return {"tokens": encoded.tokens, "padding": encoded.padding, **plan.changes}

    def _vectors(self, plan: ShardPlan, encoded: Encoded) -> Vectors:
        if len(encoded.vectors) == len(plan.keys):
            return encoded.vectors
        vectors = np.empty((len(plan.keys), self._dim), np.float32)
        vectors[plan.missing] = encoded.vectors
        reused = plan.sources >= 0
        vectors[reused] = self._standing.take(plan.sources[reused], self._dim)
        return vectors


class _EncodingProgress:
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


def _changes(records: Iterable[dict[str, Any]], standing: StandingVectors) -> dict[str, int]:
    """Return how many passages were added, changed and removed, and how many vectors were reused and encoded."""
    total = Counter[str]()
    for record in records:
        total.update({name: record.get(name, 0) for name in (*_CHANGES, "matched")})
    return {**{name: total[name] for name in _CHANGES}, "removed": len(standing) - total["matched"]}


def _padding(records: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return the tokens of what was encoded and the share of padding among those computed; nothing without tokens."""
    counts = [(int(record["tokens"]), int(record["padding"])) for record in records]
    tokens, padding = sum(count for count, _ in counts), sum(count for _, count in counts)
    return {"tokens": tokens, "padding_share": round(padding / (tokens + padding), 4)} if tokens else {}


def _canaries(store: PassageStore) -> list[dict[str, Any]]:
    """Return passages spread over the corpus whose own beginning, as a query, should find them."""
    rows = sorted({int(row) for row in np.linspace(0, len(store) - 1, _CANARIES)}) if len(store) else []
    return [
        {"row": row, "id": passage.id, "query": passage.contents[:_CANARY_CHARS]}
        for row, passage in zip(rows, store.get(rows), strict=True)
    ]
