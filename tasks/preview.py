"""Task dry-run: what a training run would do, printed and published as a Prefect artifact. Runs no stage."""

from __future__ import annotations

import sys
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from research_rl.pipeline.stages import Workspace
from research_rl.planning.dry_run import dry_run
from research_rl.terminal import printable, say
from tasks.artifacts import showing
from tasks.job import folder_of, resolve

__all__ = ["preview"]


@task(name="dry-run", description="what a run would do, resolved to the last value", cache_policy=NO_CACHE, persist_result=False)
def preview(workspace: str, profile: str | None, overrides: dict[str, Any]) -> None:
    """Print the resolved run and publish it. Raises ConfigError or TrainingError."""
    root = folder_of(workspace)
    planned = dry_run(resolve(root, profile, overrides), Workspace(root))
    # Not print, which the flow passes on to Prefect as log lines: this is many pages.
    sys.stdout.write(printable(planned.text()) + "\n")
    say(planned.summary)
    rows = [
        {
            "parameter": comparison.parameter.name,
            "paper": str(comparison.parameter.paper),
            "published script": str(comparison.parameter.script),
            "ours": str(comparison.value),
            "why it differs": "" if comparison.equal else comparison.parameter.why or "no reason given",
        }
        for comparison in planned.compared
    ]
    with showing("the dry run"):
        create_markdown_artifact(planned.text(), key="dry-run", description=f"Profile {planned.config.profile}: {planned.summary}")
        create_table_artifact(rows, key="dry-run-paper", description=planned.summary)
