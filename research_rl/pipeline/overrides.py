"""Which stages the parameters given to a run would make stale. Knows the stage table and manifests; builds nothing."""

from __future__ import annotations

from research_rl.config import Config, changes, config_hash, located, parameters
from research_rl.errors import ConfigError
from research_rl.pipeline import manifest
from research_rl.pipeline.stages import STAGES, Stage, Workspace

__all__ = ["moved", "refuse_strangers"]


def moved(before: Config, after: Config, workspace: Workspace) -> dict[str, list[str]]:
    """Return `name before -> after` of the parameters in which two configurations differ, by the stage that they decide."""
    old, new = (located(each, workspace.root) for each in (before, after))
    lines = {name: changes(parameters(old, stage.sections), parameters(new, stage.sections)) for name, stage in STAGES.items()}
    return {name: changed for name, changed in lines.items() if changed}


def refuse_strangers(stage: str, before: Config, after: Config, workspace: Workspace) -> None:
    """Raise ConfigError for a parameter that `stage` does not read and that would make an artifact stale which stands under `before`."""
    stale = [STAGES[name] for name in moved(before, after, workspace) if name != stage and _stands(name, before, workspace)]
    given = [line for line in changes(before.model_dump(mode="json"), after.model_dump(mode="json")) if not _reads(STAGES[stage], line)]
    strangers = [line for line in given if any(_reads(other, line) for other in stale)]
    if strangers:
        left = [other.name for other in stale if any(_reads(other, line) for line in strangers)]
        raise ConfigError(
            f"{'; '.join(strangers)}: the stage {stage} does not read it, and {', '.join(left)}, built with the former value, "
            f"would be stale; leave the override out, or give it to `research run {left[0]}`, in a workspace of its own if both shall stand"
        )


def _reads(stage: Stage, line: str) -> bool:
    """Whether a changed parameter, as `changes` names it, is among those that decide a stage."""
    name = line.partition(" ")[0]
    return any(name == key or name.startswith(f"{key}.") for key in stage.keys)


def _stands(name: str, config: Config, workspace: Workspace) -> bool:
    artifact = manifest.found(workspace.folder(name), verify=False)
    return artifact is not None and artifact.config_hash == config_hash(located(config, workspace.root), STAGES[name].sections)
