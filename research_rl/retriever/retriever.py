"""Queries in, passages out: encoder, index, reranker and corpus joined after proof that they belong together.

Knows no HTTP. Invariants: (1) index, embeddings and corpus form one hash chain; (2) the canary of the index was found.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from research_rl.config import RetrieverConfig
from research_rl.corpus.store import PassageStore
from research_rl.embedding import ENCODER, Vectors
from research_rl.episode.trajectory import Passage
from research_rl.errors import ManifestError
from research_rl.index.bounds import Kind
from research_rl.index.text import Dense, IndexSearcher, Rows, open_index, part_rows, reads_vectors
from research_rl.index.tiers import Certificate
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import Workspace
from research_rl.pipeline.verified import Verified
from research_rl.reranking import RERANKER, Reranker, load_reranker
from research_rl.reranking.order import Watch
from research_rl.retriever.opened import OpenedFiles

__all__ = ["Retriever"]

Say = Callable[[str], None]
_WARM_SIZES = (1, 4, 16)


def _nothing(text: str) -> None:
    """Say nothing."""


class Retriever:
    """Finds passages; `search` is for one thread at a time."""

    def __init__(
        self,
        index: IndexSearcher,
        store: PassageStore,
        facts: dict[str, Any],
        files: Iterable[Path] = (),
        reranker: Reranker | None = None,
        canary: dict[str, Any] | None = None,
        *,
        holds_canary: bool = False,
    ) -> None:
        self._index, self._store, self._reranker = index, store, reranker
        self._canary, self._holds_canary = canary or {}, holds_canary
        self._files = OpenedFiles(files)
        self.facts = facts

    @classmethod
    def open(cls, workspace: Workspace, config: RetrieverConfig, say: Say = _nothing, part: tuple[int, int] = (0, 1)) -> Retriever:
        """Open the workspace's knowledge side, or the i-th of n parts of its index, and prove it, telling `say` how far it is.

        Raises ManifestError when something is missing, altered or of another build, ConfigError for more parts than index files.
        """
        retriever = cls.load(workspace, config, say, part)
        retriever.prove(config, say)
        retriever.require_standing(workspace)
        return retriever

    @classmethod
    def load(cls, workspace: Workspace, config: RetrieverConfig, say: Say = _nothing, part: tuple[int, int] = (0, 1)) -> Retriever:
        """Open files and models and search nothing; see `open`."""
        say("comparing hashes" if config.verify else "hashes are not compared (retriever.verify=false)")
        verified = Verified(workspace.verified)
        corpus = manifest.load(workspace.folder("corpus"), verify=config.verify, hashed=verified.sha256)
        # Not all of it: most of its bytes are vectors that only index.factory=Exact reads; see `_verify_embeddings`.
        embed = manifest.load(workspace.folder("embed"), verify=False)
        index = manifest.load(workspace.folder("index"), verify=config.verify, hashed=verified.sha256)
        if config.verify:
            _verify_embeddings(workspace, embed, verified, vectors=reads_vectors(index))
        _chained(workspace, "embed", embed, {"corpus": corpus})
        _chained(workspace, "index", index, {"embed": embed, "corpus": corpus})
        say("opening index, passages and encoder")
        searcher = open_index(workspace.folder("index"), index, workspace.folder("embed"), embed, config.threads, part=part)
        facts = {"rows": searcher.rows, **_described(index), "encoder": embed.facts["encoder"]}
        hashes = {"index": index.hash, "embed": embed.hash, "corpus": corpus.hash}
        files = [
            workspace.folder(stage) / entry.path for stage, artifact in (("index", index), ("corpus", corpus)) for entry in artifact.files
        ]
        reranker = load_reranker(workspace.folder("index"), index.facts, config.threads)
        store = PassageStore(workspace.folder("corpus"), corpus)
        # Now, not at their first use: by then the folder may hold the shards of a newer corpus.
        store.map_shards()
        if config.warm:
            _page_in(workspace, index)
        first, end = part_rows(index.counts, part)
        canary: dict[str, Any] = index.facts["canary"]
        # A part of an index can find the canary only when it holds its row.
        return cls(searcher, store, {**facts, "manifests": hashes}, files, reranker, canary, holds_canary=first <= canary["row"] < end)

    def prove(self, config: RetrieverConfig, say: Say = _nothing) -> None:
        """Find the canary, and search once at the sizes whose first search is slow. Raises ManifestError."""
        if self._holds_canary:
            self._check_canary(self._canary)
            say("the canary was found")
        if config.warm:
            self._warm(self._canary["query"])
            say("warm")

    def require_standing(self, workspace: Workspace) -> None:
        """Raise ManifestError when a folder was replaced while its files were opened: some may be of the one, some of the other."""
        hashes: dict[str, str] = self.facts["manifests"]
        for stage, opened in hashes.items():
            if (now := manifest.load(workspace.folder(stage), verify=False).hash) != opened:
                raise ManifestError(f"{workspace.folder(stage)} was replaced by {now[:12]} while {opened[:12]} was opened; open it again")

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """Return up to `top_k` passages for each query, best first, with scores."""
        self._files.check()
        return self._ordered(queries, self._found(*self._index.search(queries, self._depth(top_k))), top_k)

    def watch_reranking(self, watch: Watch) -> None:
        """Have `watch` told what the reranker read in each joint search; without a reranker it hears nothing."""
        if self._reranker:
            self._reranker.watch = watch

    def certified(self, queries: Sequence[str], top_k: int, kind: Kind, budget: int) -> tuple[list[list[Passage]], list[Certificate]]:
        """Return what `search` returns, with up to `budget` candidates a query, and how sure each reply is.

        An exact index is always sure. One whose scores have no bound never is: hybrid, words, codes without `index.refine`.
        Where there is a reranker the certificate is for the candidates that it is given.
        """
        if self.facts["exact"] or not isinstance(self._index, Dense):
            sure = Certificate(True, 0, self._index.rows) if self.facts["exact"] else Certificate(False, self._index.rows, 0)
            return self.search(queries, top_k), [sure] * len(queries)
        self._files.check()
        scores, rows, certificates = self._index.certified(queries, self._depth(top_k), kind, budget)
        return self._ordered(queries, self._found(scores, rows), top_k), certificates

    def check_files(self) -> None:
        """Raises ManifestError when a file of the index or the corpus was cut short since it was opened."""
        self._files.check()

    def close(self) -> None:
        """Close the files; nothing can be searched after it."""
        self._files.close()

    def _warm(self, query: str) -> None:
        """Search once at every size whose first search is slower than the next: buffers, kernels and pages are there then."""
        for size in _WARM_SIZES:
            self.search([f"{query[: 40 + place]} {place}" for place in range(size)], 5)

    def _depth(self, top_k: int) -> int:
        """Return how many passages of the index a reply of `top_k` is chosen from."""
        return max(top_k, self._reranker.candidates) if self._reranker else top_k

    def _ordered(self, queries: Sequence[str], results: list[list[Passage]], top_k: int) -> list[list[Passage]]:
        return [passages[:top_k] for passages in self._reranker.order(queries, results)] if self._reranker else results

    def _found(self, scores: Vectors, rows: Rows) -> list[list[Passage]]:
        return [self._passages(row, score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True)]

    def _passages(self, rows: list[int], scores: list[float]) -> list[Passage]:
        # Row -1: the index found fewer than were asked for.
        hits = [(row, score) for row, score in zip(rows, scores, strict=True) if row >= 0]
        passages = self._store.get(row for row, _ in hits)
        return [Passage(passage.id, passage.contents, score) for passage, (_, score) in zip(passages, hits, strict=True)]

    def _check_canary(self, canary: dict[str, Any]) -> None:
        # Of the index alone: what a reranker puts first says nothing about whether index and encoder fit.
        ids = [passage.id for passage in self._found(*self._index.search([canary["query"]], canary["top_k"]))[0]]
        if canary["id"] not in ids:
            raise ManifestError(
                f"the canary passage {canary['id']!r} is not among the first {canary['top_k']} found ({ids}); "
                "the encoder does not fit the index; run the stages embed and index again"
            )


def _page_in(workspace: Workspace, index: Manifest) -> None:
    """Ask the system to read the index files ahead; returns at once and shares the pages with every other process."""
    for entry in index.files:
        handle = os.open(workspace.folder("index") / entry.path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(handle)


def _described(index: Manifest) -> dict[str, Any]:
    # Of words alone the facts say nothing about being exact, and of a hybrid they mean its vectors.
    exact = index.facts["kind"] == "dense" and index.facts["exact"]
    facts = {"kind": index.facts["kind"], "dim": index.counts["dim"], "factory": index.facts.get("factory"), "exact": exact}
    return facts | {name: index.facts[name] for name in ("candidates", RERANKER) if name in index.facts}


def _chained(workspace: Workspace, child: str, artifact: Manifest, parents: dict[str, Manifest]) -> None:
    for parent, present in parents.items():
        built_from = artifact.parents.get(parent, "nothing")
        if built_from != present.hash:
            raise ManifestError(
                f"{workspace.folder(child)} was built from {parent} {built_from[:12]}, "
                f"but {workspace.folder(parent)} is {present.hash[:12]}; "
                f"run the stage {child} again or bring back the {parent} it was built from"
            )


def _verify_embeddings(workspace: Workspace, embed: Manifest, verified: Verified, *, vectors: bool) -> None:
    """Compare the hashes of what is read while searching: the encoder, and the vectors where the index rescores with them."""
    folder = workspace.folder("embed")
    for entry in embed.files:
        read = vectors or entry.path.startswith(f"{ENCODER}/")
        if read and verified.sha256(folder / entry.path) != entry.sha256:
            raise ManifestError(f"{folder / entry.path} was altered after it was built; remove {folder} and rerun")
