"""Stage index: put the vectors into a faiss index and prove that it finds what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np

from research_rl.config import IndexConfig
from research_rl.embedding import Encoder, Vectors, load_encoder, vector_shards
from research_rl.errors import ConfigError
from research_rl.index.search import EXACT, INDEX, Searcher, VectorIndex
from research_rl.manifest import Staging
from research_rl.stages import Context

__all__ = ["run"]

_NEAR = 10
_CANARY_NEAR = 5


def run(context: Context) -> None:
    """Publish index.faiss, or scan.bf16 for the factory Exact; facts name the factory and a canary.

    An index that is not exact also states its measured recall@10.

    Raises ConfigError for a factory string that faiss refuses or that does not fit the vectors.
    """
    config, folder = context.config.index, context.parent("embed")
    found = context.parents["embed"]
    shards = [np.load(path, mmap_mode="r") for path in vector_shards(folder, found)]
    encoder = load_encoder(folder, found)
    index = None if config.factory == EXACT else _filled(context, shards, found.counts["dim"])
    with context.publish() as staging:
        searcher = _scan(staging, shards) if index is None else _faiss(staging, index)
        staging.counts |= {"vectors": searcher.rows, "dim": searcher.dim}
        staging.facts |= {"factory": config.factory, "metric": config.metric, "exact": _exact(config)}
        staging.facts["canary"] = _canary(searcher, encoder, found.facts["canaries"], config)
        if not _exact(config):
            staging.facts["recall_at_10"] = _recall(searcher, shards, config.sample)


def _exact(config: IndexConfig) -> bool:
    return config.factory in ("Flat", EXACT)


def _scan(staging: Staging, shards: Sequence[Vectors]) -> Searcher:
    """Write the bf16 scan; its float32 vectors stay in the embeddings artifact."""
    from research_rl.index.exact import SCAN, ExactScan, write_scan

    norm, error = write_scan(shards, staging.path / SCAN)
    staging.facts |= {"norm": norm, "error": error}
    return ExactScan(staging.path / SCAN, shards, norm, error)


def _faiss(staging: Staging, index: Any) -> Searcher:
    faiss.write_index(index, str(staging.path / INDEX))
    return VectorIndex(index)


def _filled(context: Context, shards: Sequence[Vectors], dim: int) -> Any:
    config, total = context.config.index, sum(map(len, shards))
    try:
        index = faiss.index_factory(dim, config.factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(_spread(shards, config.train_rows))
        if config.search:
            faiss.ParameterSpace().set_index_parameters(index, config.search)
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ["unknown"])[-1]
        raise ConfigError(
            f"index.factory={config.factory!r} with index.search={config.search!r} is refused by faiss "
            f"for {total:,} vectors of {dim} numbers ({reason}); use Flat, or a factory string that fits"
        ) from None
    for shard in shards:
        index.add(np.ascontiguousarray(shard))
        context.progress(f"{index.ntotal:,} of {total:,} vectors", index.ntotal / max(total, 1))
    return index


def _spread(shards: Sequence[Vectors], most: int) -> Vectors:
    """Return at most `most` vectors, taken at equal distances over all shards."""
    step = max(1, -(-sum(map(len, shards)) // most))
    return np.concatenate([shard[::step] for shard in shards]).astype(np.float32)


def _canary(index: Searcher, encoder: Encoder, canaries: Sequence[dict[str, Any]], config: IndexConfig) -> dict[str, Any]:
    """Return the first passage whose own beginning, as a query, finds it; the service asks for it when it starts."""
    _, rows = index.search(encoder.encode_queries([canary["query"] for canary in canaries]), _CANARY_NEAR)
    for canary, near in zip(canaries, rows, strict=True):
        if canary["row"] in near:
            return {**canary, "top_k": _CANARY_NEAR}
    raise ConfigError(
        f"index.factory={config.factory!r} finds none of {len(canaries)} passages by their own text among its first {_CANARY_NEAR}; "
        "use a finer index or another encoder"
    )


def _recall(index: Searcher, shards: Sequence[Vectors], sample: int) -> float:
    """Return the share of the exact ten nearest that the index finds, over passages as queries."""
    queries = _spread(shards, sample)
    exact = faiss.IndexFlatIP(index.dim)
    best = [_nearest(exact, shard, queries, start) for shard, start in zip(shards, _starts(shards), strict=True)]
    scores, rows = (np.concatenate(parts, axis=1) for parts in zip(*best, strict=True))
    order = np.argsort(-scores, axis=1)[:, :_NEAR]
    truth = np.take_along_axis(rows, order, axis=1)
    _, found = index.search(queries, _NEAR)
    hits = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(truth, found, strict=True)]
    return round(float(np.sum(hits) / truth.size), 4)


def _starts(shards: Sequence[Vectors]) -> list[int]:
    return [0, *np.cumsum([len(shard) for shard in shards])[:-1].tolist()]


def _nearest(exact: Any, shard: Vectors, queries: Vectors, start: int) -> tuple[Vectors, Any]:
    exact.reset()
    exact.add(np.ascontiguousarray(shard))
    scores, rows = exact.search(queries, min(_NEAR, len(shard)))
    return scores, rows + start
