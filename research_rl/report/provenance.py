"""Say how a report's numbers came about: date, code, seed, changed parameters, time per stage. Reads notes and manifests.

Invariant: the same parents in the same workspace give the same text, so that a report built again has the same bytes. The date is
therefore that of the newest parent, never that of the page.
"""

from __future__ import annotations

from dataclasses import dataclass

from research_rl import config
from research_rl.errors import ConfigError
from research_rl.pipeline import manifest
from research_rl.pipeline.meter import duration, moment
from research_rl.pipeline.stages import STAGES, Context, measured
from research_rl.report import parameters
from research_rl.report.parameters import Row
from research_rl.report.version import commit

__all__ = ["StageFacts", "changed", "headline", "stage_facts", "stage_rows"]

_DASH = "–"


@dataclass(frozen=True)
class StageFacts:
    """What building one stage took: ISO time of its end in UTC, seconds, MiB; empty or None where it was built elsewhere."""

    stage: str
    hash: str
    code_version: str
    finished: str
    seconds: float | None
    peak_mib: float | None


def stage_facts(context: Context) -> list[StageFacts]:
    """Return the facts of every stage above the report whose artifact is in this workspace, in the order of the pipeline."""
    ancestors = _ancestors(context.stage.name)
    folders = {name: context.workspace.folder(name) for name in STAGES if name in ancestors}
    # With a DVC remote a workspace may hold the last artifacts without those above them.
    return [_facts(context, name) for name, folder in folders.items() if (folder / manifest.MANIFEST).is_file()]


def headline(context: Context, stages: list[StageFacts]) -> list[str]:
    """Return short facts for the head of a page: when, with which seed and code, how long."""
    # ISO times in UTC sort as text.
    finished = max((facts.finished for facts in stages), default="")
    seconds = sum(facts.seconds or 0.0 for facts in stages)
    facts = [f"finished {moment(finished)} UTC"] if finished else []
    return [*facts, f"seed {context.config.seed}", _code(stages), *([f"{duration(seconds)} over all stages"] if seconds else [])]


def changed(context: Context) -> list[Row] | None:
    """Return (name, in the profile, in this run) of the deciding parameters that differ; None when the profile is unknown here."""
    deciding = parameters.read(context.parent("evaluate"))
    try:
        profile = config.load_profile(context.config.profile)
    # A workspace outlives the profile that it came from.
    except ConfigError:
        return None
    # As they take effect, since the evaluation recorded them so: a seed that is left empty is another one's value, a prompt its content.
    return parameters.differences(config.parameters(profile, deciding), deciding)


def stage_rows(stages: list[StageFacts]) -> list[list[str]]:
    """Return table rows: stage, time of its end, wall time, peak memory, first digits of the artifact's hash."""
    return [
        [
            facts.stage,
            moment(facts.finished) if facts.finished else _DASH,
            _DASH if facts.seconds is None else duration(facts.seconds),
            _DASH if facts.peak_mib is None else f"{facts.peak_mib:,.0f} MiB",
            facts.hash[:12],
        ]
        for facts in stages
    ]


def _ancestors(stage: str) -> set[str]:
    parents = set(STAGES[stage].parents)
    return parents.union(*map(_ancestors, parents))


def _facts(context: Context, name: str) -> StageFacts:
    artifact = manifest.load(context.workspace.folder(name), verify=False)
    note = measured(context.workspace, artifact)
    return StageFacts(name, artifact.hash, artifact.code_version, note.get("finished", ""), note.get("seconds"), note.get("peak_mib"))


def _code(stages: list[StageFacts]) -> str:
    versions = ", ".join(sorted({facts.code_version for facts in stages}))
    checkout = commit()
    if checkout is None:
        return f"research-rl {versions}"
    return f"research-rl {versions}, commit {checkout.hash[:12]}{' with uncommitted changes' if checkout.changed else ''}"
