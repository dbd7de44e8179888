"""Stage index: files of vectors, of words, or both, the reranker, and the proof that they find what they hold.

Knows which parts an index has and that it may be cut into files; leaves their making to `dense`, `bm25` and `reranking`.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from research_rl.config import EncoderConfig, IndexConfig
from research_rl.corpus.store import PassageStore
from research_rl.embedding import models, vector_shards
from research_rl.errors import ConfigError
from research_rl.index import auto, budget
from research_rl.index.kept import StandingFiles
from research_rl.index.own_file import hashes, own_file
from research_rl.index.standing import adopt, same_but_reranker
from research_rl.index.text import IndexSearcher, open_files, ranges_of
from research_rl.index.tiers import TwoTier
from research_rl.index.vectors import VectorFiles
from research_rl.pipeline.manifest import Manifest, Staging
from research_rl.pipeline.stages import Context
from research_rl.pipeline.work import Work
from research_rl.reranking import RERANKER
from research_rl.reranking import build as reranking

__all__ = ["run"]

_CANARY_NEAR = 5
_CERTIFIED = 64
"""Passages used as queries to see how many replies can be certified."""
_NOT_LINKED = ("trained", "bm25-words", RERANKER)
"""Units of work that only the build needs, and the model, which has a folder of its own."""


def run(context: Context) -> None:
    """Publish index-NNNNN.faiss or scan-NNNNN.bf16, bm25-* and `reranker/`; facts name the kind, a canary, an approximate index's recall
    and the reranker.

    Raises ConfigError for a factory that faiss refuses or that does not fit the vectors, and for a build that does not
    fit `index.memory_gib`; ModelError for a reranker that is none.
    """
    own = hashes(context.config, context.workspace)
    model = models.own_hashes(context.config.reranker, context.workspace)
    # Before any work is begun: it would be removed as that of other parameters.
    standing = context.standing()
    same = same_but_reranker(context, standing, own)
    work = Work(context, {**own, **{f"{RERANKER}/{name}": digest for name, digest in model.items()}})
    facts = reranking.copied(context, work, model)
    with _kept(context, same) if same else _built(context, work, own, standing) as staging:
        if facts:
            work.link(RERANKER, staging.path / RERANKER)
        staging.facts |= facts
        store = PassageStore(context.parent("corpus"), context.parents["corpus"])
        staging.measured |= reranking.measured(staging.path, staging.facts, store)
    work.remove()


@contextmanager
def _kept(context: Context, same: Manifest) -> Generator[Staging]:
    """Open the publication of an index that differs from the standing one in its reranker alone."""
    context.progress("the index stands; only its reranker is another", 0.0)
    with context.publish() as staging:
        adopt(context, same, staging)
        yield staging


@contextmanager
def _built(context: Context, work: Work, own: dict[str, str], standing: Manifest | None) -> Generator[Staging]:
    """Build the index, with the files of the one that stands where they serve it as they are, and open its publication."""
    store = PassageStore(context.parent("corpus"), context.parents["corpus"])
    vectors = VectorFiles(vector_shards(context.parent("embed"), context.parents["embed"]), context.parents["embed"].counts["dim"])
    given = context.config
    config = auto.settled(given.index, given.encoder, given.retriever.memory_gib, vectors.dim, len(store))
    _check(config, store, vectors)
    terms = _terms(config, store)
    # A prebuilt index stays one file, whatever the budget says.
    rows = max(len(store), 1) if config.prebuilt else budget.shard_rows(config, vectors.dim, len(store), terms)
    ranges = ranges_of(len(store), rows)
    facts: dict[str, Any] = {"kind": config.kind, **({"source_files": own} if own else {})}
    if config.kind != "bm25":
        facts |= {"factory": config.factory, "exact": budget.exact(config)}
        facts |= _vectors(context, config, work, vectors, ranges, standing)
    if config.kind != "dense":
        from research_rl.index import bm25

        facts |= bm25.build(work, config, store, ranges, context.progress)
    if config.kind == "hybrid":
        facts |= {"depth": config.depth, "rank_offset": config.rank_offset}
    with context.publish() as staging:
        # Before the proof: it opens the files where the artifact will have them.
        _link(work, staging.path)
        staging.counts |= {"passages": len(store), "shards": len(ranges), "shard_rows": rows, "dim": vectors.dim}
        staging.facts |= facts
        staging.measured |= {
            "build_seconds": round(work.seconds, 2),
            "planned_mib": round(budget.peak(config, vectors.dim, len(store), terms, given.encoder) / 2**20),
        }
        _prove(context, config, staging, vectors)
        yield staging


def _terms(config: IndexConfig, store: PassageStore) -> budget.Terms:
    if config.kind == "dense":
        return budget.ENGLISH
    from research_rl.index.bm25 import sampled

    return sampled(store)


def _check(config: IndexConfig, store: PassageStore, vectors: VectorFiles) -> None:
    """Refuse parts that are not there. Raises ConfigError."""
    if config.kind != "bm25" and not config.prebuilt and len(vectors) != len(store):
        raise ConfigError(
            f"index.kind={config.kind} needs a vector a passage, the embeddings hold {len(vectors):,} for {len(store):,}; "
            "set encoder.kind and encoder.vectors=true, index.prebuilt=<file>, or index.kind=bm25"
        )
    if config.prebuilt and not vectors.dim:
        raise ConfigError("index.prebuilt needs the encoder of its vectors for queries, but encoder.kind=none; set encoder.kind")


def _vectors(
    context: Context,
    config: IndexConfig,
    work: Work,
    vectors: VectorFiles,
    ranges: Sequence[tuple[int, int]],
    standing: Manifest | None,
) -> dict[str, Any]:
    if path := own_file(context.config, context.workspace):
        from research_rl.index.prebuilt import adopt

        return adopt(work, path, ranges[0][1], vectors.dim)
    from research_rl.index import dense

    embed = context.parents["embed"]
    digests = {context.parent("embed") / entry.path: entry.sha256 for entry in embed.files}
    reusable = StandingFiles.of(context.workspace.folder("index"), standing)
    return dense.build(work, config, vectors, ranges, context.progress, digests, reusable)


def _link(work: Work, target: Path) -> None:
    """Give the finished files their names in the artifact; what only the build needed stays behind."""
    for name in work.units():
        if name not in _NOT_LINKED:
            work.link(name, target)


def _prove(context: Context, config: IndexConfig, staging: Staging, vectors: VectorFiles) -> None:
    """Find a canary, and measure an index that is not exact; one file open at a time. Raises ConfigError when none is found."""
    embed_folder, embed = context.parent("embed"), context.parents["embed"]
    searcher = open_files(staging.path, staging.facts, staging.counts, embed_folder, embed, keep=False)
    staging.facts["canary"] = _canary(searcher, embed.facts["canaries"], config)
    if staging.facts.get("exact", True) or not len(vectors):
        return
    _measure(config, context.config.encoder, staging, vectors)


def _measure(config: IndexConfig, encoder: EncoderConfig, staging: Staging, vectors: VectorFiles) -> None:
    """State recall against exact search, how many replies of two tiers can be certified, and latency.

    Latency over as many files as the budget lets be open at once.
    """
    from research_rl.index import report
    from research_rl.index.dense import open_vectors

    ranges = ranges_of(staging.counts["passages"], staging.counts["shard_rows"])
    whole = open_vectors(staging.path, staging.facts, vectors, ranges, numbers=range(len(ranges)), keep=False)
    staging.facts["recall"] = report.recall(whole, vectors, config.sample)
    if isinstance(whole, TwoTier):
        staging.facts["certified"] = report.certified(whole, vectors.take(vectors.spread(min(config.sample, _CERTIFIED))))
    held = range(budget.files_held(config, vectors.dim, ranges, encoder))
    served = open_vectors(staging.path, staging.facts, vectors, ranges, numbers=held)
    staging.measured["latency"] = report.latency(served, vectors.take(vectors.spread(config.sample)))
    staging.measured["latency_rows"] = served.rows


def _canary(index: IndexSearcher, canaries: Sequence[dict[str, Any]], config: IndexConfig) -> dict[str, Any]:
    """Return the first passage whose own beginning, as a query, finds it; the service asks for it when it starts.

    Each is asked for alone, as the service asks: among centroids at equal distance faiss chooses by the size of the batch.
    """
    for canary in canaries:
        _, rows = index.search([canary["query"]], _CANARY_NEAR)
        if canary["row"] in rows[0]:
            return {**canary, "top_k": _CANARY_NEAR}
    kind, remedy = _made(config)
    raise ConfigError(f"{kind} finds none of {len(canaries)} passages by their own text among its first {_CANARY_NEAR}; {remedy}")


def _made(config: IndexConfig) -> tuple[str, str]:
    """Return what an index was made from, and what to do when it does not find what it holds."""
    if config.kind == "bm25":
        return "index.kind=bm25", (
            "their words are stop words, or stand in many passages alike: look for repeats in the report of the stage validate, "
            "or set index.kind=dense"
        )
    if config.prebuilt:
        return f"index.kind={config.kind} with index.prebuilt={config.prebuilt}", (
            "use the file that was built from this very corpus with this encoder, or remove index.prebuilt"
        )
    search = f" and index.search={config.search!r}" if config.search else ""
    return f"index.kind={config.kind} with index.factory={config.factory!r}{search}", (
        "use a finer index (Flat is exact) or another encoder, and look for repeated passages in the report of the stage validate"
    )
