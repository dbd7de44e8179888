"""Task bench: the matrix of section bench, played where a cell is missing, as a page in Prefect and runs in MLflow."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed

from research_rl.evaluation.bench import matrix
from research_rl.evaluation.cells import names
from research_rl.evaluation.judging import standing
from research_rl.evaluation.matrix import CellOutcome, play
from research_rl.evaluation.published import publication
from research_rl.process.registry import Registry
from research_rl.report.matrix import describe, describe_against
from tasks import limits
from tasks.artifacts import showing
from tasks.evaluation.to_mlflow import Evaluation, track_set
from tasks.job import Job
from tasks.stage import Progress, retried
from tasks.tracking.track import StageRun

__all__ = ["bench"]


@retried("bench", "models by methods by question sets, and what search adds", jitter=0.5)
def bench(job: Job, against: str | None) -> State[list[str]]:
    """Play the matrix and show it, beside a publication's results where one is named; return the labels of the cells."""
    if against:
        publication(against)
    models = Registry(job.workspace.root).folder
    chosen, progress = matrix(job.config.bench, job.config, job.workspace, models), Progress("bench", get_run_logger().info, job.proceed)
    with job.tracker.stage("bench", job.config, ("bench", "evaluation")) as run:
        job.on_build()
        with limits.place():
            outcomes = play(job.config, job.workspace, chosen, progress)
        progress.finish()
        _track(run, job, outcomes)
    text = describe(outcomes)
    if against:
        text += f"\n\n{describe_against(outcomes, against, job.config)}"
    played = [item.cell.label for item in outcomes if item.manifest]
    with showing("the benchmark"):
        create_markdown_artifact(text, key="bench", description=f"{len(played)} cells of {job.workspace.root}")
    return Completed(message=f"{len(played)} cells stand, {len(outcomes) - len(played)} were refused", data=played)


def _track(run: StageRun, job: Job, outcomes: Sequence[CellOutcome]) -> None:
    """Tell MLflow once about each cell, as about every other evaluation."""
    shown = names(item.cell.model for item in outcomes)
    for item in outcomes:
        # Asked first: a child makes the run that it is nested in, also where there is nothing to tell.
        if item.manifest is None or run.tracker.journal_of(item.manifest):
            continue
        model, sample = item.cell.model, item.cell.sample
        judgements = [judged for judged, _ in standing(job.workspace.root, item.manifest.hash)]
        played = Evaluation(item.cell.folder, item.manifest, shown[model], model.sha256, item.cell.method, judgements, sample)
        cell = track_set(run, model.config(job.config, job.workspace), played, item.cell.question_set, item.cell.hash)
        cell.finished(item.manifest, built=False)
        cell.tags({"manifest": item.manifest.hash, "cell": item.cell.label})
        cell.artifact(item.cell.folder / "metrics.json")
        cell.end("FINISHED")
