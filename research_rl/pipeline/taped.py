"""The manifests that a tape of searches keeps of its index, so that it can be replayed where the index is not. Knows folders and hashes.

Invariant: an index that lies in the workspace counts; only where its manifest is gone is that of the only tape taken.
"""

from __future__ import annotations

from pathlib import Path

from research_rl.config import Config
from research_rl.errors import ManifestError
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import Workspace

__all__ = ["PARENTS", "folder_of", "loaded", "manifest_folder", "replaced"]

PARENTS = ("embed", "index")
"""Stages whose files only a search reads: their manifests are kept with a tape."""
_FOLDER, _SHOWN = Path("artifacts") / "tapes", 12


def folder_of(workspace: Workspace, index: str) -> Path:
    """Return the folder of the tape of the index with this hash."""
    return workspace.root / _FOLDER / index[:_SHOWN]


def manifest_folder(tape: Path, stage: str) -> Path:
    """Return the folder in which a tape keeps the manifest of a stage."""
    return tape / stage


def loaded(stage: str, config: Config, workspace: Workspace) -> Manifest:
    """Return the manifest of a stage's artifact, whose files are there, or that of a tape which is replayed in its place.

    Raises ManifestError.
    """
    return replaced(stage, config, workspace) or manifest.load(workspace.folder(stage), verify=False)


def replaced(stage: str, config: Config, workspace: Workspace) -> Manifest | None:
    """Return the manifest that the only tape keeps of a stage whose artifact is gone, None unless that tape is replayed.

    Raises ManifestError where several tapes stand.
    """
    if config.retriever.tape != "replay" or stage not in PARENTS or (workspace.folder(stage) / manifest.MANIFEST).is_file():
        return None
    tapes = [path for path in sorted((workspace.root / _FOLDER).glob("[!.]*")) if manifest.found(path, verify=False)]
    if len(tapes) > 1:
        raise ManifestError(
            f"{workspace.folder(stage)} is gone and {workspace.root / _FOLDER} holds {len(tapes)} tapes "
            f"({', '.join(path.name for path in tapes)}); leave the one that is to be replayed"
        )
    return manifest.read(manifest_folder(tapes[0], stage)) if tapes else None
