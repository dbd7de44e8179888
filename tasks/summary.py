"""Task summary: what a run did, stage by stage, and what came of it, in Prefect and in the log."""

from __future__ import annotations

from prefect import get_run_logger, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import showing
from tasks.job import Job

__all__ = ["summary"]


@task(name="summary", task_run_name="summary", cache_policy=NO_CACHE, persist_result=False)
def summary(job: Job) -> None:
    """Publish the table of stages; log the difference that training made."""
    rows = [
        {
            "stage": name,
            "state": "built" if outcome.built else "cached",
            "seconds": round(outcome.seconds, 1),
            "counts": ", ".join(f"{key} {value:,}" for key, value in outcome.manifest.counts.items()),
            "artifact": outcome.manifest.hash[:12],
        }
        for name, outcome in job.outcomes.items()
    ]
    with showing("the summary"):
        create_table_artifact(rows, key="run-summary", description=f"Stages of {job.workspace.root}")
    if "report" in job.outcomes:
        facts = job.outcomes["report"].manifest.facts
        for name in ("f1", "em"):
            change = facts["difference"][name]
            get_run_logger().info(
                "%s before %.3f, after %.3f, difference %+.3f, 95 %% interval %+.3f to %+.3f (paired, %d questions)",
                name.upper(),
                facts["before"][name],
                facts["after"][name],
                change["mean"],
                change["low"],
                change["high"],
                change["n"],
            )
        get_run_logger().info("report: %s", job.workspace.folder("report") / "report.html")
