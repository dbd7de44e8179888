"""The user's own files of an index: that of `index.prebuilt` and the folder of `reranker.model`. Says where they lie, and whether they
are still what was copied; opens no index.
"""

from __future__ import annotations

from pathlib import Path

from research_rl.config import Config
from research_rl.embedding import models
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.outside import differences
from research_rl.pipeline.stages import Workspace
from research_rl.pipeline.verified import Verified
from research_rl.reranking import RERANKER

__all__ = ["hashes", "outside", "own_file"]


def own_file(config: Config, workspace: Workspace) -> Path | None:
    """Return the file that index.prebuilt names, relative to the workspace; None when it is not set."""
    return workspace.root / Path(config.index.prebuilt).expanduser() if config.index.prebuilt else None


def hashes(config: Config, workspace: Workspace) -> dict[str, str]:
    """Return the sha256 of that file by its name; nothing where there is none."""
    path = own_file(config, workspace)
    return {path.name: Verified(workspace.verified).sha256(path)} if path and path.is_file() else {}


def outside(config: Config, workspace: Workspace, published: Manifest) -> list[str]:
    """Return a line for each file of index.prebuilt or reranker.model that is another now than the one that was copied."""
    path, verified = own_file(config, workspace), Verified(workspace.verified)
    files = {path.name: path} if path and path.is_file() else {}
    recorded: dict[str, str] = published.facts.get(RERANKER, {}).get("source_files", {})
    return [
        *differences("index.prebuilt", published.facts.get("source_files", {}), files, verified),
        *differences("reranker.model", recorded, models.own_files(config.reranker, workspace.root), verified),
    ]
