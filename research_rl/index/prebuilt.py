"""Take up an existing faiss index file as it is, after proof that it fits. Knows files; searches nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import numpy as np

from research_rl.errors import ConfigError
from research_rl.index.dense import unit
from research_rl.index.search import VectorIndex, file_name
from research_rl.pipeline.copying import clone
from research_rl.pipeline.work import Work

__all__ = ["adopt"]


def adopt(work: Work, path: Path, rows: int, dim: int) -> dict[str, Any]:
    """Copy the file, so that no later edit of it alters the artifact, as the whole index; return facts. Raises ConfigError.

    Whether its rows are those of this corpus is left to the canary, which the stage then seeks by the encoder's own query vectors.
    """
    if not path.is_file():
        raise ConfigError(f"index.prebuilt={path} is no file{_instead(path)}; give the path of an existing faiss index")
    index = VectorIndex.open(path)
    _fits(index, path, rows, dim)

    def take(folder: Path) -> dict[str, Any]:
        clone(path, folder / file_name(0))
        return {}

    work.unit(unit(0), take)
    # A flat index of distances is exact only for vectors of unit length, so its recall is measured.
    return {"factory": index.kind, "exact": index.kind == "IndexFlatIP"}


def _instead(path: Path) -> str:
    """Say what a folder is that another library wrote."""
    if not (path / "params.index.json").is_file():
        return ""
    return (
        " but a folder that bm25s saved, which does not say how its words were cut and stemmed; "
        "index.kind=bm25 without index.prebuilt builds a word index from the corpus"
    )


def _fits(index: VectorIndex, path: Path, rows: int, dim: int) -> None:
    """Raises ConfigError for an index of another size or metric, or whose ids are not the corpus's rows."""
    if index.metric not in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
        raise ConfigError(
            f"index.prebuilt={path} compares by faiss metric {index.metric}; only inner product (0) and Euclidean distance (1) rank as "
            "an encoder's vectors do: build it with faiss.METRIC_INNER_PRODUCT"
        )
    if index.rows != rows:
        raise ConfigError(
            f"index.prebuilt={path} holds {index.rows:,} vectors, the corpus {rows:,} passages; use the corpus it was built from"
        )
    if index.dim != dim:
        raise ConfigError(f"index.prebuilt={path} holds vectors of {index.dim}, the encoder makes {dim}; set the encoder it was built with")
    seen = np.zeros(rows, bool)
    for ids in index.identifiers():
        # Used before, or twice in this very part.
        if ((ids < 0) | (ids >= rows)).any() or seen[ids].any() or len(np.unique(ids)) < len(ids):
            raise ConfigError(
                f"index.prebuilt={path} numbers its vectors by ids of its own, such as {int(ids[0]):,}; "
                f"add them in the order of the corpus, without ids, so that they are 0 to {rows - 1:,}"
            )
        seen[ids] = True
