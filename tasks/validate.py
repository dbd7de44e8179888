"""Task validate: the stage `research_rl.validation` as a Prefect task that shows what it refuses. Knows no expectation."""

from __future__ import annotations

from research_rl.pipeline.stages import Context
from research_rl.validation.stage import QualityError, run_stage
from tasks.artifacts import quality_table, refused_table
from tasks.stage import stage_task
from tasks.tracking.track import StageRun

__all__ = ["validate"]


def _watched(context: Context, run: StageRun) -> None:
    """Build the stage; what it refuses is shown before the error goes on."""
    try:
        run_stage(context)
    except QualityError as error:
        refused_table(error.checks, error.docs)
        raise


validate = stage_task("validate", build=_watched, after=quality_table)
