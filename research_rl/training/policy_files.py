"""Which files of a model folder make a policy, and whether those of the user's own folder are still the ones that were copied."""

from __future__ import annotations

from pathlib import Path

from research_rl.config import Config
from research_rl.errors import ModelError
from research_rl.pipeline.manifest import MANIFEST, Manifest
from research_rl.pipeline.outside import differences
from research_rl.pipeline.stages import Workspace
from research_rl.pipeline.verified import Verified
from research_rl.serving.tensors import weight_files

__all__ = ["DESCRIPTION", "hashes", "local_folder", "model_files", "outside"]

DESCRIPTION = ("*.json", "*.txt", "*.jinja", "*.model")
"""Files of a model folder beside the weights."""


def model_files(folder: Path) -> dict[str, Path]:
    """Return the files of a model folder that are copied, by name. Raises ModelError when weights are missing."""
    described = {path for pattern in DESCRIPTION for path in folder.glob(pattern) if path.is_file() and not path.name.startswith(".")}
    # A folder that was published by this pipeline holds its own manifest; the artifact gets another.
    return {path.name: path for path in sorted(described | set(weight_files(folder))) if path.name != MANIFEST}


def local_folder(path: str, workspace: Workspace) -> Path:
    """Return the folder that policy.path names; a relative one is relative to the workspace."""
    return workspace.root / Path(path).expanduser()


def hashes(folder: Path, workspace: Workspace) -> dict[str, str]:
    """Return the sha256 of the files that are copied, by name. Raises ModelError when weights are missing."""
    verified = Verified(workspace.verified)
    return {name: verified.sha256(path) for name, path in model_files(folder).items()}


def outside(config: Config, workspace: Workspace, published: Manifest) -> list[str]:
    """Return in what the model folder of policy.path is another now than the one that was copied, one line a file."""
    if config.policy.source != "folder" or not config.policy.path:
        return []
    folder = local_folder(config.policy.path, workspace)
    # A disk that is not mounted leaves an empty folder.
    if not (folder / "config.json").is_file():
        return []
    try:
        files = model_files(folder)
    except ModelError as error:
        return [f"policy.path: {error}"]
    return differences("policy.path", published.facts.get("source_files", {}), files, Verified(workspace.verified))
