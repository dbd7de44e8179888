"""Take up an existing faiss index file as it is, after proof that it fits. Knows files; searches nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from research_rl.errors import ConfigError
from research_rl.index.dense import unit
from research_rl.index.search import VectorIndex, file_name
from research_rl.pipeline.work import Work

__all__ = ["adopt"]


def adopt(work: Work, path: Path, rows: int, dim: int) -> dict[str, Any]:
    """Link the file (copy it where the file system forbids links) as the whole index; return facts. Raises ConfigError.

    Whether its rows are those of this corpus shows the canary, found by the encoder's own query vectors.
    """
    if not path.is_file():
        raise ConfigError(f"index.prebuilt={path} is no file; give the path of an existing faiss index")
    found = VectorIndex.open(path)
    if found.rows != rows:
        raise ConfigError(
            f"index.prebuilt={path} holds {found.rows:,} vectors, the corpus {rows:,} passages; use the corpus it was built from"
        )
    if found.dim != dim:
        raise ConfigError(f"index.prebuilt={path} holds vectors of {found.dim}, the encoder makes {dim}; set the encoder it was built with")

    def take(folder: Path) -> dict[str, Any]:
        target = folder / file_name(0)
        try:
            os.link(path.resolve(), target)
        except OSError:
            shutil.copyfile(path, target)
        return {}

    work.unit(unit(0), take)
    return {"factory": found.kind, "exact": found.kind.startswith("IndexFlat")}
