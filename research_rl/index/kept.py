"""Which files of a standing index serve a new one as they are. Knows what a file of vectors is made from; reads no vector.

Invariant: a file is kept only under the key that a build from nothing would give it: factory, trained state, and the parts of the
vector files, by their sha256, that hold its rows. Word indexes weigh every passage by the whole corpus, so none of their files is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from research_rl.config import IndexConfig
from research_rl.index.vectors import VectorFiles
from research_rl.pipeline.copying import place
from research_rl.pipeline.manifest import Manifest

__all__ = ["StandingFiles", "key"]

Range = tuple[int, int]


def key(config: IndexConfig, trained: str, vectors: VectorFiles, digests: Mapping[Path, str], span: Range) -> str:
    """Return what the file over the rows `span` is made from, as one sha256; `trained` is that of the empty, trained index.

    `digests` has the sha256 of every vector file.
    """
    start, stop = span
    made = [config.factory, config.search, str(bool(config.refine)), str(vectors.dim), trained]
    for path, first, last in zip(vectors.paths, vectors.starts, vectors.starts[1:], strict=False):
        if first < stop and start < last:
            made.append(f"{digests[path]} {max(start - first, 0)} {min(stop, last) - first}")
    return sha256("\n".join(made).encode()).hexdigest()


class StandingFiles:
    """The files of a standing index by key, with what was recorded of each."""

    def __init__(self, files: Mapping[str, tuple[Path, dict[str, Any]]]) -> None:
        self._files = files

    @classmethod
    def of(cls, folder: Path, artifact: Manifest | None) -> Self:
        """Return the files of the index in `folder`; none where no whole one stands."""
        keys: list[str] = [] if artifact is None else artifact.facts.get("keys", [])
        if artifact is None or not keys:
            return cls({})
        records: list[dict[str, Any]] = artifact.facts.get("bounds", [{}] * len(keys))
        paths = [folder / entry.path for entry in artifact.files if entry.path.startswith(("index-", "scan-"))]
        if not len(keys) == len(records) == len(paths):
            return cls({})
        return cls(dict(zip(keys, zip(paths, records, strict=True), strict=True)))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def take(self, name: str, target: Path) -> dict[str, Any]:
        """Give the file of a key a second name, linked where the file system can; return what was recorded of it."""
        path, record = self._files[name]
        place(path, target)
        return record
