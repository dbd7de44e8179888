"""Queries in, passages out: encoder, index and corpus joined after proof that they belong together.

Knows no HTTP. Invariants: (1) index, embeddings and corpus form one hash chain; (2) the canary of the index was found.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from research_rl.config import RetrieverConfig
from research_rl.corpus.store import PassageStore
from research_rl.embedding import ENCODER
from research_rl.episode.trajectory import Passage
from research_rl.errors import ManifestError
from research_rl.index.text import IndexSearcher, open_index, part_rows, reads_vectors
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import Workspace
from research_rl.retriever.opened import OpenedFiles

__all__ = ["Retriever"]

Say = Callable[[str], None]
_WARM_SIZES = (1, 4, 16)


def _nothing(text: str) -> None:
    """Say nothing."""


class Retriever:
    """Finds passages; `search` is for one thread at a time."""

    def __init__(self, index: IndexSearcher, store: PassageStore, facts: dict[str, Any], files: Iterable[Path] = ()) -> None:
        self._index, self._store = index, store
        self._files = OpenedFiles(files)
        self.facts = facts

    @classmethod
    def open(cls, workspace: Workspace, config: RetrieverConfig, say: Say = _nothing, part: tuple[int, int] = (0, 1)) -> Retriever:
        """Open the workspace's knowledge side, or the i-th of n parts of its index, telling `say` how far it is.

        Raises ManifestError when something is missing, altered or of another build, ConfigError for more parts than index files.
        """
        say("comparing hashes" if config.verify else "hashes are not compared (retriever.verify=false)")
        corpus = manifest.load(workspace.folder("corpus"), verify=config.verify)
        # Not all of it: most of its bytes are vectors that only index.factory=Exact reads; see `_verify_embeddings`.
        embed = manifest.load(workspace.folder("embed"), verify=False)
        index = manifest.load(workspace.folder("index"), verify=config.verify)
        if config.verify:
            _verify_embeddings(workspace, embed, vectors=reads_vectors(index))
        _chained(workspace, "embed", embed, {"corpus": corpus})
        _chained(workspace, "index", index, {"embed": embed, "corpus": corpus})
        say("opening index, passages and encoder")
        searcher = open_index(workspace.folder("index"), index, workspace.folder("embed"), embed, config.threads, part=part)
        facts = {"rows": searcher.rows, **_described(index), "encoder": embed.facts["encoder"]}
        hashes = {"index": index.hash, "embed": embed.hash, "corpus": corpus.hash}
        files = [
            workspace.folder(stage) / entry.path for stage, artifact in (("index", index), ("corpus", corpus)) for entry in artifact.files
        ]
        retriever = cls(searcher, PassageStore(workspace.folder("corpus"), corpus), {**facts, "manifests": hashes}, files)
        first, end = part_rows(index.counts, part)
        # A part of an index can find the canary only when it holds its row.
        if first <= index.facts["canary"]["row"] < end:
            retriever._check_canary(index.facts["canary"])
            say("the canary was found")
        if config.warm:
            _page_in(workspace, index)
            retriever._warm(index.facts["canary"]["query"])
            say("warm")
        return retriever

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """Return up to `top_k` passages for each query, best first, with scores."""
        self._files.check()
        scores, rows = self._index.search(queries, top_k)
        return [self._passages(row, score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True)]

    def check_files(self) -> None:
        """Raises ManifestError when a file of the index or the corpus was cut short since it was opened."""
        self._files.check()

    def _warm(self, query: str) -> None:
        """Search once at every size whose first search is slower than the next: buffers, kernels and pages are there then."""
        for size in _WARM_SIZES:
            self.search([f"{query[: 40 + place]} {place}" for place in range(size)], 5)

    def _passages(self, rows: list[int], scores: list[float]) -> list[Passage]:
        # Row -1: the index found fewer than were asked for.
        hits = [(row, score) for row, score in zip(rows, scores, strict=True) if row >= 0]
        passages = self._store.get(row for row, _ in hits)
        return [Passage(passage.id, passage.contents, score) for passage, (_, score) in zip(passages, hits, strict=True)]

    def _check_canary(self, canary: dict[str, Any]) -> None:
        ids = [passage.id for passage in self.search([canary["query"]], canary["top_k"])[0]]
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
    return {"kind": index.facts["kind"], "dim": index.counts["dim"], "factory": index.facts.get("factory")}


def _chained(workspace: Workspace, child: str, artifact: Manifest, parents: dict[str, Manifest]) -> None:
    for parent, present in parents.items():
        built_from = artifact.parents.get(parent, "nothing")
        if built_from != present.hash:
            raise ManifestError(
                f"{workspace.folder(child)} was built from {parent} {built_from[:12]}, "
                f"but {workspace.folder(parent)} is {present.hash[:12]}; "
                f"run the stage {child} again or bring back the {parent} it was built from"
            )


def _verify_embeddings(workspace: Workspace, embed: Manifest, *, vectors: bool) -> None:
    """Compare the hashes of what is read while searching: the encoder, and the vectors where the index rescores with them."""
    folder = workspace.folder("embed")
    for entry in embed.files:
        read = vectors or entry.path.startswith(f"{ENCODER}/")
        if read and manifest.file_sha256(folder / entry.path) != entry.sha256:
            raise ManifestError(f"{folder / entry.path} was altered after it was built; remove {folder} and rerun")
