"""Another kind of index over the same passages, kept beside the workspace's own, for evaluations that search there instead.

Knows folders and the stage index; searches nothing. Invariant: it is built once for a corpus and its parameters, as any other index.
"""

from __future__ import annotations

from research_rl.config import Config
from research_rl.pipeline import manifest
from research_rl.pipeline.run import current, room
from research_rl.pipeline.stages import STAGES, Context, Progress, Workspace

__all__ = ["swapped"]


def swapped(kind: str, config: Config, workspace: Workspace, progress: Progress) -> tuple[Config, Workspace]:
    """Return configuration and workspace of an index of `kind` over the workspace's passages, built now unless it stands.

    Raises ManifestError where passages or vectors are gone, and as the stage index.
    """
    side = _beside(workspace, kind)
    tree = config.model_dump(mode="json")
    tree["index"] |= {"kind": kind, "prebuilt": None}
    # A retriever that runs elsewhere searches the workspace's own index, so one is started for this index.
    tree["retriever"] |= {"url": None, "urls": ()}
    own = Config.model_validate(tree)
    parents = {name: manifest.load(side.folder(name), verify=False) for name in STAGES["index"].parents}
    if current("index", own, side, verify=False) is None:
        from research_rl.index.build import run

        progress(f"building the index of kind {kind}", 0.0)
        with room(f"the index of kind {kind}", workspace):
            run(Context(STAGES["index"], own, side, parents, progress))
    return own, side


def _beside(workspace: Workspace, kind: str) -> Workspace:
    """Return a workspace inside the work folder whose passages and vectors are those of `workspace`, by links."""
    # By links: passages and vectors, the largest of all artifacts, are the same for both indexes.
    side = Workspace(workspace.work(f"swapped-{kind}"))
    for name in STAGES["index"].parents:
        link, target = side.folder(name), workspace.folder(name).resolve()
        link.parent.mkdir(parents=True, exist_ok=True)
        if not (link.is_symlink() and link.resolve() == target):
            # One that leads elsewhere is of a workspace that was moved.
            link.unlink(missing_ok=True)
            link.symlink_to(target)
    return side
