"""The index that stands already, where the new one differs from it in the reranker alone: its files are taken over, not built again.

Invariant: taken over is only what was read and found whole, built from the same parents, parameters and files of the user's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from research_rl.config import located, parameters
from research_rl.pipeline.copying import place
from research_rl.pipeline.manifest import Manifest, Staging
from research_rl.pipeline.stages import Context, measured
from research_rl.reranking import RERANKER

__all__ = ["adopt", "same_but_reranker"]


def same_but_reranker(context: Context, artifact: Manifest | None, own: Mapping[str, str]) -> Manifest | None:
    """Return the index `artifact`, which stands, when everything but the reranker is as asked for now; `own` as in `Work`."""
    if artifact is None:
        return None
    sections = [name for name in context.stage.sections if name != RERANKER]
    current = parameters(located(context.config, context.workspace.root), sections)
    # A file of index.prebuilt that is not on this machine counts as unchanged, see `own_file.outside`.
    same = {name: artifact.parameters.get(name) for name in sections} == current and own in ({}, artifact.facts.get("source_files", {}))
    return artifact if same and artifact.parents == {name: parent.hash for name, parent in context.parents.items()} else None


def adopt(context: Context, artifact: Manifest, staging: Staging) -> None:
    """Give files, counts, facts and measurements of the standing index to the new one, those of its reranker left out."""
    folder = context.workspace.folder("index")
    for name in (entry.path for entry in artifact.files if not entry.path.startswith(f"{RERANKER}/")):
        (staging.path / name).parent.mkdir(parents=True, exist_ok=True)
        place(folder / name, staging.path / name)
    staging.counts |= artifact.counts
    staging.facts |= {name: value for name, value in artifact.facts.items() if name != RERANKER}
    staging.measured |= _kept(measured(context.workspace, artifact))


def _kept(took: Mapping[str, Any]) -> dict[str, Any]:
    return {name: took[name] for name in ("build_seconds", "planned_mib", "latency", "latency_rows") if name in took}
