"""Stage embed: one vector a passage, in shards that survive a kill. Knows shards and resuming; leaves text to encoders.

Invariants: (1) a shard counts as finished only with its record, written after it, whose sha256 it fits; (2) a killed
run redoes at most the shard it was in; (3) the artifact carries its encoder, so that queries cannot meet another one.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from research_rl.corpus.store import PassageStore
from research_rl.embedding import ENCODER, Encoded
from research_rl.paths import cache_folder
from research_rl.pipeline.manifest import file_sha256
from research_rl.pipeline.stages import Context

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
    work = _work_folder(context)
    built = _lexical(context, store, work) if context.config.encoder.kind == "lexical" else _sentence(context, store, work)
    shards = _encode_all(context, store, built, work) if context.config.encoder.vectors else []
    with context.publish() as staging:
        for path in shards:
            # The vectors of a large corpus take tens of gigabytes; two names cost nothing.
            os.link(path, staging.path / path.name)
        shutil.copytree(work / ENCODER, staging.path / ENCODER)
        staging.counts |= {"vectors": len(store) if shards else 0, "shards": len(shards), "dim": built.dim}
        staging.facts |= {"encoder": built.facts, "canaries": _canaries(store)}
        if padding := _padding(shards):
            staging.facts["padding"] = padding
    # Only once the artifact stands: until then this is what a killed run goes on from.
    shutil.rmtree(work)


def _publish_nothing(context: Context, store: PassageStore) -> None:
    with context.publish() as staging:
        staging.counts |= {"vectors": 0, "shards": 0, "dim": 0}
        staging.facts |= {"encoder": {"kind": "none"}, "canaries": _canaries(store)}


def _work_folder(context: Context) -> Path:
    """Return the folder of this very build; work begun for other parameters or another corpus is removed."""
    key = sha256(f"{context.config_hash}/{context.parents['corpus'].hash}".encode()).hexdigest()[:16]
    work = context.workspace.work(f"embed-{key}")
    for stale in work.parent.glob("embed-*"):
        if stale != work:
            shutil.rmtree(stale)
    work.mkdir(parents=True, exist_ok=True)
    return work


def _lexical(context: Context, store: PassageStore, work: Path) -> _Built:
    from research_rl.embedding.lexical import LexicalEncoder

    if not (work / ENCODER).is_dir():
        shutil.rmtree(work / "encoder.tmp", ignore_errors=True)
        LexicalEncoder.fit((texts for _, texts in store.batches(_BATCH)), context.config.encoder.dim).save(work / "encoder.tmp")
        # In one step: a folder of this name is taken for whole by the next run.
        (work / "encoder.tmp").rename(work / ENCODER)
    encoder = LexicalEncoder.load(work / ENCODER)

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


def _sentence(context: Context, store: PassageStore, work: Path) -> _Built:
    from research_rl.embedding import models, presets, workers
    from research_rl.embedding.sentence import SentenceEncoder, fast_bfloat16

    config = context.config.encoder
    source = models.resolve(config.model, cache_folder())
    settled = presets.settle(config, source)
    if not (work / ENCODER).is_dir():
        shutil.rmtree(work / "encoder.tmp", ignore_errors=True)
        models.copy_model(source, work / "encoder.tmp")
        (work / "encoder.tmp").rename(work / ENCODER)
    facts = {
        "kind": "sentence",
        "model": config.model if (config.model or "").startswith("pypi:") else Path(config.model or "").name,
        "model_sha256": models.tree_sha256(work / ENCODER),
        "dtype": fast_bfloat16() if config.dtype == "auto" else config.dtype,
        **settled,
    }
    encoder = SentenceEncoder.load(work / ENCODER, facts, threads=context.config.encoding.threads)

    def encode(shards: Iterable[range], progress: Callable[[int], None]) -> Iterator[tuple[range, Encoded]]:
        def read(shard: range) -> list[str]:
            return store.texts(shard.start, shard.stop)

        return workers.encode(context.config.encoding, encoder, work / ENCODER, shards, read, progress)

    return _Built(encoder.dim, encoder.facts, encode)


def _encode_all(context: Context, store: PassageStore, built: _Built, work: Path) -> list[Path]:
    size, total = context.config.encoder.shard_rows, len(store)
    report = _Reporter(context, total)
    paths = {range(start, min(start + size, total)): work / f"vectors-{start // size:05d}.npy" for start in range(0, total, size)}
    missing = [shard for shard, path in paths.items() if not _finished(path, len(shard), built.dim)]
    report.skip(total - sum(map(len, missing)))
    for shard, encoded in built.encode(missing, report.inside):
        _save(paths[shard], encoded)
        report.close(len(shard))
    return list(paths.values())


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


def _save(path: Path, encoded: Encoded) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        np.save(stream, encoded.vectors)
        stream.flush()
        os.fsync(stream.fileno())
    # First the vectors, then their record: a shard without one is encoded again.
    temporary.replace(path)
    record = path.with_suffix(".json.tmp")
    facts = {"sha256": file_sha256(path), "shape": encoded.vectors.shape, "tokens": encoded.tokens, "padding": encoded.padding}
    record.write_text(json.dumps(facts))
    record.replace(path.with_suffix(".json"))


def _finished(path: Path, rows: int, dim: int) -> bool:
    try:
        record = json.loads(path.with_suffix(".json").read_text())
        return record["shape"] == [rows, dim] and record["sha256"] == file_sha256(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _padding(shards: list[Path]) -> dict[str, float]:
    """Return the tokens of all passages and the share of padding among those computed; nothing without tokens."""
    records = [json.loads(path.with_suffix(".json").read_text()) for path in shards]
    tokens, padding = (sum(int(record[name]) for record in records) for name in ("tokens", "padding"))
    return {"tokens": tokens, "share": round(padding / (tokens + padding), 4)} if tokens else {}


def _canaries(store: PassageStore) -> list[dict[str, Any]]:
    """Return passages spread over the corpus whose own beginning, as a query, should find them."""
    rows = sorted({int(row) for row in np.linspace(0, len(store) - 1, _CANARIES)}) if len(store) else []
    return [
        {"row": row, "id": passage.id, "query": passage.contents[:_CANARY_CHARS]}
        for row, passage in zip(rows, store.get(rows), strict=True)
    ]
