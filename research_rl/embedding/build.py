"""Stage embed: one vector a passage, in shards that survive a kill. Knows shards and resuming; leaves text to encoders.

Invariants: (1) a shard counts as finished only with its record, written after it, whose sha256 it fits; (2) a killed
run redoes at most the shard it was in; (3) the artifact carries its encoder, so that queries cannot meet another one.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from research_rl.corpus.store import PassageStore
from research_rl.embedding import ENCODER, Encoder, Vectors
from research_rl.manifest import file_sha256
from research_rl.stages import Context

__all__ = ["run"]

_BATCH = 1000
_CANARIES = 8
_CANARY_CHARS = 300


@dataclass(frozen=True)
class _Built:
    """The encoder at work: what to record about it and how to encode a range of texts."""

    encoder: Encoder
    facts: dict[str, Any]
    encode: Callable[[list[str], Callable[[int], None]], Vectors]


def run(context: Context) -> None:
    """Publish vectors-NNNNN.npy (float32, [rows, dim], unit length) and `encoder/`. Raises ModelError.

    kind none publishes neither, `encoder.vectors` off only the encoder.
    """
    store = PassageStore(context.parent("corpus"), context.parents["corpus"])
    if context.config.encoder.kind == "none":
        _publish_nothing(context, store)
        return
    work = _work_folder(context)
    built = _lexical(context, store, work) if context.config.encoder.kind == "lexical" else _sentence(context, work)
    shards = _encode_all(context, store, built, work) if context.config.encoder.vectors else []
    with context.publish() as staging:
        for path in shards:
            os.link(path, staging.path / path.name)
        shutil.copytree(work / ENCODER, staging.path / ENCODER)
        staging.counts |= {"vectors": len(store) if shards else 0, "shards": len(shards), "dim": built.encoder.dim}
        staging.facts |= {"encoder": built.facts, "canaries": _canaries(store)}
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

    encoder = LexicalEncoder.fit((texts for _, texts in store.batches(_BATCH)), context.config.encoder.dim)
    encoder.save(work / ENCODER)

    def encode(texts: list[str], progress: Callable[[int], None]) -> Vectors:
        vectors = np.empty((len(texts), encoder.dim), np.float32)
        for start in range(0, len(texts), _BATCH):
            vectors[start : start + _BATCH] = encoder.encode_passages(texts[start : start + _BATCH])
            progress(min(start + _BATCH, len(texts)))
        return vectors

    facts = {"kind": "lexical", "dim": encoder.dim, "normalised": True, "query_prefix": "", "passage_prefix": ""}
    return _Built(encoder, facts, encode)


def _sentence(context: Context, work: Path) -> _Built:
    from research_rl.embedding import models
    from research_rl.embedding.sentence import SentenceEncoder, fast_bfloat16

    config = context.config.encoder
    source = models.resolve(config.model, models.cache_folder())
    if not (work / ENCODER).is_dir():
        shutil.rmtree(work / "encoder.tmp", ignore_errors=True)
        models.copy_model(source, work / "encoder.tmp")
        (work / "encoder.tmp").rename(work / ENCODER)
    facts = {
        "kind": "sentence",
        "model": config.model if (config.model or "").startswith("pypi:") else Path(config.model or "").name,
        "model_sha256": models.tree_sha256(work / ENCODER),
        "normalised": True,
        "query_prefix": config.query_prefix,
        "passage_prefix": config.passage_prefix,
        "max_tokens": config.max_tokens,
        "batch_tokens": config.batch_tokens,
        "dtype": fast_bfloat16() if config.dtype == "auto" else config.dtype,
    }
    encoder = SentenceEncoder.load(work / ENCODER, facts)
    return _Built(encoder, encoder.facts, encoder.encode_passages)


def _encode_all(context: Context, store: PassageStore, built: _Built, work: Path) -> list[Path]:
    size, total = context.config.encoder.shard_rows, len(store)
    shards: list[Path] = []
    report = _Reporter(context, total)
    for start in range(0, total, size):
        path = work / f"vectors-{start // size:05d}.npy"
        rows = min(size, total - start)
        if _finished(path, rows, built.encoder.dim):
            report.skip(rows)
        else:
            _save(path, built.encode(store.texts(start, start + rows), report.inside))
            report.close(rows)
        shards.append(path)
    return shards


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

    def inside(self, rows: int) -> None:
        now = time.monotonic()
        if now - self._told < 1.0:
            return
        self._told, done = now, self._done + rows
        text = f"{self._kept + done:,} of {self._total:,} passages, {done / (now - self._started):,.0f}/s"
        self._progress(text, (self._kept + done) / self._total)


def _save(path: Path, vectors: Vectors) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as stream:
        np.save(stream, vectors)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    record = path.with_suffix(".json.tmp")
    record.write_text(json.dumps({"sha256": file_sha256(path), "shape": vectors.shape}))
    record.replace(path.with_suffix(".json"))


def _finished(path: Path, rows: int, dim: int) -> bool:
    try:
        record = json.loads(path.with_suffix(".json").read_text())
        return record["shape"] == [rows, dim] and record["sha256"] == file_sha256(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _canaries(store: PassageStore) -> list[dict[str, Any]]:
    """Return passages spread over the corpus whose own beginning, as a query, should find them."""
    rows = sorted({int(row) for row in np.linspace(0, len(store) - 1, _CANARIES)}) if len(store) else []
    return [
        {"row": row, "id": passage.id, "query": passage.contents[:_CANARY_CHARS]}
        for row, passage in zip(rows, store.get(rows), strict=True)
    ]
