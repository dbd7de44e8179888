"""Queries in, passages out: encoder, index and corpus joined after proof that they belong together.

Knows no HTTP. Invariants: (1) index, embeddings and corpus form one hash chain; (2) the canary of the index was found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from research_rl import manifest
from research_rl.config import RetrieverConfig
from research_rl.corpus.store import PassageStore
from research_rl.embedding import ENCODER, Encoder, load_encoder, vector_shards
from research_rl.errors import ManifestError
from research_rl.index.search import EXACT, Searcher, open_index
from research_rl.manifest import Manifest
from research_rl.stages import Workspace
from research_rl.trajectory import Passage

__all__ = ["Retriever"]

Say = Callable[[str], None]


def _nothing(text: str) -> None:
    """Say nothing."""


class Retriever:
    """Finds passages; `search` is for one thread at a time."""

    def __init__(self, encoder: Encoder, index: Searcher, store: PassageStore, facts: dict[str, Any]) -> None:
        self._encoder, self._index, self._store = encoder, index, store
        self.facts = facts

    @classmethod
    def open(cls, workspace: Workspace, config: RetrieverConfig, say: Say = _nothing) -> Retriever:
        """Open the workspace's knowledge side, telling `say` how far it is.

        Raises ManifestError when a part is missing, altered or of another build.
        """
        say("comparing hashes" if config.verify else "hashes are not compared (retriever.verify=false)")
        corpus = manifest.load(workspace.folder("corpus"), verify=config.verify)
        embed = manifest.load(workspace.folder("embed"), verify=False)
        index = manifest.load(workspace.folder("index"), verify=config.verify)
        if config.verify:
            _verify_embeddings(workspace, embed, vectors=index.facts["factory"] == EXACT)
        _chained(workspace, "index", index, "embed", embed)
        _chained(workspace, "embed", embed, "corpus", corpus)
        shards = vector_shards(workspace.folder("embed"), embed)
        vectors = open_index(workspace.folder("index"), index, shards, config.threads)
        store = PassageStore(workspace.folder("corpus"), corpus)
        say("index and passages are open, loading the encoder")
        encoder = load_encoder(workspace.folder("embed"), embed)
        _same_shape(vectors, store, encoder)
        facts = {"rows": vectors.rows, "dim": vectors.dim, "factory": index.facts["factory"], "encoder": embed.facts["encoder"]}
        hashes = {"index": index.hash, "embed": embed.hash, "corpus": corpus.hash}
        made = cls(encoder, vectors, store, {**facts, "manifests": hashes})
        made._sing(index.facts["canary"])
        say("the canary was found")
        return made

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """Return up to `top_k` passages for each query, best first, with scores."""
        scores, rows = self._index.search(self._encoder.encode_queries(queries), top_k)
        return [self._passages(row, score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True)]

    def _passages(self, rows: list[int], scores: list[float]) -> list[Passage]:
        kept = [(row, score) for row, score in zip(rows, scores, strict=True) if row >= 0]
        passages = self._store.get(row for row, _ in kept)
        return [Passage(passage.id, passage.contents, score) for passage, (_, score) in zip(passages, kept, strict=True)]

    def _sing(self, canary: dict[str, Any]) -> None:
        found = [passage.id for passage in self.search([canary["query"]], canary["top_k"])[0]]
        if canary["id"] not in found:
            raise ManifestError(
                f"the canary passage {canary['id']!r} is not among the first {canary['top_k']} found ({found}); "
                "the encoder does not fit the index; run the stages embed and index again"
            )


def _chained(workspace: Workspace, child: str, found: Manifest, parent: str, made: Manifest) -> None:
    wanted = found.parents.get(parent, "nothing")
    if wanted != made.hash:
        raise ManifestError(
            f"{workspace.folder(child)} was built from {parent} {wanted[:12]}, but {workspace.folder(parent)} is {made.hash[:12]}; "
            f"run the stage {child} again or bring back the {parent} it was built from"
        )


def _verify_embeddings(workspace: Workspace, embed: Manifest, *, vectors: bool) -> None:
    """Compare the hashes of what is read while searching: the encoder, and the vectors where the index rescores with them."""
    folder = workspace.folder("embed")
    for entry in embed.files:
        read = vectors or entry.path.startswith(f"{ENCODER}/")
        if read and manifest.file_sha256(folder / entry.path) != entry.sha256:
            raise ManifestError(f"{folder / entry.path} was altered after it was built; remove {folder} and rerun")


def _same_shape(index: Searcher, store: PassageStore, encoder: Encoder) -> None:
    if index.rows != len(store):
        raise ManifestError(f"the index holds {index.rows:,} vectors, the corpus {len(store):,} passages; run the index stage again")
    if index.dim != encoder.dim:
        raise ManifestError(
            f"the index holds vectors of {index.dim}, the encoder makes {encoder.dim}; run the embed and index stages again"
        )
