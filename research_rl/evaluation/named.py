"""Find an evaluation by what a person calls it. Knows the workspace's artifacts; asks MLflow only through the function it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from research_rl.errors import ConfigError
from research_rl.pipeline import manifest
from research_rl.pipeline.manifest import Manifest
from research_rl.pipeline.stages import Workspace

__all__ = ["TRACKED", "Lookup", "folder"]

TRACKED = ("mlflow:", "registry:")
"""How names begin that MLflow knows: of a run, and of a version in its model registry."""
_FEWEST = 4
_KEPT = ("evaluate", "baseline")
_LABELLED = ("cell", "night")
"""Artifacts of which a workspace holds many, each in a folder with a name of its own."""
_OWN = "research"

Lookup = Callable[[str], Sequence[str]]
"""Returns the hashes of artifacts that a name in MLflow stands for. Raises ConfigError for an unknown one, ServiceError if MLflow fails."""


def folder(name: str, workspace: Workspace, lookup: Lookup) -> Path:
    """Return the folder of an evaluation.

    `name` is a folder; @current or @previous, the evaluation after training and the one that it replaced; the label of a cell or a
    night, or the first digits of its hash or of any evaluation's; mlflow:RUN or registry:NAME/VERSION, whose evaluation is looked for in
    the workspace by its hash or by its model's: then that of a stage counts first, and cells by our own method before others. Raises
    ConfigError for what names none or several, and as `lookup`.
    """
    if name == "@current":
        return workspace.folder("evaluate")
    if name == "@previous":
        return _previous(workspace)
    if name.startswith(TRACKED):
        return _tracked(name, lookup(name), workspace)
    if Path(name).is_dir():
        return Path(name)
    paths = [path for path, each in _standing(workspace) if _is(name, path, each)]
    if len(paths) == 1:
        return paths[0]
    if paths:
        raise ConfigError(
            f"{name} begins the hashes of {len(paths)} evaluations: {', '.join(path.name for path in paths)}; give more digits"
        )
    raise ConfigError(
        f"{name} is neither a folder nor the label or the first {_FEWEST} or more digits of an evaluation in {workspace.root}; "
        "list them by `ls artifacts/cells artifacts/nights`"
    )


def _previous(workspace: Workspace) -> Path:
    replaced = workspace.previous("evaluate")
    if not (replaced / manifest.MANIFEST).is_file():
        raise ConfigError(f"@previous: no evaluation was replaced in {workspace.root} so far; name another")
    return replaced


def _is(name: str, path: Path, each: Manifest) -> bool:
    digits = len(name) >= _FEWEST and (each.hash.startswith(name) or (each.stage in _LABELLED and each.config_hash.startswith(name)))
    return path.name == name or digits


def _tracked(name: str, hashes: Sequence[str], workspace: Workspace) -> Path:
    """Return the evaluation that has one of these hashes, else the one that shows best what a model with one of them can do."""
    standing = list(_standing(workspace))
    # The likeliest one comes first, so its evaluation wins over any of the others.
    for digest in hashes:
        if exact := next((path for path, each in standing if each.hash == digest), None):
            return exact
        # A night is a measurement of many, by which its model is not known best.
        if played := [(path, each) for path, each in standing if each.stage != "night" and digest in _models(each)]:
            return _chosen(name, played, workspace)
    shown = ", ".join(each[:12] for each in hashes) or "none"
    raise ConfigError(
        f"{name} stands for artifacts {shown}, and {workspace.root} holds no evaluation of them; "
        "evaluate that model here by `research evaluate --model`"
    )


def _models(each: Manifest) -> tuple[Any, ...]:
    return each.parents.get("export"), each.parents.get("policy"), each.parameters.get("model_sha256")


def _chosen(name: str, played: Sequence[tuple[Path, Manifest]], workspace: Workspace) -> Path:
    """Return one evaluation of a model: that of a stage, which has all questions; else the only one by our method, else the only one.

    Raises ConfigError that names them where several are left.
    """
    stages = [path for path, _ in played if path in map(workspace.folder, _KEPT)]
    plain = [path for path, each in played if _is_plain(each)]
    candidates = stages or plain or [path for path, _ in played]
    if len(candidates) == 1:
        return candidates[0]
    choices = ", ".join(path.relative_to(workspace.root).as_posix() for path in candidates)
    raise ConfigError(f"{name} is a model with {len(candidates)} evaluations in {workspace.root}: {choices}; name one of them by its path")


def _is_plain(each: Manifest) -> bool:
    """Return whether an evaluation was played by our own method, once, on evidence that nobody changed."""
    about = each.parameters
    return about.get("method", _OWN) == _OWN and not about.get("sample") and not about.get("evidence")


def _standing(workspace: Workspace) -> Iterator[tuple[Path, Manifest]]:
    """Yield every evaluation of a workspace: those of its stages, those that they replaced, its cells and its nights."""
    stages = [*map(workspace.folder, _KEPT), *map(workspace.previous, _KEPT)]
    labelled = [path for folder in ("cells", "nights") for path in sorted((workspace.root / "artifacts" / folder).glob("[!.]*"))]
    for path in [*stages, *labelled]:
        if artifact := manifest.found(path, verify=False):
            yield path, artifact
